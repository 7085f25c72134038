"""What every profiler promises of its meter, as a test case for profilers of your own, too.

::

    from tests.contracts.meter import MeterContract

    class TestMine(MeterContract):
        unit = "byte"

        def profiler(self, space, inputs):
            return Profiler(build_cost(space, space.sites(*inputs), my_meter, "byte"))

        def truth(self, space, inputs, architecture):
            return my_meter(space.freeze(architecture), inputs)
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.derive import ranked
from hwnas.nn import BatchNorm2d, Conv2d, Linear
from profilers import Cost, Profiler
from profilers.space import Architecture

# Costs are sums of float64 numbers, which the two sides add in another order.
_CLOSE = 1e-9


class MeterContract(ABC):
    """What every profiler promises, on a small space.

    Subclass it as ``Test…`` and say how the profiler is made, and how to come by the cost of one frozen
    network without it.
    """

    unit: ClassVar[str]
    """Of the numbers."""

    @abstractmethod
    def profiler(self, space: ModelSpace, inputs: tuple[Tensor, ...]) -> Profiler:
        """The profiler under test."""

    @abstractmethod
    def truth(self, space: ModelSpace, inputs: tuple[Tensor, ...], architecture: Architecture) -> float:
        """What the frozen network costs: the meter on all of it, or the sum over its parts."""

    def space(self) -> ModelSpace:
        """The space that is profiled, of at most a few hundred networks."""
        return ModelSpace(ContractNetwork())

    def inputs(self) -> tuple[Tensor, ...]:
        """What its network gets."""
        return (torch.zeros(1, 1, 8, 8),)

    # ---- the promises

    def test_cost_is_that_of_the_frozen_network(self) -> None:
        space, profiler = self._made()
        for architecture in space.grid():
            expected = self.truth(space, self.inputs(), architecture)
            assert profiler.profile(architecture) == pytest.approx(expected, rel=_CLOSE), architecture
            assert profiler.cost.of(architecture) == profiler.profile(architecture)

    def test_what_takes_no_part_costs_nothing(self) -> None:
        space, profiler = self._made()
        for architecture in _every(space):
            canonical = space.canonical(architecture)
            assert profiler.profile(architecture) == pytest.approx(profiler.profile(canonical), rel=_CLOSE)

    def test_expected_cost_is_the_mean_over_all_networks(self) -> None:
        space, profiler = self._made()
        probabilities = _softmax(_random_logits(space))
        found = profiler.cost.expected(probabilities)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(_mean(space, profiler.cost, probabilities), rel=_CLOSE)

    def test_gradient_of_the_expected_cost_reaches_every_logit(self) -> None:
        space, profiler = self._made()
        logits = _random_logits(space)
        probabilities = _softmax(logits)
        cost = profiler.cost.expected(probabilities)
        found = torch.autograd.grad(cost, list(logits.values()), allow_unused=True)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
        for (label, p), gradient in zip(probabilities.items(), found, strict=True):
            # d E / d logit_i = p_i (E given option i - E)
            given = [
                _mean(space, profiler.cost, {**probabilities, label: one_hot})
                for one_hot in torch.eye(len(p), dtype=torch.float64)
            ]
            expected = (p * (torch.tensor(given, dtype=torch.float64) - cost)).detach()
            found_here = torch.zeros_like(p) if gradient is None else gradient
            torch.testing.assert_close(found_here, expected, rtol=1e-6, atol=1e-9 * cost.abs().item())

    def test_many_costs_at_once_are_those_one_by_one(self) -> None:
        space, profiler = self._made()
        architectures = _every(space)
        found = profiler.cost.of_many(profiler.cost.indices(architectures))
        np.testing.assert_allclose(found, [profiler.profile(a) for a in architectures], rtol=_CLOSE)

    def test_bounds_are_the_cheapest_and_the_dearest(self) -> None:
        space, profiler = self._made()
        costs = [profiler.profile(architecture) for architecture in space.grid()]
        assert profiler.cost.bounds() == pytest.approx((min(costs), max(costs)), rel=_CLOSE)
        assert min(costs) < max(costs), "a space in which all cost the same tests nothing"

    def test_unit_travels_with_every_number(self) -> None:
        space, profiler = self._made()
        cost = profiler.cost
        assert {profiler.unit, cost.unit, (-cost).unit, (cost * 2.0).unit, (cost + cost).unit} == {self.unit}
        other = Cost(cost.options, 1.0, [], unit="other")
        with pytest.raises(ValueError, match=f"one unit to be added, got '{self.unit}' and 'other'"):
            _ = cost + other
        low, _ = cost.bounds()
        with pytest.raises(ValueError, match=rf"cannot be kept: .* costs .* {self.unit}, the dearest"):
            next(ranked(space, _softmax(_random_logits(space)), {profiler: low - abs(low) - 1.0}))

    def test_made_again_it_says_the_same(self) -> None:
        space, profiler = self._made()
        again = self.profiler(self.space(), self.inputs())
        for architecture in space.grid():
            assert profiler.profile(architecture) == again.profile(architecture)

    def _made(self) -> tuple[ModelSpace, Profiler]:
        space = self.space()
        return space, self.profiler(space, self.inputs())


class ContractNetwork(nn.Module):
    """Widths that couple layers, a choice within a choice, a depth, a skip, and 8x8 images: 42 networks."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([2, 4], label="width")

        def conv(kernel: int) -> nn.Module:
            return nn.Sequential(
                Conv2d(width, width, kernel, padding=kernel // 2, bias=False), BatchNorm2d(width), nn.ReLU()
            )

        inner = LayerChoice({"3": conv(3), "5": conv(5)}, label="kernel")
        self.stem = nn.Sequential(Conv2d(1, width, 3, stride=2, padding=1), BatchNorm2d(width))
        self.op = LayerChoice({"skip": nn.Identity(), "nested": nn.Sequential(inner, conv(1))}, label="op")
        self.deep = Repeat(lambda index: LayerChoice([conv(1), conv(3)], label=f"block{index}"), (0, 2))
        self.head = Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.deep(self.op(self.stem(images))).mean((2, 3)))
        return scores


def _every(space: ModelSpace) -> list[Architecture]:
    """Every combination of options, canonical or not."""
    return [
        dict(zip(space.options, chosen, strict=True)) for chosen in itertools.product(*space.options.values())
    ]


def _random_logits(space: ModelSpace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        label: torch.randn(len(options), generator=generator, dtype=torch.float64).requires_grad_()
        for label, options in space.options.items()
    }


def _softmax(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    return {label: found.softmax(0) for label, found in logits.items()}


def _mean(space: ModelSpace, cost: Cost, probabilities: dict[str, Tensor]) -> float:
    chances = {
        label: dict(zip(space.options[label], p.tolist(), strict=True)) for label, p in probabilities.items()
    }
    return sum(
        math.prod(chances[label][option] for label, option in architecture.items()) * cost.of(architecture)
        for architecture in _every(space)
    )
