from __future__ import annotations

import pytest
import torch

from hwnas import ModelSpace
from hwnas.spaces import MobileNetV3
from hwnas.spaces.mobilenet_v3 import LARGE, Design, Stage
from profilers import FlopsProfiler, count_macs
from tests.contracts.space import SpaceContract


class TestMobileNetV3(SpaceContract):
    space = MobileNetV3
    counted = {
        "large": "MobileNetV3-Large",
        "ofa-595m": "ofa-595M",
        **{name: name for name in ("ofa-lg-8", "ofa-note10-22", "ofa-pixel1-58", "ofa-cpu-10")},
    }


def test_multiply_adds_follow_the_resolution() -> None:
    design = Design(8, Stage(8, 1, "relu"), (Stage(16, 2, "relu", squeeze=True),), "relu", (32,))
    network = MobileNetV3(3, 1, design, kernels=(3, 5), depths=(1,), resolutions=(16, 24, 32))
    space, images = ModelSpace(network), torch.zeros(1, 1, 32, 32)
    macs = FlopsProfiler(space, images)
    counted = []
    for side in (16, 24, 32):
        architecture = {**space.default(), "resolution": side}
        counted.append(macs.profile(architecture))
        assert counted[-1] == count_macs(space.freeze(architecture), [images]).headline
    assert counted[0] < counted[1] < counted[2]
    with pytest.raises(ValueError, match=r"'resolution' cannot be searched with mixing weights"):
        space.check_can_mix()


def test_the_elastic_space_has_the_widths_of_its_multiplier() -> None:
    with torch.device("meta"):
        network = MobileNetV3(width=1.2)
    projected = [stage[0].project[0].out_channels for stage in network.stages]
    assert projected == [32, 48, 96, 136, 192]  # once-for-all's, of 24 to 160
    assert network.classifier[-1].in_features == 1536
    assert LARGE.head == (960, 1280)
