from __future__ import annotations

import pytest
import torch

from hwnas import ModelSpace
from hwnas.spaces import ENASMacro
from profilers import FlopsProfiler, count_macs
from tests.contracts.space import SpaceContract


class TestENASMacro(SpaceContract):
    space = ENASMacro


def test_numbers_are_operations_and_switches() -> None:
    architecture = ENASMacro.architecture_of("1 4 0 0 1 1")
    assert architecture == {
        "layer0.op": "sep_conv_3x3",
        "layer1.op": "avg_pool_3x3",
        "layer1.skip0": False,
        "layer2.op": "conv_3x3",
        "layer2.skip0": True,
        "layer2.skip1": True,
    }
    ModelSpace(ENASMacro(channels=4, layers=3)).validate(architecture)


@pytest.mark.parametrize("numbers", ["6", "0 1", "0 1 2", "0 1 0 3"])
def test_numbers_that_are_no_network_are_refused(numbers: str) -> None:
    with pytest.raises(ValueError, match="is the number of an operation"):
        ENASMacro.architecture_of(numbers)


def test_what_is_derived_doubles_its_width_and_is_counted_too() -> None:
    space = ModelSpace(ENASMacro(channels=4, layers=6, derived=True))
    images = torch.randn(1, 3, 16, 16)
    architecture = space.random(torch.Generator().manual_seed(0))
    subnet = space.freeze(architecture)
    assert subnet.classifier.in_features == 16
    assert FlopsProfiler(space, images).profile(architecture) == count_macs(subnet, [images]).headline
