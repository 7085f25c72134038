from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
import torch

from hwnas.trials import Candidates
from profilers import Cost, CostTable, Profiler, RangeProfilerFilter
from profilers.space import Architecture
from tests.contracts.search import conditional_space, filters, parameters


def candidates(within: bool = True, seed: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    return Candidates(conditional_space(), filters() if within else (), generator)


def every(within: bool = True) -> list[Architecture]:
    return [a for a in conditional_space().grid() if not within or filters()[0].filter(a)]


def differing(one: Architecture, other: Architecture) -> set[str]:
    return {label for label in one if one[label] != other[label]}


def assert_uniform(drawn: list[Architecture], over: list[Architecture]) -> None:
    seen = collections.Counter(map(str, drawn))
    assert set(seen) <= set(map(str, over))
    expected = len(drawn) / len(over)
    statistic = sum((seen[str(a)] - expected) ** 2 / expected for a in over)
    # The mean is the degrees of freedom, the variance twice that: a chance of 1 in 10^7.
    freedom = len(over) - 1
    assert statistic < freedom + 5.5 * (2 * freedom) ** 0.5 + 10


def test_draws_are_uniform_over_what_is_left() -> None:
    found = candidates()
    taken = every()[::2]
    for architecture in taken:
        found.take(architecture)
    drawn = [found.draw() for _ in range(20 * len(every()))]
    assert_uniform([a for a in drawn if a is not None], every()[1::2])


def test_last_one_is_found_and_then_there_is_none() -> None:
    found = candidates()
    for architecture in every()[:-1]:
        found.take(architecture)
    assert found.draw() == every()[-1]
    found.take(every()[-1])
    assert found.draw() is None
    assert found.mutate(every()[0]) is None


def test_mutation_is_uniform_over_new_neighbours_within_the_filters() -> None:
    found = candidates()

    def neighbours_of(parent: Architecture) -> list[Architecture]:
        return [
            a
            for label in conditional_space().active(parent)
            for option in conditional_space().options[label]
            if option != parent[label]
            for a in [conditional_space().canonical({**parent, label: option})]
            if filters()[0].filter(a)
        ]

    parent = max(every(), key=lambda architecture: len(neighbours_of(architecture)))
    neighbours = neighbours_of(parent)
    found.take(parent)
    found.take(neighbours[0])
    assert len(neighbours) > 4
    drawn = [found.mutate(parent) for _ in range(1000)]
    assert_uniform([a for a in drawn if a is not None], neighbours[1:])


def test_two_choices_change_where_no_neighbour_is_left() -> None:
    found = candidates(within=False)
    space = conditional_space()
    parent = {**space.default(), "op": "plain", "depth": 1}
    active = space.active(parent)
    nearest = {
        str(space.canonical({**parent, label: option})) for label in active for option in space.options[label]
    }
    for architecture in every(within=False):
        if str(architecture) in nearest:
            found.take(architecture)
    reached = {
        str(space.canonical({**parent, one: first, other: second}))
        for one, other in itertools.combinations(active, 2)
        for first in space.options[one]
        for second in space.options[other]
    }
    assert {str(found.mutate(parent)) for _ in range(100)} <= reached - nearest


def test_repair_keeps_what_it_can_of_an_architecture() -> None:
    found = candidates()
    space = conditional_space()
    kept, drawn = 0, 0
    for architecture in every(within=False):
        repaired = found.repair(architecture)
        assert repaired is not None
        assert filters()[0].filter(repaired)
        assert repaired == space.canonical(repaired)
        if filters()[0].filter(architecture):
            assert repaired == architecture
        else:
            other = found.draw()
            assert other is not None
            kept += len(differing(architecture, repaired))
            drawn += len(differing(architecture, other))
    assert kept < 0.9 * drawn


def test_grid_is_the_filtered_grid_of_the_space() -> None:
    assert list(candidates().grid()) == every()
    assert list(candidates(within=False).grid()) == every(within=False)


@pytest.mark.parametrize("seed", range(5))
def test_grid_leaves_nothing_out_of_random_costs(seed: int) -> None:
    space = conditional_space()
    random = np.random.default_rng(seed)
    labels = list(space.options)
    tables = []
    for _ in range(6):
        chosen = tuple(random.choice(labels, size=random.integers(1, 4), replace=False))
        tables.append(CostTable(chosen, random.normal(size=[len(space.options[name]) for name in chosen])))
    cost = Cost(space.options, 1.0, tables, unit="ms")
    low, high = np.quantile([cost.of(a) for a in space.grid()], [0.3, 0.4])
    within = RangeProfilerFilter(Profiler(cost), min=float(low), max=float(high))
    found = Candidates(space, [within], torch.Generator())
    assert list(found.grid()) == [a for a in space.grid() if within.filter(a)]


def test_ranges_that_exclude_each_other_are_refused() -> None:
    low = RangeProfilerFilter(parameters(), max=20)
    high = RangeProfilerFilter(parameters(), min=60)
    with pytest.raises(ValueError, match="no architecture of the space is in all of these ranges"):
        Candidates(conditional_space(), [low, high], torch.Generator())
