from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.derive import ranked, score
from hwnas.trials import additive, pareto_front
from profilers import Cost, CostTable, minimise
from profilers.space import Architecture
from tests.contracts.search import conditional_space, parameters

OPTIONS = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2, 3), "d": (0, 1, 2), "e": (0, 1), "idle": (0, 1)}


def random_cost(seed: int, count: int, widest: int, quarters: bool) -> Cost:
    random = np.random.default_rng(seed)
    tables = []
    for _ in range(count):
        labels = tuple(random.choice(list(OPTIONS)[:-1], size=random.integers(1, widest + 1), replace=False))
        shape = [len(OPTIONS[label]) for label in labels]
        values = random.integers(-8, 9, shape) / 4 if quarters else random.normal(size=shape)
        tables.append(CostTable(labels, values))
    return Cost(OPTIONS, 0.5, tables, unit="x")


def brute_force(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(score, cost) of the front, the cheapest first."""
    front: list[tuple[float, float]] = []
    for worth, price in sorted(set(points), key=lambda point: (point[1], -point[0])):
        if not front or worth > front[-1][0]:
            front.append((worth, price))
    return front


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 8), widest=st.integers(1, 4), quarters=st.booleans())
def test_front_is_that_of_brute_force(seed: int, count: int, widest: int, quarters: bool) -> None:
    worth, price = random_cost(seed, count, widest, quarters), random_cost(seed + 1, count, widest, quarters)
    grid = np.indices([len(options) for options in OPTIONS.values()]).reshape(len(OPTIONS), -1).T
    points = list(zip(worth.of_many(grid).tolist(), price.of_many(grid).tolist(), strict=True))
    found = pareto_front(worth, price)
    assert [(point.score, point.cost) for point in found] == brute_force(points)
    for point in found:
        assert (worth.of(point.architecture), price.of(point.architecture)) == (point.score, point.cost)


@pytest.mark.parametrize("seed", range(3))
def test_front_of_a_space_with_conditional_choices_is_that_of_brute_force(seed: int) -> None:
    space = conditional_space()
    generator = torch.Generator().manual_seed(seed)
    probabilities = {
        label: torch.randn(len(options), generator=generator).softmax(0)
        for label, options in space.options.items()
    }
    worth, price = score(space, probabilities), parameters().cost
    points = [(worth.of(a), price.of(a)) for a in space.grid()]
    found = pareto_front(worth, price)
    assert [(point.score, point.cost) for point in found] == brute_force(points)
    assert [point.architecture for point in found] == [space.canonical(point.architecture) for point in found]
    # The dearest of the front is the best of all, and each is the best at its own cost.
    for point in found:
        best: Architecture = next(ranked(space, probabilities, {parameters(): point.cost}))
        assert worth.of(best) == pytest.approx(point.score, rel=1e-9)


def test_front_of_21_layers_agrees_with_the_integer_program() -> None:
    random = np.random.default_rng(0)
    options = {f"layer{i}": tuple(range(7)) for i in range(21)}
    labels = list(options)

    def chained(unit: str) -> Cost:
        tables = [CostTable((label,), random.random(7).round(2)) for label in labels]
        tables += [CostTable(p, random.random((7, 7)).round(2)) for p in itertools.pairwise(labels)]
        return Cost(options, 0.0, tables, unit)

    worth, price = chained("nat"), chained("ms")
    front = pareto_front(worth, price)
    assert len(front) > 100
    for point in front[:: len(front) // 3]:
        best = minimise(-worth, [(price, point.cost + 1e-9)])
        assert best is not None
        assert worth.of(best) == pytest.approx(point.score, abs=1e-6)


def test_costs_of_two_spaces_are_refused() -> None:
    other = Cost({"a": (0, 1)}, 0.0, [], unit="ms")
    with pytest.raises(ValueError, match="one space"):
        pareto_front(other, random_cost(0, 1, 1, True))


def test_front_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dearer_is_better = Cost(
        OPTIONS, 0.0, [CostTable((label,), 3.0**i * np.arange(2)) for i, label in enumerate("be")], unit="x"
    )
    assert len(pareto_front(dearer_is_better, dearer_is_better)) == 4
    monkeypatch.setattr(additive, "_MOST_SUMS", 3)
    with pytest.raises(ValueError, match=r"too long to be listed: 4 .*minimise"):
        pareto_front(dearer_is_better, dearer_is_better)
