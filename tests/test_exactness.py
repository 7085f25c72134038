"""A cost is what the meter says of the frozen network; its expectation is what enumeration says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.nn import BatchNorm2d, Conv2d, Linear
from hwnas.spaces import SmallMobileNet
from profilers import FlopsProfiler, ParamsProfiler, count_macs

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Small(nn.Module):
    """Op, depth, coupled width and nested choices: few enough networks to count every one."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([2, 4, 6], label="width")
        self.stem = nn.Sequential(Conv2d(1, width, 3, padding=1), BatchNorm2d(width), nn.ReLU())
        self.stage = Repeat(
            lambda index: LayerChoice(
                {
                    "conv": Conv2d(width, width, 3, padding=1),
                    "nest": LayerChoice([Conv2d(width, width, 1), nn.Identity()], label=f"nested{index}"),
                },
                label=f"op{index}",
            ),
            depth=(1, 3),
            label="depth",
        )
        self.head = Linear(width * 64, 3)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.stage(self.stem(images)).flatten(1))
        return scores


@pytest.fixture(scope="module")
def space() -> ModelSpace:
    return ModelSpace(Small())


@pytest.fixture(scope="module")
def profiler(space):
    return FlopsProfiler(space, EXAMPLE)


@pytest.fixture(scope="module")
def metered(space):
    """Every network's multiply-adds, counted on its subnet."""
    return {
        tuple(architecture.values()): count_macs(space.freeze(architecture), [EXAMPLE]).headline
        for architecture in space.grid()
    }


def test_cost_of_every_network_is_what_the_meter_says_of_its_subnet(space, profiler, metered):
    assert space.size == len(metered) == 3 * (3 + 9 + 27)
    for architecture in space.grid():
        assert profiler.profile(architecture) == metered[tuple(architecture.values())]


def test_params_of_every_network_are_those_of_its_subnet(space):
    params = ParamsProfiler(space)
    for architecture in space.grid():
        subnet = space.freeze(architecture)
        assert params.profile(architecture) == sum(p.numel() for p in subnet.parameters())


def test_expected_cost_and_its_gradient_equal_enumeration_of_metered_subnets(space, profiler, metered):
    torch.manual_seed(0)
    logits = {
        label: torch.randn(len(options), dtype=torch.float64, requires_grad=True)
        for label, options in space.options.items()
    }
    probabilities = {label: found.softmax(0) for label, found in logits.items()}
    labels = list(space.options)
    enumerated = torch.zeros((), dtype=torch.float64)
    for indices in itertools.product(*(range(len(space.options[label])) for label in labels)):
        chosen = {label: space.options[label][i] for label, i in zip(labels, indices, strict=True)}
        chance = torch.ones((), dtype=torch.float64)
        for label, index in zip(labels, indices, strict=True):
            chance = chance * probabilities[label][index]
        enumerated = enumerated + chance * metered[tuple(space.canonical(chosen).values())]
    expected = profiler.cost.expected(probabilities)
    # float64 sums of some thousand terms
    torch.testing.assert_close(expected, enumerated, rtol=1e-12, atol=0)
    given = list(logits.values())
    ours = torch.autograd.grad(expected, given, retain_graph=True)
    theirs = torch.autograd.grad(enumerated, given)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-6)


def test_bounds_are_the_cheapest_and_dearest_metered_subnets(profiler, metered):
    assert profiler.cost.bounds() == (min(metered.values()), max(metered.values()))


def test_default_space_costs_what_its_subnets_do():
    space = ModelSpace(SmallMobileNet())
    example = torch.zeros(1, 1, 28, 28)
    macs, params = FlopsProfiler(space, example), ParamsProfiler(space)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        architecture = space.random(generator)
        subnet = space.freeze(architecture)
        assert macs.profile(architecture) == count_macs(subnet, [example]).headline
        assert params.profile(architecture) == sum(p.numel() for p in subnet.parameters())


def test_default_space_takes_28_to_64_pixels():
    space = ModelSpace(SmallMobileNet(num_classes=7, in_channels=3)).eval()
    for side in (28, 33, 64):
        assert space(torch.zeros(2, 3, side, side)).shape == (2, 7)
