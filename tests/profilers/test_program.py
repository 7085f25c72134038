"""The integer program, held to brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers import program
from profilers.cost import Cost, CostTable
from profilers.space import Architecture

OPTIONS = {"op": (0, 1, 2), "width": (8, 16), "depth": (1, 2, 3), "kernel": (3, 5), "idle": ("a", "b")}


def every_architecture() -> Iterator[Architecture]:
    for combination in itertools.product(*OPTIONS.values()):
        yield dict(zip(OPTIONS, combination, strict=True))


@st.composite
def costs(draw: st.DrawFn) -> Cost:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = st.lists(st.sampled_from(["op", "width", "depth", "kernel"]), max_size=3, unique=True)
    tables = []
    for chosen in draw(st.lists(labels, max_size=5)):
        shape = tuple(len(OPTIONS[label]) for label in chosen)
        tables.append(CostTable(tuple(chosen), generator.integers(-9, 10, shape) / 4))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e7]))
    return Cost(OPTIONS, 5.0, tables, "ms") * scale


@settings(max_examples=60, deadline=None)
@given(objective=costs(), limited=costs(), share=st.floats(-0.05, 1.05))
def test_minimum_under_a_limit_equals_brute_force(objective: Cost, limited: Cost, share: float) -> None:
    values = sorted(limited.of(a) for a in every_architecture())
    limit = values[0] + share * (values[-1] - values[0]) - (1e-9 if share < 0 else 0)
    found = program.minimise(objective, [(limited, limit)])
    allowed = [objective.of(a) for a in every_architecture() if limited.of(a) <= limit]
    assert (found is None) == (not allowed)
    if found is not None:
        assert limited.of(found) <= limit
        span = max(map(objective.of, every_architecture())) - min(allowed)
        assert objective.of(found) == pytest.approx(min(allowed), abs=1e-8 * span, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(objective=costs(), limited=costs(), ends=st.tuples(st.integers(0, 71), st.integers(0, 71)))
def test_a_lowest_value_is_a_limit_on_the_negative(
    objective: Cost, limited: Cost, ends: tuple[int, int]
) -> None:
    values = sorted(limited.of(a) for a in every_architecture())
    low, high = values[min(ends)], values[max(ends)]
    found = program.minimise(-objective, [(limited, high), (-limited, -low)])
    assert found is not None
    assert low <= limited.of(found) <= high
    best = max(objective.of(a) for a in every_architecture() if low <= limited.of(a) <= high)
    assert objective.of(found) == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(objective=costs())
def test_excluding_what_was_found_lists_architectures_from_the_best(objective: Cost) -> None:
    used = [label for label in OPTIONS if any(label in t.labels for t in objective.tables)]
    found: list[Architecture] = []
    count = math.prod(len(OPTIONS[label]) for label in used)
    for _ in range(min(count, 12)):
        best = program.minimise(objective, excluded=[{label: a[label] for label in used} for a in found])
        assert best is not None
        found.append(best)
    expected = sorted(objective.of({**found[0], **a}) for a in _combinations(used))
    assert [objective.of(a) for a in found] == pytest.approx(expected[: len(found)], rel=1e-9, abs=1e-9)


def _combinations(labels: list[str]) -> Iterator[Architecture]:
    for combination in itertools.product(*(OPTIONS[label] for label in labels)):
        yield dict(zip(labels, combination, strict=True))


def test_excluding_every_option_of_a_choice_leaves_nothing() -> None:
    cost = Cost(OPTIONS, 0.0, [CostTable(("op",), np.array([1.0, 2.0, 3.0]))], "ms")
    assert program.minimise(cost, excluded=[{"idle": "a"}, {"idle": "b"}]) is None


def test_choices_that_are_only_excluded_are_decided_too() -> None:
    cost = Cost(OPTIONS, 0.0, [CostTable(("op",), np.array([1.0, 2.0, 3.0]))], "ms")
    found = program.minimise(cost, excluded=[{"idle": "a"}])
    assert found is not None
    assert (found["op"], found["idle"]) == (0, "b")


def test_a_limit_that_is_met_exactly_is_kept() -> None:
    values = np.array([0.1, 0.2, 0.3])
    cost = Cost(OPTIONS, 0.7, [CostTable(("op",), values), CostTable(("depth",), values)], "ms")
    limit = cost.of({"op": 1, "depth": 2})
    found = program.minimise(-cost, [(cost, limit)])
    assert found is not None
    assert cost.of(found) == limit


def test_a_hundred_coupled_choices_are_solved() -> None:
    generator = np.random.default_rng(0)
    options = {f"layer{i}": tuple(range(7)) for i in range(100)}
    pairs = list(itertools.pairwise(options))
    tables = [CostTable(pair, generator.uniform(1, 6, (7, 7))) for pair in pairs]
    score = Cost(options, 0.0, [CostTable(pair, generator.uniform(size=(7, 7))) for pair in pairs], "score")
    cost = Cost(options, 0.0, tables, "ms")
    found = program.minimise(-score, [(cost, 220.0)])
    assert found is not None
    assert 219.0 < cost.of(found) <= 220.0


@pytest.mark.parametrize(
    ("constraints", "excluded", "match"),
    [
        ([(Cost({"other": (1,)}, 0.0, [], "ms"), 1.0)], [], "objective's space"),
        ([(Cost(OPTIONS, 0.0, [], "ms"), math.nan)], [], "must be a number of ms"),
        ([], [{"stride": 1}], "'stride' is none of"),
        ([], [{"op": 7}], "'op' must be one of"),
    ],
)
def test_bad_input_is_named(constraints: list, excluded: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        program.minimise(Cost(OPTIONS, 0.0, [], "MAC"), constraints, excluded)
