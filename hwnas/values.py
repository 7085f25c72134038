"""Numbers that are decided by the search: `ValueChoice` and arithmetic on it."""

from __future__ import annotations

import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from hwnas.freezing import Freezer, Freezes, contents
from hwnas.gate import Gate
from profilers.space import Option


class Value(Freezes, ABC):
    """A number (or name, or tuple) that depends on value choices.

    In ``forward`` it is read as ``int(value)`` or ``float(value)``, which is as valid on the plain number
    that stands there after freezing.
    """

    @abstractmethod
    def leaves(self) -> tuple[ValueChoice, ...]:
        """The value choices that it depends on, each once."""

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """What it is computed from, no choice behind two: its leaves, or what is folded of them."""

    @abstractmethod
    def at(self, assignment: Mapping[int, Option]) -> Any:
        """The value where each leaf (or each term), named by ``id``, has the given option."""

    def of(self, architecture: Mapping[str, Option]) -> Any:
        """The value under an architecture, which may have options of terms in place of their leaves."""
        return self.at({id(term): term.read(architecture) for term in self.terms()})

    def all(self) -> tuple[Any, ...]:
        """Every value that it can take, without repetition, in the order of the options."""
        return tuple(dict.fromkeys(outcome["value"] for outcome in outcomes({"value": self})))

    def now(self) -> Any:
        """The value in this forward pass.

        Raises:
            RuntimeError: outside a forward pass of the space, or under mixing weights, where there is
                no single value.
        """
        assignment = {}
        for leaf in self.leaves():
            gate = leaf.installed()
            if gate.weights is not None:
                raise RuntimeError(
                    f"ValueChoice '{leaf.name()}' is read as a plain number, but the strategy mixes its "
                    f"options {leaf.options}; use it as an argument of an operation in hwnas.nn, or "
                    "search with a strategy that runs one path (RandomOneShot, ENAS)"
                )
            assignment[id(leaf)] = leaf.options[gate.picked[0]]
        return self.at(assignment)

    def frozen(self, freezer: Freezer) -> Any:
        return self.of(freezer.architecture)

    def __getstate__(self) -> dict[str, Any]:
        return {name: held for name, held in vars(self).items() if name != _JOINTS}

    def __int__(self) -> int:
        return int(self.now())

    def __index__(self) -> int:
        return operator.index(self.now())

    def __float__(self) -> float:
        return float(self.now())

    def __bool__(self) -> bool:
        # `if self.c:` on an unread choice would be true whatever is chosen.
        return bool(self.now())

    def __add__(self, other: Operand) -> Value:
        return Expression("({} + {})", operator.add, (self, other))

    def __radd__(self, other: Operand) -> Value:
        return Expression("({} + {})", operator.add, (other, self))

    def __sub__(self, other: Operand) -> Value:
        return Expression("({} - {})", operator.sub, (self, other))

    def __rsub__(self, other: Operand) -> Value:
        return Expression("({} - {})", operator.sub, (other, self))

    def __mul__(self, other: Operand) -> Value:
        return Expression("({} * {})", operator.mul, (self, other))

    def __rmul__(self, other: Operand) -> Value:
        return Expression("({} * {})", operator.mul, (other, self))

    def __truediv__(self, other: Operand) -> Value:
        return Expression("({} / {})", operator.truediv, (self, other))

    def __rtruediv__(self, other: Operand) -> Value:
        return Expression("({} / {})", operator.truediv, (other, self))

    def __floordiv__(self, other: Operand) -> Value:
        return Expression("({} // {})", operator.floordiv, (self, other))

    def __rfloordiv__(self, other: Operand) -> Value:
        return Expression("({} // {})", operator.floordiv, (other, self))

    def __mod__(self, other: Operand) -> Value:
        return Expression("({} % {})", operator.mod, (self, other))

    def __rmod__(self, other: Operand) -> Value:
        return Expression("({} % {})", operator.mod, (other, self))

    def __neg__(self) -> Value:
        return Expression("-{}", operator.neg, (self,))

    def __round__(self, digits: int | None = None) -> Value:
        if digits is None:
            return Expression("round({})", round, (self,))
        return Expression("round({}, {})", round, (self, digits))

    def __floor__(self) -> Value:
        return Expression("floor({})", math.floor, (self,))

    def __ceil__(self) -> Value:
        return Expression("ceil({})", math.ceil, (self,))

    # No __getitem__: it would make a sequence of a value, which torch then refuses as an index (`x[value]`).

    def __lt__(self, other: Operand) -> Value:
        return Expression("({} < {})", operator.lt, (self, other))

    def __le__(self, other: Operand) -> Value:
        return Expression("({} <= {})", operator.le, (self, other))

    def __gt__(self, other: Operand) -> Value:
        return Expression("({} > {})", operator.gt, (self, other))

    def __ge__(self, other: Operand) -> Value:
        return Expression("({} >= {})", operator.ge, (self, other))

    # Comparing objects, `if self.kernel == 3:` would be false in the space and true in its subnet.
    def __eq__(self, other: object) -> Value:  # type: ignore[override]  # a value, read by `if`
        return Expression("({} == {})", operator.eq, (self, other))

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return Expression("({} != {})", operator.ne, (self, other))

    __hash__ = object.__hash__


Operand = Any  # a value, or what an option of the other operand can be combined with


class Term(Protocol):
    """What values are computed from: a `ValueChoice`, or a `hwnas.fold.Fold` of several."""

    @property
    def options(self) -> tuple[Option, ...]: ...

    @property
    def label(self) -> str | None: ...

    def leaves(self) -> tuple[ValueChoice, ...]: ...

    def read(self, architecture: Mapping[str, Option]) -> Option:
        """Its option under an architecture."""
        ...

    def installed(self) -> Gate:
        """The gate of this forward pass. Raises ``RuntimeError`` outside of one."""
        ...


@final
class ValueChoice(Value):
    """One named decision between plain values.

    Args:
        options: at least one number, string or tuple; no two equal.
        label: equal labels are one decision. Without one, the choice is named after the first place in
            the network that holds it.

    >>> width = ValueChoice([16, 24, 32], label="width")
    >>> (width * 6).all()
    (96, 144, 192)
    """

    def __init__(self, options: Iterable[Option], label: str | None = None) -> None:
        self.options: tuple[Option, ...] = tuple(map(as_option, options))
        self.label = label
        self.gate: Gate | None = None
        for option in self.options:
            if not _is_plain(option):
                raise ValueError(
                    f"options of {described('ValueChoice', label)} are plain data, as JSON has it: numbers, "
                    f"strings, None and tuples of them; got {option!r}. Choose between names, and let "
                    "hwnas.case or a dictionary in forward say what each stands for"
                )
        has_nan = any(option != option for option in self.options)  # equal to nothing, not even itself
        if not self.options or has_nan or len(set(self.options)) != len(self.options):
            raise ValueError(
                f"{described('ValueChoice', label)} needs at least one option, no two equal and none nan; "
                f"got {list(self.options)}"
            )

    def name(self) -> str:
        """The label. Raises ``RuntimeError`` before a space has given one."""
        return named(self.label, "ValueChoice", self.options)

    def installed(self) -> Gate:
        """The gate of this forward pass. Raises ``RuntimeError`` outside of one."""
        return installed(self.gate, "ValueChoice", self.label)

    def leaves(self) -> tuple[ValueChoice, ...]:
        return (self,)

    def terms(self) -> tuple[Term, ...]:
        return (self,)

    def read(self, architecture: Mapping[str, Option]) -> Option:
        """Its option under an architecture."""
        return architecture[self.name()]

    def at(self, assignment: Mapping[int, Option]) -> Option:
        return assignment[id(self)]

    def __repr__(self) -> str:
        return f"ValueChoice({list(self.options)}, label={self.label!r})"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Expression(Value):
    """Arithmetic on values: ``width * 6``, ``(kernel - 1) // 2``.

    Attributes:
        template: how it prints, with ``{}`` for each operand.
        function: of plain values; a space is pickled with it, so not a lambda.
        operands: values and plain ones; tuples may hold both.
    """

    template: str
    function: Callable[..., Any]
    operands: tuple[Operand, ...]

    def leaves(self) -> tuple[ValueChoice, ...]:
        return _leaves_in(self.operands)

    def terms(self) -> tuple[Term, ...]:
        return terms_of(values_in(self.operands))

    def at(self, assignment: Mapping[int, Option]) -> Any:
        return self.function(*_plain(self.operands, assignment))

    def __repr__(self) -> str:
        return self.template.format(*map(repr, self.operands))


@final
@dataclass(frozen=True, eq=False, repr=False)
class Case(Value):
    """One of several results, by a selector; those that are not selected are not computed."""

    selector: Value
    results: tuple[tuple[Option, Operand], ...]

    def leaves(self) -> tuple[ValueChoice, ...]:
        return _leaves_in((self.selector, *(result for _, result in self.results)))

    def terms(self) -> tuple[Term, ...]:
        return terms_of([self.selector, *values_in([result for _, result in self.results])])

    def at(self, assignment: Mapping[int, Option]) -> Any:
        selected = self.selector.at(assignment)
        return next(_plain(result, assignment) for option, result in self.results if option == selected)

    def __repr__(self) -> str:
        return f"case({self.selector!r}, {dict(self.results)!r})"


def maximum(*values: Operand) -> Any:
    """The largest of several numbers, values among them; or of one list of them.

    A value where one is among them, else the plain number. So do all functions here, so that code which
    uses them is as valid in a subnet as in its space.

    >>> maximum(ValueChoice([4, 16], label="width") // 4, 2).all()
    (2, 4)
    """
    return _applied("maximum({})", max, _listed(values))


def minimum(*values: Operand) -> Any:
    """The smallest of several numbers, values among them; or of one list of them.

    >>> minimum(ValueChoice([4, 16], label="width"), 8).all()
    (4, 8)
    """
    return _applied("minimum({})", min, _listed(values))


def condition(predicate: Operand, true: Operand, false: Operand) -> Any:
    """``true`` where the predicate holds, else ``false``; the other one is not computed.

    >>> kernel = ValueChoice([3, 5], label="kernel")
    >>> condition(kernel > 3, kernel * 2, 1).all()
    (1, 10)
    """
    if not isinstance(predicate, Value):
        return true if predicate else false
    return Case(Expression("{}", bool, (predicate,)), ((True, true), (False, false)))


def case(selector: Operand, results: Mapping[Option, Operand]) -> Any:
    """The result that belongs to the selector's option; the others are not computed.

    Args:
        selector: a value, usually a choice between names.
        results: one for each option; plain ones or values.

    Raises:
        ValueError: an option without a result.

    >>> size = ValueChoice(["small", "large"], label="size")
    >>> case(size, {"small": 16, "large": 32}).all()
    (16, 32)
    """
    given = {as_option(option): result for option, result in results.items()}
    options = selector.all() if isinstance(selector, Value) else (as_option(selector),)
    missing = [option for option in options if option not in given]
    if missing:
        raise ValueError(f"case needs a result for every option of {selector!r}; missing: {missing}")
    return Case(selector, tuple(given.items())) if isinstance(selector, Value) else given[options[0]]


def to_int(value: Operand) -> Any:
    """``int(value)`` that may be given before the value is decided: rounds towards zero.

    >>> to_int(ValueChoice([0.5, 1.0], label="ratio") * 48).all()
    (24, 48)
    """
    return _applied("to_int({})", int, (value,))


def to_float(value: Operand) -> Any:
    """``float(value)`` that may be given before the value is decided."""
    return _applied("to_float({})", float, (value,))


def as_value(thing: Any) -> Any:
    """A list or tuple that holds values as one value; anything else as it is.

    >>> as_value((ValueChoice([3, 5], label="kernel"), 1)).all()
    ((3, 1), (5, 1))
    """
    if isinstance(thing, list | tuple) and next(values_in(thing), None) is not None:
        return Expression("{}", _same, (tuple(thing),))
    return thing


def _listed(values: tuple[Operand, ...]) -> tuple[Operand, ...]:
    return tuple(values[0]) if len(values) == 1 and not isinstance(values[0], Value) else values


def _applied(template: str, function: Callable[..., Any], operands: tuple[Operand, ...]) -> Any:
    """The function of the operands: a value if one of them is, else its result."""
    if not any(isinstance(operand, Value) for operand in operands):
        return function(*operands)
    return Expression(template.format(", ".join("{}" for _ in operands)), function, operands)


def _same(thing: Any) -> Any:
    return thing


def _plain(operand: Operand, assignment: Mapping[int, Option]) -> Any:
    """The operand with a plain value wherever it holds one that is decided."""
    if isinstance(operand, Value):
        return operand.at(assignment)
    if isinstance(operand, list | tuple):
        return tuple(_plain(item, assignment) for item in operand)
    return operand


def _leaves_in(operands: tuple[Operand, ...]) -> tuple[ValueChoice, ...]:
    leaves = (leaf for value in values_in(operands) for leaf in value.leaves())
    return tuple({id(leaf): leaf for leaf in leaves}.values())


def terms_of(values: Iterable[Value]) -> tuple[Term, ...]:
    """What several values are computed from, no choice behind two terms: else the leaves themselves."""
    terms = tuple({id(term): term for value in values for term in value.terms()}.values())
    # Terms of one label are one decision.
    behind = {_key(term): {_key(leaf) for leaf in term.leaves()} for term in terms}
    if len(set().union(*behind.values())) == sum(map(len, behind.values())):
        return terms
    return tuple({id(leaf): leaf for term in terms for leaf in term.leaves()}.values())


def _key(term: Term) -> str | int:
    return id(term) if term.label is None else term.label


def as_option(option: Any) -> Option:
    """The option as plain, hashable data: lists, as JSON has them, become tuples, and numbers of numpy plain.

    >>> as_option([[3, 5], 1])
    ((3, 5), 1)
    """
    if isinstance(option, np.generic | np.ndarray | Tensor):
        option = option.tolist()  # of what is one number: that number
    return tuple(map(as_option, option)) if isinstance(option, list | tuple) else option


def _is_plain(option: object) -> bool:
    if isinstance(option, tuple):
        return all(map(_is_plain, option))
    return option is None or isinstance(option, bool | int | float | str)


def described(kind: str, label: str | None) -> str:
    """``LayerChoice 'op'``, or ``a LayerChoice without a label``."""
    return f"a {kind} without a label" if label is None else f"{kind} '{label}'"


def named(label: str | None, kind: str, options: Sequence[Option]) -> str:
    """The label of a choice. Raises ``RuntimeError`` where it has none yet."""
    if label is None:
        raise RuntimeError(
            f"the {kind} over {list(options)} has no label yet: give it one, or build a ModelSpace "
            "around the network that holds it, which names it after its place"
        )
    return label


def installed(gate: Gate | None, kind: str, label: str | None) -> Gate:
    """The gate of this forward pass. Raises ``RuntimeError`` outside of one."""
    if gate is None:
        raise RuntimeError(
            f"{described(kind, label)} is decided only while its space runs: call the ModelSpace, not the "
            "network inside it (or the subnet that space.freeze(architecture) returns). While a network is "
            "built, it can be an argument of operations in hwnas.nn, not of those in torch.nn; compare and "
            "convert it there by hwnas.condition, case, maximum, minimum, to_int and to_float"
        )
    return gate


@dataclass(frozen=True)
class Combination:
    """One joint outcome of several values in this forward pass.

    Attributes:
        values: each name with its value.
        factors: the mixing weights behind it, as vectors with a place; none where nothing is mixed.
        is_picked: every option behind it is one that receives gradients.
    """

    values: Mapping[str, Any]
    factors: tuple[tuple[Tensor, int], ...]
    is_picked: bool

    @property
    def is_mixed(self) -> bool:
        return bool(self.factors)

    @property
    def weight(self) -> Tensor:
        """Product of the mixing weights, a scalar; only where something is mixed."""
        first, *others = (weights[index] for weights, index in self.factors)
        return math.prod(others, start=first)


def combinations(values: Mapping[str, Value]) -> tuple[Combination, ...]:
    """Every joint outcome that the installed gates compute; one where nothing is mixed."""
    joint = _joint_of(values)
    gates = joint.installed()
    if not joint.is_of(gates):
        joint.gates, joint.combinations = gates, _combinations(joint, gates)
    return joint.combinations


def live_options(values: Mapping[str, Value]) -> tuple[tuple[int, ...], ...]:
    """Which options the installed gates compute, of each decision behind the values."""
    return tuple(gate.live() for gate in _joint_of(values).installed())


def _combinations(joint: _Joint, gates: Sequence[Gate]) -> tuple[Combination, ...]:
    mixed = [  # one option alone is no mixture
        (place, gate.weights)
        for place, gate in enumerate(gates)
        if gate.weights is not None and gate.weights.numel() > 1
    ]
    found = []
    for indices in itertools.product(*(gate.live() for gate in gates)):
        factors = tuple((weights, indices[place]) for place, weights in mixed)
        is_picked = all(index in gate.picked for gate, index in zip(gates, indices, strict=True))
        found.append(Combination(joint.outcome(indices), factors, is_picked))
    return tuple(found)


def weights_of(found: Sequence[Combination]) -> Tensor:
    """The mixing weight of each of several outcomes that are mixed, shape ``(outcomes,)``."""
    if len(found[0].factors) == 1:  # of one choice: its own weights, as a rule all of them
        weights = found[0].factors[0][0]
        places = [combination.factors[0][1] for combination in found]
        return weights if places == list(range(len(weights))) else weights[places]
    return torch.stack([combination.weight for combination in found])


def outcomes(values: Mapping[str, Value]) -> list[Mapping[str, Any]]:
    """Every joint outcome of several values, whatever the gates are."""
    joint = _Joint(values)
    every = itertools.product(*(range(len(terms[0].options)) for terms in joint.decisions))
    return [joint.outcome(indices) for indices in every]


class _Joint:
    """Several values together.

    Attributes:
        decisions: the terms behind them, those that are one decision (one object, or one label) together.
        gates: of the decisions, when `combinations` was asked for the last time; layers of one width ask
            for the same.
        combinations: what these gates compute.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)
        found: dict[str | int, dict[int, Term]] = {}
        for term in terms_of(values.values()):
            found.setdefault(_key(term), {})[id(term)] = term
        self.decisions = [list(terms.values()) for terms in found.values()]
        self._outcomes: dict[tuple[int, ...], Mapping[str, Any]] = {}
        self.gates: Sequence[Gate] = ()
        self.combinations: tuple[Combination, ...] = ()

    def installed(self) -> list[Gate]:
        """The gates of the decisions in this forward pass."""
        return [terms[0].installed() for terms in self.decisions]

    def is_of(self, gates: Sequence[Gate]) -> bool:
        """Whether the combinations are those of these very gates."""
        return bool(self.combinations) and all(map(operator.is_, self.gates, gates))

    def outcome(self, indices: tuple[int, ...]) -> Mapping[str, Any]:
        """Each name with its value, where each decision takes the option of its index."""
        if indices not in self._outcomes:
            if len(self._outcomes) >= _MOST_KNOWN:
                self._outcomes.clear()
            assignment = {
                id(term): term.options[index]
                for terms, index in zip(self.decisions, indices, strict=True)
                for term in terms
            }
            self._outcomes[indices] = {name: value.at(assignment) for name, value in self._values.items()}
        return self._outcomes[indices]


# The attribute of a value that holds what is known of it and others together. A search asks the same of the
# same values in every step, and to work it out anew is a twentieth of a step of DARTS.
_JOINTS = "_joints"
_MOST_KNOWN = 4096  # outcomes of each


def _joint_of(values: Mapping[str, Value]) -> _Joint:
    if not values:
        return _Joint(values)
    joints = vars(next(iter(values.values()))).setdefault(_JOINTS, {})
    key = tuple((name, id(value)) for name, value in values.items())  # they live as long as their joint
    if key not in joints:
        joints[key] = _Joint(values)
    known: _Joint = joints[key]
    return known


def values_in(thing: object) -> Iterator[Value]:
    """The values that an attribute holds, itself or inside lists, tuples, dictionaries and dataclasses.

    Raises:
        TypeError: a set of values, which has no order that names and options could follow.
    """
    for _, found in contents(thing):
        if isinstance(found, Value):
            yield found
        elif isinstance(found, set | frozenset) and any(True for item in found for _ in values_in(item)):
            raise TypeError(
                f"values are found in lists, tuples, dictionaries and dataclasses; got the set {found}: "
                "make it a list"
            )
