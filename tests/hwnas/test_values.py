from __future__ import annotations

import copy
import json
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import (
    Gate,
    ModelSpace,
    ValueChoice,
    case,
    condition,
    maximum,
    minimum,
    to_float,
    to_int,
)
from hwnas.values import Value, as_value, outcomes


class Reads(nn.Module):
    """Reads a value in its forward pass and returns it."""

    def __init__(self, value: Any, read: Callable[[Any], Any] = int) -> None:
        super().__init__()
        self.value = value
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.value)


operators = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.eq,
    operator.ne,
    maximum,
    minimum,
    lambda a, b: maximum([a, b, 5]),
    lambda a, b: minimum(a, b, 5),
    lambda a, b: condition(a > b, a - b, b),
    lambda a, b: condition((a + b) % 2, b, -1),  # a number as a predicate, as in `if`
    lambda a, b: to_int(a / b),
    lambda a, b: to_float(a * b),
    lambda a, b: -a + b,
    lambda a, b: round(a / b),
    lambda a, b: round(a / b, 1),
    lambda a, b: math.floor(a / b) + math.ceil(a / b),
    lambda a, b: case(a > b, {True: a, False: b * 2}),
]


@given(st.sampled_from(operators), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_arithmetic_on_values_is_arithmetic_on_their_options(op: Any, a: int, b: int, constant: int) -> None:
    left, right = ValueChoice([a], label="a"), ValueChoice([b], label="b")
    for value, expected in (
        (op(left, right), op(a, b)),
        (op(left, constant), op(a, constant)),
        (op(constant, left), op(constant, a)),
    ):
        assert isinstance(value, Value)
        assert value.of({"a": a, "b": b}) == expected
        assert type(value.of({"a": a, "b": b})) is type(expected)


def test_all_values_are_listed_once_in_the_order_of_the_options() -> None:
    width = ValueChoice([3, 2, 1], label="width")
    assert (width // 2).all() == (1, 0)
    assert (width + width).all() == (6, 4, 2)


def test_two_objects_with_one_label_are_one_decision() -> None:
    first, second = ValueChoice([1, 2], label="width"), ValueChoice([1, 2], label="width")
    assert outcomes({"a": first, "b": second * 10}) == [{"a": 1, "b": 10}, {"a": 2, "b": 20}]
    assert (first - second).all() == (0,)
    space = ModelSpace(nn.ModuleList([Reads(first), Reads(second)]))
    assert dict(space.options) == {"width": (1, 2)}


def test_values_without_labels_are_decisions_of_their_own() -> None:
    assert len(outcomes({"a": ValueChoice([1, 2]), "b": ValueChoice([1, 2])})) == 4


@pytest.mark.parametrize(
    ("options", "read", "results"),
    [
        ([1, 2], int, [1, 2]),
        ([0.25, 0.5], float, [0.25, 0.5]),
        ([1, 3], lambda value: list(range(value)), [[0], [0, 1, 2]]),
        ([1, 2], lambda value: torch.arange(4)[:value].tolist(), [[0], [0, 1]]),
        ([1, 2], lambda value: torch.arange(4)[value].item(), [1, 2]),
        ([1, 2], lambda value: torch.zeros(value, 4).view(4, value).shape, [(4, 1), (4, 2)]),
        ([3, 5], lambda value: "three" if value == 3 else "other", ["three", "other"]),
        ([3, 5], lambda value: bool(value != 3 and value > 4), [False, True]),
        ([0, 2], lambda value: "some" if value else "none", ["none", "some"]),
    ],
)
def test_value_reads_alike_before_and_after_freezing(options: Any, read: Any, results: list[Any]) -> None:
    space = ModelSpace(Reads(ValueChoice(options, label="c"), read))
    x = torch.zeros(1)
    for option, expected in zip(options, results, strict=True):
        with space.running(space.gates_of({"c": option})):
            assert read(option) == expected
            assert space(x) == expected
        subnet = space.freeze({"c": option})
        assert type(subnet.value) is type(option)
        assert subnet(x) == expected


def test_value_read_outside_of_its_space_says_where_it_is_decided() -> None:
    network = Reads(ValueChoice([1, 2], label="c"))
    space = ModelSpace(network)
    space(torch.zeros(1))
    with pytest.raises(
        RuntimeError, match="ValueChoice 'c' is decided only while its space runs: call the Mod"
    ):
        network(torch.zeros(1))
    with pytest.raises(RuntimeError, match="a ValueChoice without a label is decided only while"):
        int(ValueChoice([1, 2]))


@pytest.mark.parametrize("build", [lambda c: nn.Conv2d(3, c, 3), nn.Dropout])
def test_value_as_argument_of_torch_nn_points_to_hwnas_nn(build: Callable[[Any], nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"argument of operations in hwnas\.nn, not of those in torch\.nn"):
        build(ValueChoice([8, 16], label="width"))


def test_value_read_as_a_number_under_mixing_weights_is_refused() -> None:
    space = ModelSpace(Reads(ValueChoice([1, 2], label="c")))
    with (
        space.running({"c": Gate((0, 1), torch.tensor([0.5, 0.5]))}),
        pytest.raises(RuntimeError, match=r"'c' is read as a plain number, but .* mixes .*hwnas.nn"),
    ):
        space(torch.zeros(1))


def test_lists_as_json_has_them_become_tuples() -> None:
    assert ValueChoice([[3, 5], [[1, 2], 7]], label="c").options == ((3, 5), ((1, 2), 7))


@pytest.mark.parametrize("options", [[], [1, 1], [[1, 2], (1, 2)], [math.nan, 1.0]])
def test_options_must_be_some_and_different(options: list[Any]) -> None:
    with pytest.raises(
        ValueError, match="ValueChoice 'c' needs at least one option, no two equal and none nan; got"
    ):
        ValueChoice(options, label="c")


@pytest.mark.parametrize("options", [np.arange(2, 6, 2), torch.tensor([2, 4]), [np.int64(2), np.float32(4)]])
def test_numbers_of_numpy_and_torch_become_plain(options: Any) -> None:
    choice = ValueChoice(options, label="width")
    assert choice.options == (2, 4)
    assert json.loads(json.dumps(choice.options)) == [2, 4]
    assert ValueChoice(np.array([[3, 1], [1, 3]]), label="kernel").options == ((3, 1), (1, 3))


@pytest.mark.parametrize("option", [nn.ReLU, object(), {1: 2}, (1, torch.relu)])
def test_options_that_no_file_can_hold_are_refused(option: Any) -> None:
    with pytest.raises(ValueError, match="options of ValueChoice 'act' are plain data"):
        ValueChoice([option], label="act")


def test_value_prints_as_its_formula() -> None:
    value = (ValueChoice([1, 2], label="k") - 1) // 2
    assert repr(value) == "((ValueChoice([1, 2], label='k') - 1) // 2)"


def test_result_that_is_not_selected_is_not_computed() -> None:
    count = ValueChoice([0, 2], label="count")
    assert condition(count > 0, 8 // count, 1).all() == (1, 4)
    assert case(count, {0: 1, 2: 8 // count}).all() == (1, 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (maximum(3, 4), 4),
        (minimum([3, 4]), 3),
        (condition(False, 3, 4), 4),
        (case("a", {"a": 1, "b": 2}), 1),
        (to_int(2.5), 2),
        (to_float(2), 2.0),
        (as_value((3, 1)), (3, 1)),
    ],
)
def test_functions_of_plain_numbers_are_plain(value: Any, expected: Any) -> None:
    assert value == expected
    assert type(value) is type(expected)


def test_case_by_the_option_of_a_choice() -> None:
    kind, width = ValueChoice(["small", [1, 2]], label="kind"), ValueChoice([8, 16], label="width")
    value = case(kind, {"small": 4, (1, 2): width * 2, "unused": 0})
    assert value.of({"kind": "small", "width": 16}) == 4
    assert value.of({"kind": (1, 2), "width": 16}) == 32
    assert [leaf.label for leaf in value.leaves()] == ["kind", "width"]


@pytest.mark.parametrize("selector", [ValueChoice([1, 2, 3], label="c"), 3])
def test_option_without_a_result_is_named(selector: Any) -> None:
    with pytest.raises(ValueError, match=r"case needs a result for every option of .*; missing: .*3\]"):
        case(selector, {1: 1})


def test_tuple_that_holds_values_is_a_value() -> None:
    kernel = ValueChoice([3, (5, 1)], label="kernel")
    value = as_value([1, kernel, (kernel, 2)])
    assert value.all() == ((1, 3, (3, 2)), (1, (5, 1), ((5, 1), 2)))
    assert condition(kernel == 3, (1, kernel), 0).all() == ((1, 3), 0)
    assert repr(as_value((1, ValueChoice([2], label="c")))) == "(1, ValueChoice([2], label='c'))"


@pytest.mark.parametrize(
    "read",
    [
        lambda v: int(maximum(v, 4)),
        lambda v: int(condition(v > 3, v, 1)),
        lambda v: int(case(v, {3: 7, 5: 9})),
        lambda v: float(v / 2),
    ],
)
def test_functions_in_forward_read_alike_before_and_after_freezing(read: Callable[[Any], Any]) -> None:
    space = ModelSpace(Reads(ValueChoice([3, 5], label="c"), read))
    for option in (3, 5):
        with space.running(space.gates_of({"c": option})):
            found = space(torch.zeros(1))
        assert found == read(option) == space.freeze({"c": option})(torch.zeros(1))


def test_every_value_survives_pickling_and_copying() -> None:
    width = ValueChoice([3, 5], label="width")
    value = condition(width > 3, maximum(width, 4) / 2, case(width, {3: round(-width * 0.4), 5: 1}))
    value = as_value((value, to_int(width), width % 2))
    for copied in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert copied.of({"width": 5}) == (2.5, 5, 1)
        assert repr(copied) == repr(value)


def test_comparing_values_while_a_network_is_built_points_to_the_functions() -> None:
    with pytest.raises(
        RuntimeError, match=r"decided only while its space runs.*hwnas\.condition, case, maxi"
    ):
        max(ValueChoice([1, 2], label="c"), 1)
