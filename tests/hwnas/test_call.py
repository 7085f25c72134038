from __future__ import annotations

import inspect
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hwnas import ValueChoice
from hwnas.call import Call

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def through_json(call: Call) -> Call:
    return Call.from_json(json.loads(json.dumps(call.to_json())))


@given(st.dictionaries(st.text(), plain, max_size=3))
def test_arguments_come_back_from_json_as_they_were(arguments: dict[str, Any]) -> None:
    call = Call("builtins:dict", arguments)
    back = through_json(call)
    assert back == call
    assert repr(back.arguments) == repr(arguments)  # tuples stay tuples and lists lists
    assert pickle.loads(pickle.dumps(call)) == call


def test_calls_among_the_arguments_are_made_first() -> None:
    inner = Call("torch.nn:Linear", {"in_features": 2, "out_features": 3})
    made = through_json(Call("builtins:dict", {"a": [inner, (1, inner)], "b": {"c": inner}}))()
    assert [type(made["a"][0]), type(made["a"][1][1]), type(made["b"]["c"])] == [nn.Linear] * 3


def test_what_is_given_at_the_call_joins_the_arguments() -> None:
    assert Call("builtins:dict", {"b": 2})([("a", 1)], c=3) == {"a": 1, "b": 2, "c": 3}


def test_an_architecture_decides_choices_wherever_they_stand() -> None:
    lr, size = ValueChoice([0.1, 0.2], label="lr"), ValueChoice([(1, 2), (3, 4)], label="size")
    call = Call("builtins:dict", {"lr": lr, "data": Call("builtins:dict", {"sizes": [size]})})
    assert [choice.label for choice in call.choices()] == ["lr", "size"]
    with pytest.raises(ValueError, match=r"label='lr'\) is not decided yet: call.under"):
        call()
    for form in (call, through_json(call)):
        assert form.under({"lr": 0.2, "size": (3, 4)})() == {"lr": 0.2, "data": {"sizes": [(3, 4)]}}


def test_calls_are_equal_where_what_they_do_is() -> None:
    def call(rate: float, target: str = "builtins:dict") -> Call:
        return Call(target, {"lr": ValueChoice([0.1, rate], label="lr")})

    assert call(0.2) == call(0.2)
    assert hash(call(0.2)) == hash(call(0.2))
    assert call(0.2) != call(0.3)
    assert call(0.2) != call(0.2, "builtins:list")
    assert Call("builtins:dict", {"a": (1,)}) != Call("builtins:dict", {"a": [1]})


def test_a_call_has_the_signature_of_its_target() -> None:
    assert "label" in inspect.signature(Call("hwnas:ValueChoice", {"options": [1]})).parameters


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (nn.ReLU(), r"got ReLU at 'it'\[1\]\['x'\]. Give a Call that makes it"),
        (ValueChoice([1, 2]), r"a ValueChoice with a label; got .* at 'it'\[1\]\['x'\]"),
        (ValueChoice([1, 2], label="n") * 2, r"leave arithmetic to what is called"),
        ({1: 2}, r"strings as keys.*got \[1\]"),
        ({"tuple": []}, r"not exactly the keys .*\['tuple'\]; got \['tuple'\]"),
    ],
)
def test_what_cannot_be_written_down_is_refused_with_its_place(argument: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Call("builtins:dict", {"it": [0, {"x": argument}]})


def test_a_target_is_a_module_and_an_attribute() -> None:
    with pytest.raises(ValueError, match="as module:attribute; got 'dict'"):
        Call("dict")
    with pytest.raises(ValueError, match="call 'no_such:thing' cannot be imported"):
        Call("no_such:thing")()
    with pytest.raises(ValueError, match="a call has 'call' and 'arguments'; got"):
        Call.from_json({"call": "builtins:dict"})
