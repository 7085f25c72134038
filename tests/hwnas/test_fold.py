from __future__ import annotations

import itertools
import operator
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hwnas import Gate, ValueChoice
from hwnas.fold import Fold
from hwnas.values import Expression, combinations, outcomes, weights_of
from profilers import Cost, CostTable


def digits() -> list[ValueChoice]:
    return [ValueChoice(options, label=f"d{i}") for i, options in enumerate([(1, 2), (0, 3, 4), (5, 7)])]


def total_modulo(choices: list[ValueChoice]) -> Fold:
    """The sum of the choices and of a fixed 6, modulo 5, as a name."""
    fixed = Expression("6", partial(int, 6), ())
    steps: list[Any] = [(choice, _add) for choice in choices]
    return Fold("rest", 0, [*steps[:1], (fixed, _add), *steps[1:]], "r{}".format)


def _add(state: int, option: int) -> int:
    return (state + option) % 5


def every(choices: list[ValueChoice]) -> list[dict[str, Any]]:
    names = [choice.name() for choice in choices]
    return [
        dict(zip(names, found, strict=True)) for found in itertools.product(*(c.options for c in choices))
    ]


def expected(architecture: dict[str, int]) -> str:
    return f"r{(sum(architecture.values()) + 6) % 5}"


def test_it_is_what_its_steps_come_to() -> None:
    fold = total_modulo(choices := digits())
    found = [fold.of(architecture) for architecture in every(choices)]
    assert found == [expected(architecture) for architecture in every(choices)]
    assert set(fold.options) == set(found)
    assert pickle.loads(pickle.dumps(fold)).options == fold.options
    assert [fold.of({fold.name(): option}) for option in fold.options] == list(fold.options)


def test_each_option_follows_from_its_example() -> None:
    fold = total_modulo(digits())
    assert [fold.of(fold.example(option)) for option in fold.options] == list(fold.options)


def test_what_it_implies_is_a_chain_of_small_tables() -> None:
    fold = total_modulo(choices := digits())
    worth = np.arange(1.0, len(fold.options) + 1)
    options = {choice.name(): choice.options for choice in choices}
    cost = Cost(options, 0.0, [CostTable((fold.name(),), worth)], "ms", fold.implied())
    for architecture in every(choices):
        assert cost.of(architecture) == worth[fold.options.index(expected(architecture))]
    assert max(link.numbers.size for link in fold.implied()) <= 5 * 3


def test_under_mixing_weights_its_options_are_as_likely_as_their_combinations() -> None:
    fold = total_modulo(choices := digits())
    rows = [torch.rand(len(choice.options), dtype=torch.double).requires_grad_() for choice in choices]
    for choice, row in zip(choices, rows, strict=True):
        choice.gate = Gate(tuple(range(len(row))), row / row.sum())
    found = combinations({"rest": fold})
    assert len(found) == len(fold.options) < len(every(choices))
    weights = weights_of(found)
    chances: dict[str, Tensor] = {}
    for indices in itertools.product(*(range(len(row)) for row in rows)):
        name = expected({str(i): choices[i].options[index] for i, index in enumerate(indices)})
        chance = torch.stack([(rows[i] / rows[i].sum())[index] for i, index in enumerate(indices)]).prod()
        chances[name] = chances.get(name, torch.zeros(())) + chance
    wanted = torch.stack([chances[one.values["rest"]] for one in found])
    torch.testing.assert_close(weights, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(weights[0], rows, retain_graph=True),
        torch.autograd.grad(wanted[0], rows),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_of_one_path_it_has_one_option_and_of_two_of_each_what_these_reach() -> None:
    fold = total_modulo(choices := digits())
    for choice in choices:
        choice.gate = Gate((1,))
    assert [one.values["rest"] for one in combinations({"rest": fold})] == [expected({"": 2 + 3 + 7})]
    choices[1].gate = Gate((1, 2), torch.tensor([0.0, 0.5, 0.5]), run=(1, 2))
    reached = {one.values["rest"] for one in combinations({"rest": fold})}
    assert reached == {expected({"": 2 + 3 + 7}), expected({"": 2 + 4 + 7})}


def test_it_is_one_term_of_a_value_unless_its_choices_stand_beside_it() -> None:
    fold = total_modulo(choices := digits())
    longer = Expression("{} {}", operator.add, (fold, "!"))
    assert longer.terms() == (fold,)
    assert set(longer.all()) == {f"{option}!" for option in fold.options}
    beside = {"rest": fold, "first": choices[0]}
    joint = [(one["rest"], one["first"]) for one in outcomes(beside)]
    assert joint == [(expected(found), found["d0"]) for found in every(choices)]


def test_a_step_of_several_choices_is_refused() -> None:
    first, second, _ = digits()
    with pytest.raises(ValueError, match=r"each step of a Fold depends on one choice, .* on 2"):
        Fold("sum", 0, [(first + second, _add)], int)
