from __future__ import annotations

import pytest
import torch

from hwnas import ModelSpace
from hwnas.spaces import ShuffleNetV2
from hwnas.spaces.shufflenet_v2 import ShuffleBlock
from tests.contracts.space import SpaceContract


class TestShuffleNetV2(SpaceContract):
    space = ShuffleNetV2
    counted = {"spos": "SPOS"}


def test_every_other_channel_passes_a_block_of_stride_1() -> None:
    features = torch.randn(2, 16, 5, 5)
    out = ShuffleBlock(16, 16, 8, kernel_size=3, stride=1)(features)
    assert torch.equal(out[:, :8], features[:, ::2])
    assert out.shape == features.shape


def test_blocks_alone_are_searched_with_one_ratio() -> None:
    with torch.device("meta"):
        assert ModelSpace(ShuffleNetV2(ratios=(1.0,))).size == 4**20


def test_blocks_of_a_layer_share_the_number_of_channels() -> None:
    space = ModelSpace(ShuffleNetV2.small())
    assert space.options["stage1.layer1.channels"] == (12, 24, 36)
    for block in ("shuffle3", "xception"):
        subnet = space.freeze({**space.default(), "stage1.layer1": block, "stage1.layer1.channels": 36})
        assert 36 in {m.num_features for m in subnet.modules() if isinstance(m, torch.nn.BatchNorm2d)}


def test_stages_need_a_width_each() -> None:
    with pytest.raises(ValueError, match=r"each stage needs a number of layers.* got 1 and 6"):
        ShuffleNetV2(layers=(4,))


def test_channels_are_the_authors_multiples_rounded_down() -> None:
    with torch.device("meta"):
        space = ModelSpace(ShuffleNetV2())
    assert space.options["stage1.layer1.channels"] == (6, 12, 19, 25, 32, 38, 44, 51)
    assert space.options["stage4.layer4.channels"] == (64, 128, 192, 256, 320, 384, 448, 512)
    published = ShuffleNetV2.published["spos-block-channel"].architecture
    assert [published[f"stage1.layer{layer}.channels"] for layer in (1, 2, 3, 4)] == [44, 38, 25, 38]
