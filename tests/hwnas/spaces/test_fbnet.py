from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hwnas import LayerChoice, ModelSpace
from hwnas.spaces import FBNet
from hwnas.spaces.blocks import InvertedResidual
from tests.contracts.space import SpaceContract


class TestFBNet(SpaceContract):
    space = FBNet
    counted = {"a": "fbnet_a", "c": "fbnet_c"}


def test_a_layer_has_the_nine_blocks_of_the_paper_or_eight() -> None:
    with torch.device("meta"):
        network = FBNet()
    choices = [module for module in network.modules() if isinstance(module, LayerChoice)]
    assert [len(choice) for choice in choices] == [9] + 5 * [8, 9, 9, 9] + [8]


def test_two_groups_exchange_their_channels() -> None:
    block = InvertedResidual(8, 8, 3, 1, groups=2).eval()
    features = torch.randn(1, 8, 4, 4)
    expected = block.project(block.depthwise(F.channel_shuffle(features, 2))) + features
    torch.testing.assert_close(block(features), expected)


def test_every_convolution_has_a_bias_as_in_the_authors_code() -> None:
    space = ModelSpace(FBNet.small())
    convolutions = [m for m in space.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(convolution.bias is not None for convolution in convolutions)


def test_stages_need_a_width_and_a_stride_each() -> None:
    with pytest.raises(
        ValueError, match=r"each stage needs a number of layers and a stride.* got 7, 1 and 9"
    ):
        FBNet(strides=(2,))
