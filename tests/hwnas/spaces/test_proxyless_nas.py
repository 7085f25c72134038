from __future__ import annotations

import pytest
import torch

from hwnas import LayerChoice
from hwnas.spaces import ProxylessNAS
from tests.contracts.space import SpaceContract


class TestProxylessNAS(SpaceContract):
    space = ProxylessNAS
    counted = {"mobile": "proxyless_mobile", "gpu": "proxyless_gpu"}


def test_a_layer_can_be_skipped_where_it_keeps_the_shape() -> None:
    with torch.device("meta"):
        network = ProxylessNAS()
    choices = [module for module in network.modules() if isinstance(module, LayerChoice)]
    skipped = ["skip" in choice.options for choice in choices]
    assert skipped == 5 * [False, True, True, True] + [False]


def test_a_multiplier_never_makes_the_last_convolution_narrower() -> None:
    with torch.device("meta"):
        narrow, wide = ProxylessNAS(width_multiplier=0.5), ProxylessNAS(width_multiplier=1.4)
    assert (narrow.stem[0].out_channels, narrow.head[0].out_channels) == (16, 1280)
    assert (wide.stem[0].out_channels, wide.head[0].out_channels) == (48, 1792)


def test_stages_need_a_width_and_a_stride_each() -> None:
    with pytest.raises(
        ValueError, match=r"each stage needs a number of layers and a stride.* got 2, 6 and 9"
    ):
        ProxylessNAS(layers=(4, 4))
