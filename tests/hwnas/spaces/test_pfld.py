from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hwnas import ModelSpace
from hwnas.spaces import PFLD
from profilers import FlopsProfiler, ParamsProfiler
from tests.contracts.space import SpaceContract


class TestPFLD(SpaceContract):
    space = PFLD


@pytest.mark.parametrize("size", [28, 30, 32])
def test_the_small_variant_takes_images_of_several_sizes(size: int) -> None:
    network = ModelSpace(PFLD.small(num_classes=6, in_channels=3, pose=True)).train()
    assert network(torch.randn(2, 3, size, size)).shape == (2, 6 + 3)
    assert network.eval()(torch.randn(2, 3, size, size)).shape == (2, 6)


def test_the_pose_is_no_part_of_what_is_deployed() -> None:
    space = ModelSpace(PFLD.small(pose=True))
    subnet = space.freeze(space.random(torch.Generator().manual_seed(0))).eval()
    with_pose = subnet(image := torch.randn(1, 1, 28, 28))
    subnet.pose = None
    assert torch.equal(with_pose, subnet(image))


def test_images_of_another_size_are_refused() -> None:
    space = ModelSpace(PFLD.small())
    with pytest.raises(ValueError, match="made for 4x4"):
        space(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"give at least 33"):
        PFLD(image_size=32)


def test_blocks_have_the_multiply_adds_and_parameters_of_their_formulas() -> None:
    """Written out from the example's ``MBBlock``, ``SeparableConv``, ``GhostModule`` and ``eSEModule``."""

    def mobile(wide: int, kernel: int, given: int, made: int, stride: int, gated: bool) -> tuple[int, int]:
        hidden, before, after = wide * given, (7 * stride) ** 2, 49
        macs = given * hidden * before + kernel**2 * hidden * after + hidden * made * after
        params = given * hidden + kernel**2 * hidden + hidden * made + 2 * (hidden + hidden + made)
        if gated:
            macs += 49 * hidden + hidden**2
            params += 49 * hidden + hidden**2 + hidden
        return macs, params

    expected = {
        "mb_k3_e2_res": mobile(2, 3, 32, 64, 2, False),
        "mb_k3_e4_res": mobile(4, 3, 32, 64, 2, False),
        "mb_k3_e2_res_se": mobile(2, 3, 32, 64, 2, True),
        "mb_k3_res_d3": mobile(2, 3, 32, 64, 2, False),
        "mb_k5_res": mobile(1, 5, 32, 64, 2, False),
        "mb_k5_e2_res": mobile(2, 5, 32, 64, 2, False),
        "mb_k5_res_se": mobile(1, 5, 32, 64, 2, True),
        "mb_k5_e2_res_se": mobile(2, 5, 32, 64, 2, True),
        "gh_k5": (49 * (32 * 32 + 25 * 32), 32 * 32 + 25 * 32 + 2 * (32 + 32)),
    }
    space = ModelSpace(PFLD())
    costs = FlopsProfiler(space, torch.zeros(1, 3, 112, 112)), ParamsProfiler(space)
    cheapest = costs[0].cost.minimum()
    counted = {
        name: tuple(int(cost.profile({**cheapest, "layer3": name})) for cost in costs) for name in expected
    }
    reference = "gh_k5"
    for name, (macs, params) in expected.items():
        difference = macs - expected[reference][0], params - expected[reference][1]
        found = tuple(a - b for a, b in zip(counted[name], counted[reference], strict=True))
        assert found == difference, name


class Source(nn.Module):
    """Stem and head of the example with a fixed middle, from its text, to compare parameter counts."""

    def __init__(self) -> None:
        super().__init__()

        def conv(given: int, made: int, kernel: int, groups: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(given, made, kernel, groups=groups, bias=False), nn.BatchNorm2d(made)]

        def mobile(given: int, made: int, hidden: int) -> list[nn.Module]:
            return [*conv(given, hidden, 1), *conv(hidden, hidden, 3, hidden), *conv(hidden, made, 1)]

        # The separable convolution's depthwise kernel is 1: the fourth argument that it is given.
        stem = [*conv(3, 16, 3), *conv(16, 16, 1), *conv(16, 16, 1, 16), *conv(16, 16, 1), *conv(32, 16, 1)]
        gate = [nn.Conv2d(128, 128, 7, groups=128, bias=False), nn.Conv2d(128, 128, 1)]
        averages = [nn.Conv2d(16, 16, 9, groups=16, bias=False), nn.Conv2d(32, 32, 3, groups=32, bias=False)]
        join = nn.Conv2d(112, 64, 1, bias=False)
        last = [
            *conv(64, 64, 3, 64),
            *conv(64, 128, 1),
            nn.Conv2d(128, 128, 7, groups=128, bias=False),
            nn.Conv2d(128, 212, 1),
        ]
        self.parts = nn.ModuleList(
            [*stem, *mobile(16, 32, 32), *averages, join, *mobile(64, 64, 128), *gate, *last]
        )


def test_stem_and_head_have_the_parameters_of_the_source() -> None:
    network = PFLD()

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(network.stem) + count(network.reduce) + count(network.head) == count(Source())


def test_the_small_variants_pooling_reaches_the_size_of_the_other_scales() -> None:
    shapes: list[torch.Size] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.append(output.shape[-2:])

    for network, size, expected in ((PFLD(), 112, 7), (PFLD.small(in_channels=3), 28, 4)):
        network.head.average_early.register_forward_hook(note)
        network.head.average_middle.register_forward_hook(note)
        ModelSpace(network).eval()(torch.zeros(1, 3, size, size))
        assert shapes[-2:] == [(expected, expected)] * 2
