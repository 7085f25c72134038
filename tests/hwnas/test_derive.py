from __future__ import annotations

import math
from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import InputChoice, LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.derive import ranked, score
from hwnas.nn import Linear
from profilers.cost import Cost, CostTable
from profilers.profile import Profiler
from profilers.space import Architecture


class Nested(nn.Module):
    """Operations inside branches and repeated blocks, a width inside one branch, one shared label."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([2, 4, 6], label="width")
        inner = LayerChoice([nn.ReLU(), nn.Tanh()], label="inner")
        wide = nn.Sequential(Linear(4, width), inner, Linear(width, 4))
        self.op = LayerChoice({"skip": nn.Identity(), "plain": Linear(4, 4), "wide": wide}, label="op")
        self.deep = Repeat(
            lambda index: LayerChoice([nn.ReLU(), nn.Tanh(), nn.Sigmoid()], label=f"block{index}"),
            (0, 2),
            label="depth",
        )
        self.twice = LayerChoice([nn.ReLU(), nn.Tanh()], label="inner")
        self.edges = InputChoice(2, label="edges")

    def forward(self, features: Tensor) -> Tensor:
        deep = self.deep(self.op(features))
        chosen: Tensor = self.edges([deep, self.twice(features)])
        return chosen


class Tables(Profiler):
    """Random costs of the places of `Nested`; like a survey's, they do not look at inactive choices."""

    def __init__(self, space: ModelSpace, seed: int) -> None:
        random = np.random.default_rng(seed)

        def values(*labels: str) -> npt.NDArray[np.float64]:
            return random.exponential(size=tuple(len(space.options[label]) for label in labels))

        op, first, second = values("op", "width"), values("depth", "block0"), values("depth", "block1")
        op[:2] = op[:2, :1]  # only 'wide' has a width
        first[0] = second[:2] = 0.0
        tables = [
            CostTable(("op", "width"), op),
            CostTable(("depth", "block0"), first),
            CostTable(("depth", "block1"), second),
            CostTable(("inner", "edges"), values("inner", "edges")),
            CostTable(("op", "depth"), values("op", "depth")),
        ]
        super().__init__(Cost(space.options, 0.5, tables, unit="ms"))


def probabilities(space: ModelSpace, seed: int, sharpness: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        label: (sharpness * torch.randn(len(found), generator=generator)).softmax(0)
        for label, found in space.options.items()
    }


def by_hand(space: ModelSpace, given: dict[str, Tensor], architecture: Architecture) -> float:
    """The sum over the active choices, each label once."""
    total = 0.0
    for label, option in space.active(architecture).items():
        row = given[label].double()
        total += float(row[space.options[label].index(option)].log() - row.max().log())
    return total


SPACE = ModelSpace(Nested())
GRID = list(SPACE.grid())
seeds = st.integers(0, 10_000)
few = settings(max_examples=15, deadline=None)


@few
@given(seeds)
def test_score_is_the_sum_over_active_choices(seed: int) -> None:
    given_ = probabilities(SPACE, seed)
    cost = score(SPACE, given_)
    assert cost.unit == "nat"
    for architecture in GRID[:: 1 + seed % 17]:
        assert cost.of(architecture) == pytest.approx(by_hand(SPACE, given_, architecture), abs=1e-9)


@few
@given(seeds, st.floats(0.05, 0.95))
def test_best_under_a_budget_equals_brute_force(seed: int, share: float) -> None:
    given_, profiler = probabilities(SPACE, seed), Tables(SPACE, seed)
    low, high = profiler.cost.bounds()
    budget = low + share * (high - low)
    best = next(ranked(SPACE, given_, {profiler: budget}))
    feasible = [a for a in GRID if profiler.cost.of(a) <= budget]
    assert profiler.cost.of(best) <= budget
    assert best == SPACE.canonical(best)
    expected = max(by_hand(SPACE, given_, a) for a in feasible)
    assert by_hand(SPACE, given_, best) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_next_best_come_in_order_and_each_network_once(seed: int) -> None:
    given_, profiler = probabilities(SPACE, seed), Tables(SPACE, seed)
    low, high = profiler.cost.bounds()
    budget = (low + high) / 2
    found = list(islice(ranked(SPACE, given_, {profiler: budget}), 6))
    feasible = [by_hand(SPACE, given_, a) for a in GRID if profiler.cost.of(a) <= budget]
    expected = sorted(feasible, reverse=True)[:6]
    assert [by_hand(SPACE, given_, a) for a in found] == pytest.approx(expected, abs=1e-6)
    assert len({str(a) for a in found}) == len(found)


def test_excluded_networks_do_not_come_back_in_any_disguise() -> None:
    given_ = probabilities(SPACE, 3)
    best, second = islice(ranked(SPACE, given_), 2)
    disguised = {
        **best,
        **{label: SPACE.options[label][-1] for label in SPACE.options if label not in SPACE.active(best)},
    }
    assert next(ranked(SPACE, given_, excluded=[disguised])) == second


def test_without_a_budget_every_network_comes_once() -> None:
    small = ModelSpace(
        nn.Sequential(
            LayerChoice([nn.ReLU(), nn.Sequential(Repeat(nn.Tanh(), (0, 2), label="d"))], label="op")
        )
    )
    assert sorted(map(str, ranked(small, probabilities(small, 0)))) == sorted(map(str, small.grid()))


def test_depth_is_not_punished_for_having_more_choices() -> None:
    # Blocks undecided between nearly equal options: the sum of logarithms alone would take depth 0.
    given_ = {label: torch.full((len(o),), 1 / len(o)) for label, o in SPACE.options.items()}
    given_["depth"] = torch.tensor([0.3, 0.3, 0.4])
    assert next(ranked(SPACE, given_))["depth"] == 2


def test_ruled_out_options_stay_out_where_there_is_another() -> None:
    given_ = {label: torch.full((len(o),), 1 / len(o)) for label, o in SPACE.options.items()}
    given_["op"] = torch.tensor([0.0, 1.0, 0.0])
    best = next(ranked(SPACE, given_))
    assert best["op"] == "plain"
    assert math.isfinite(score(SPACE, given_).of(best))


@few
@given(seeds)
def test_least_cost_is_kept_to_as_well(seed: int) -> None:
    given_, profiler = probabilities(SPACE, seed), Tables(SPACE, seed)
    low, high = profiler.cost.bounds()
    least, most = low + 0.4 * (high - low), low + 0.6 * (high - low)
    inside = [a for a in GRID if least <= profiler.cost.of(a) <= most]
    found = next(ranked(SPACE, given_, {profiler: most}, {profiler: least}), None)
    assert (found is not None) == bool(inside)
    if found is not None:
        assert least <= profiler.cost.of(found) <= most
        expected = max(by_hand(SPACE, given_, a) for a in inside)
        assert by_hand(SPACE, given_, found) == pytest.approx(expected, abs=1e-6)


def test_budgets_of_several_profilers_hold_together() -> None:
    given_, one, other = probabilities(SPACE, 1), Tables(SPACE, 1), Tables(SPACE, 2)
    limits = {p: sum(p.cost.bounds()) / 2.5 for p in (one, other)}
    inside = [a for a in GRID if all(p.cost.of(a) <= limit for p, limit in limits.items())]
    found = next(ranked(SPACE, given_, limits))
    assert all(p.cost.of(found) <= limit for p, limit in limits.items())
    expected = max(by_hand(SPACE, given_, a) for a in inside)
    assert by_hand(SPACE, given_, found) == pytest.approx(expected, abs=1e-6)


def test_impossible_budget_is_refused_with_both_bounds() -> None:
    profiler = Tables(SPACE, 0)
    low, high = profiler.cost.bounds()
    with pytest.raises(ValueError, match=rf"cheapest .* costs {low:.6g} ms, the dearest {high:.6g}"):
        next(ranked(SPACE, probabilities(SPACE, 0), {profiler: low * 0.99}))
    with pytest.raises(ValueError, match=rf"no architecture costs .* the dearest .* {high:.6g} ms"):
        next(ranked(SPACE, probabilities(SPACE, 0), None, {profiler: high * 1.01}))


def test_exact_cheapest_cost_is_a_possible_budget() -> None:
    profiler = Tables(SPACE, 4)
    low, _ = profiler.cost.bounds()
    found = next(ranked(SPACE, probabilities(SPACE, 0), {profiler: low}))
    assert profiler.cost.of(found) == low
