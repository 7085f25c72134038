"""Costs over labels that choices imply, held to brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from profilers import program
from profilers.cost import Cost, CostTable
from profilers.space import Architecture, Implied

OPTIONS = {"a": (0, 1, 2), "b": ("x", "y"), "c": (0, 1, 2, 3), "d": (8, 16)}
EVERY = [dict(zip(OPTIONS, found, strict=True)) for found in itertools.product(*OPTIONS.values())]
ROWS = np.indices([len(options) for options in OPTIONS.values()]).reshape(len(OPTIONS), -1).T
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def chain(seed: int) -> list[Implied]:
    """``low`` follows from a and b, ``high`` from it and c; ``idle``, which no table needs, from d."""
    generator = np.random.default_rng(seed)
    low: Numbers = generator.permutation([0, 0, 1, 1, 2, 2]).reshape(3, 2)
    high: Numbers = generator.permutation([0, 1] * 6).reshape(3, 4)
    return [
        Implied("low", ("l0", "l1", "l2"), ("a", "b"), low),
        Implied("idle", (0, 1), ("d",), np.array([1, 0])),
        Implied("high", (False, True), ("low", "c"), high),
    ]


def cost_of(seed: int, labels: tuple[tuple[str, ...], ...] = (("high", "d"), ("low",), ("c", "d"))) -> Cost:
    generator = np.random.default_rng(seed)
    sizes = {**{label: len(o) for label, o in OPTIONS.items()}, "low": 3, "high": 2}
    tables = [CostTable(names, generator.integers(0, 30, [sizes[n] for n in names]) / 4) for names in labels]
    return Cost(OPTIONS, 1.0, tables, "ms", chain(seed))


def reference(cost: Cost, architecture: Architecture, seed: int) -> float:
    low, _, high = chain(seed)
    at: dict[str, Any] = {label: OPTIONS[label].index(option) for label, option in architecture.items()}
    at["low"] = low.numbers[at["a"], at["b"]]
    at["high"] = high.numbers[at["low"], at["c"]]
    return cost.constant + sum(float(t.values[tuple(at[label] for label in t.labels)]) for t in cost.tables)


@pytest.mark.parametrize("seed", range(3))
def test_it_follows_from_the_choices(seed: int) -> None:
    cost = cost_of(seed)
    expected = [reference(cost, a, seed) for a in EVERY]
    assert [follows.label for follows in cost.implied] == ["low", "high"]
    assert [cost.of(a) for a in EVERY] == pytest.approx(expected)
    assert cost.of_many(ROWS) == pytest.approx(expected)
    assert (cost * 2 + -cost).of_many(ROWS) == pytest.approx(expected)
    assert cost.bounds() == pytest.approx((min(expected), max(expected)))


@pytest.mark.parametrize("seed", range(3))
def test_its_expectation_and_gradient_are_those_of_enumeration(seed: int) -> None:
    cost = cost_of(seed)
    rows = {label: torch.rand(len(o), dtype=torch.double).requires_grad_() for label, o in OPTIONS.items()}
    chances = {label: row / row.sum() for label, row in rows.items()}
    joint = torch.stack([row[ROWS[:, i]] for i, row in enumerate(chances.values())]).prod(0)
    found, wanted = cost.expected(chances), joint @ torch.from_numpy(cost.of_many(ROWS))
    torch.testing.assert_close(found, wanted)
    ours = torch.autograd.grad(found, [*rows.values()], retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(wanted, [*rows.values()]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_under_a_limit_is_that_of_enumeration(seed: int) -> None:
    objective = cost_of(seed, (("high",), ("d",)))
    limited = cost_of(seed, (("low", "c"), ("c", "d")))
    limit = float(np.quantile(limited.of_many(ROWS), 0.3))
    found = program.minimise(objective, [(limited, limit)])
    assert found is not None
    assert found.keys() == OPTIONS.keys()
    assert limited.of(found) <= limit
    assert objective.of(found) == min(objective.of(a) for a in EVERY if limited.of(a) <= limit)


def test_one_choice_behind_two_labels_of_a_table_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no choice can be behind two labels of one table, got \('a', 'low'\)"
    ):
        cost_of(0, (("low", "a"),))
