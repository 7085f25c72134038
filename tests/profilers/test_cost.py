"""Sums of small tables, held to brute force."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from profilers.cost import Cost, CostTable
from profilers.space import Architecture

OPTIONS = {"op": ("conv", "pool", (0, 1)), "width": (8, 16), "depth": (1, 2, 3), "kernel": (3, 5)}
Tables = list[tuple[tuple[str, ...], np.ndarray]]


def every_architecture() -> Iterator[Architecture]:
    for combination in itertools.product(*OPTIONS.values()):
        yield dict(zip(OPTIONS, combination, strict=True))


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = st.lists(st.sampled_from(list(OPTIONS)), max_size=4, unique=True)
    chosen = draw(st.lists(labels, max_size=6))
    return [
        (tuple(found), generator.normal(size=[len(OPTIONS[label]) for label in found])) for found in chosen
    ]


def cost_of(given_tables: Tables, constant: float = 3.0) -> Cost:
    return Cost(OPTIONS, constant, [CostTable(labels, values) for labels, values in given_tables], "ms")


def reference(given_tables: Tables, architecture: Architecture, constant: float = 3.0) -> float:
    position = {label: OPTIONS[label].index(option) for label, option in architecture.items()}
    return constant + sum(values[tuple(position[x] for x in labels)] for labels, values in given_tables)


@settings(max_examples=40, deadline=None)
@given(found=tables())
def test_cost_is_the_sum_of_its_tables(found: Tables) -> None:
    cost, architectures = cost_of(found), list(every_architecture())
    expected = [reference(found, a) for a in architectures]
    assert [cost.of(a) for a in architectures] == pytest.approx(expected)
    assert cost.of_many(cost.indices(architectures)) == pytest.approx([cost.of(a) for a in architectures])


@settings(max_examples=40, deadline=None)
@given(found=tables())
def test_bounds_are_the_cheapest_and_the_dearest(found: Tables) -> None:
    cost = cost_of(found)
    values = [cost.of(a) for a in every_architecture()]
    assert cost.bounds() == pytest.approx((min(values), max(values)))
    assert (cost.of(cost.minimum()), cost.of(cost.maximum())) == cost.bounds()


def mean_by_enumeration(found: Tables, probabilities: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for architecture in every_architecture():
        places = [OPTIONS[label].index(option) for label, option in architecture.items()]
        chance = torch.stack([p[i] for p, i in zip(probabilities, places, strict=True)]).prod()
        total = total + chance * float(reference(found, architecture))
    return total


@settings(max_examples=25, deadline=None)
@given(found=tables(), seed=st.integers(0, 2**32))
def test_expected_is_the_mean_over_all_architectures_with_its_gradient(found: Tables, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [
        torch.randn(len(choice), dtype=torch.float64, generator=generator).requires_grad_()
        for choice in OPTIONS.values()
    ]
    probabilities = [vector.softmax(0) for vector in logits]
    expected = mean_by_enumeration(found, probabilities)
    value = cost_of(found).expected(dict(zip(OPTIONS, probabilities, strict=True)))
    torch.testing.assert_close(value, expected)
    wanted = torch.autograd.grad(expected, logits, retain_graph=True)
    if value.requires_grad:  # some choice decides something
        got = torch.autograd.grad(value, logits, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(got, wanted)
    else:
        torch.testing.assert_close(torch.cat(wanted), torch.zeros(10, dtype=torch.float64))


def test_tables_over_the_same_choices_become_one() -> None:
    pair, width = np.array([[1.0, 2.0, 4.0], [0.0, 1.0, 5.0]]), np.array([1.0, 2.0])
    cost = cost_of(
        [(("width", "op"), pair), (("op", "width"), pair.T), (("width",), width), ((), np.array(4.0))]
    )
    assert [table.labels for table in cost.tables] == [("op", "width")]
    assert cost.constant == 7
    assert cost.of({"op": "conv", "width": 8}) == 7 + 3


def boxes_of(seed: int) -> tuple[Cost, list[CostTable]]:
    """Places that run where each of five choices has one of some options: 1,024 cells each."""
    generator = np.random.default_rng(seed)
    options = {f"c{i}": tuple(range(4)) for i in range(5)}
    found = []
    for weight in (2.0, -3.0, 5.0):
        inside = np.ones([4] * 5, dtype=np.bool_)
        for axis in range(5):
            allowed = np.append(generator.integers(0, 2, size=3), 1).astype(np.bool_)
            inside &= allowed.reshape([4 if other == axis else 1 for other in range(5)])
        found.append(CostTable(tuple(options), np.where(inside, weight, 1.0)))
    found.append(CostTable(("c0", "c1"), generator.normal(size=(4, 4))))
    return Cost(options, 1.0, found, "ms"), found


@pytest.mark.parametrize("seed", range(5))
def test_boxes_cost_and_bound_what_their_cells_do(seed: int) -> None:
    cost, found = boxes_of(seed)
    assert any(table.box is not None for table in cost.tables)
    total = 1.0 + sum(table.values for table in found[:3]) + found[3].values[..., None, None, None]
    rows = np.indices(total.shape).reshape(5, -1).T
    assert cost.of_many(rows) == pytest.approx(total.ravel())
    assert cost.bounds() == pytest.approx((total.min(), total.max()))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    logits[0, 1] = -math.inf  # a probability of 0 has a gradient, too
    leaves = logits.softmax(1).requires_grad_()
    mean = torch.from_numpy(total)
    for row in leaves.flip(0):
        mean = mean @ row
    expected = cost.expected(dict(zip(cost.options, leaves, strict=True)))
    torch.testing.assert_close(expected, mean)
    # Probabilities sum to 1: only what one option has more than another one counts.
    got, wanted = (torch.autograd.grad(value, leaves, retain_graph=True)[0] for value in (expected, mean))
    torch.testing.assert_close(got.diff(), wanted.diff())


def test_axes_along_which_nothing_changes_are_left_out() -> None:
    """A site that runs under one of several options, whichever it is."""
    one = np.array([[2.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    cost = cost_of([(("width", "op"), one), (("width", "op"), one[::-1]), (("kernel",), np.ones(2))])
    assert [table.labels for table in cost.tables] == [("op",)]
    assert (cost.constant, cost.of({"op": "pool"})) == (4, 7)


@settings(max_examples=20, deadline=None)
@given(first=tables(), second=tables())
def test_costs_add_scale_and_change_sign(first: Tables, second: Tables) -> None:
    one, two = cost_of(first), cost_of(second)
    for architecture in itertools.islice(every_architecture(), 0, None, 5):
        assert (one + two).of(architecture) == pytest.approx(one.of(architecture) + two.of(architecture))
        assert (one * 2.5).of(architecture) == pytest.approx(2.5 * one.of(architecture))
        assert (-one).of(architecture) == -one.of(architecture)


def test_options_are_found_as_json_gives_them_back() -> None:
    cost = cost_of([(("op",), np.array([1.0, 2.0, 3.0]))])
    assert cost.of({"op": [0, 1]}) == cost.of({"op": (0, 1)}) == 6


def test_a_million_architectures_a_second() -> None:
    """A space of the default one's kind: twenty choices, half of them coupled in threes."""
    generator = np.random.default_rng(0)
    options = {f"c{i}": tuple(range(7 if i % 2 else 3)) for i in range(20)}
    labels = list(options)
    found = [tuple(labels[i : i + 3]) for i in range(0, 18, 2)]
    cost = Cost(
        options,
        0.0,
        [CostTable(at, generator.normal(size=[len(options[label]) for label in at])) for at in found],
        "ms",
    )
    rows = np.stack([generator.integers(0, len(choice), 200_000) for choice in options.values()], axis=1)
    cost.of_many(rows)
    took = []
    for _ in range(5):
        started = time.process_time()
        cost.of_many(rows)
        took.append(time.process_time() - started)
    assert 200_000 / min(took) > 1e6


@pytest.mark.parametrize(
    ("labels", "values", "match"),
    [
        (("stride",), np.zeros(2), r"must be choices of the space, \['stride'\]"),
        (("width",), np.zeros(3), r"must have the shape \(2,\), got \(3,\)"),
        (("width",), np.array([1.0, math.nan]), "must be finite"),
        (("width", "width"), np.zeros((2, 2)), "must differ"),
        (("width",), np.zeros((2, 2)), "one axis a label"),
    ],
)
def test_tables_that_do_not_fit_are_refused(labels: tuple[str, ...], values: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cost_of([(labels, values)])


def test_architectures_and_probabilities_that_do_not_fit_are_refused() -> None:
    cost = cost_of([(("width",), np.array([1.0, 2.0]))])
    with pytest.raises(ValueError, match="must name an option of 'width'"):
        cost.of({"op": "conv"})
    with pytest.raises(ValueError, match=r"'width' must be one of \(8, 16\), got 9"):
        cost.of({"width": 9})
    with pytest.raises(ValueError, match="probabilities of 'width' are missing"):
        cost.expected({})
    with pytest.raises(ValueError, match=r"'width' needs probabilities of shape \(2,\)"):
        cost.expected({"width": torch.ones(3)})
    with pytest.raises(ValueError, match="'width' must lie in 0 to 1, got 0 to 2"):
        cost.of_many(np.array([[0, 2, 0, 0], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"must have the shape \(architectures, 4\)"):
        cost.of_many(np.array([[0, 1]]))
    with pytest.raises(ValueError, match="must be integers"):
        cost.of_many(np.zeros((1, 4)))  # type: ignore[arg-type]


def test_costs_of_two_units_or_spaces_do_not_add() -> None:
    with pytest.raises(ValueError, match="one unit to be added, got 'ms' and 'MAC'"):
        cost_of([]) + Cost(OPTIONS, 0.0, [], "MAC")
    with pytest.raises(ValueError, match="one space to be added"):
        cost_of([]) + Cost({"other": (1,)}, 0.0, [], "ms")
