"""`Fold`: what many choices come to together, where that takes few values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hwnas.gate import Gate
from hwnas.values import Term, Value, ValueChoice, named
from profilers.space import Implied, Option

Table = npt.NDArray[np.int64]
Step = tuple[Value, Callable[[Any, Any], Any]]
"""A value of at most one choice, and ``(state, its plain value)`` to the next state."""


@final
class Fold(Value):
    """A value that is worked out of several choices one after the other, such as how many nodes are left.

    All that is remembered between two of them is a state. States are few where choices have many
    combinations, so that everything there is to know about the value is exact however many choices there
    are: which values it takes, how likely each is under independent choices, and what it costs
    (`profilers.Implied`).

    Args:
        name: what it is: ``"loose ends"``. Folds of one name over choices of equal labels are one.
        start: the first state; states are hashable.
        steps: in the order in which they are taken. No two values depend on one choice.
        finish: the last state to the value. A space is pickled with these functions, so no lambdas.

    Attributes:
        options: every value that it takes.

    Raises:
        ValueError: a value of several choices.

    >>> import operator
    >>> switches = [ValueChoice([0, 1], label=f"switch.{i}") for i in range(10)]
    >>> Fold("how many are on", 0, [(switch, operator.add) for switch in switches], int).options
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    """

    def __init__(self, name: str, start: Any, steps: Sequence[Step], finish: Callable[[Any], Any]) -> None:
        self._name = name
        self._start = start
        self._steps = tuple(steps)
        self._finish = finish
        for value, _ in self._steps:
            if len(value.leaves()) > 1:
                raise ValueError(
                    f"each step of a Fold depends on one choice, {value!r} on {len(value.leaves())}"
                )

    @cached_property
    def _worked_out(self) -> tuple[tuple[Option, ...], list[Table]]:
        """The options; for each choice the number of the next state, by those of the last and its option."""
        tables: list[Table] = []
        states = [self._start]
        for value, step in self._steps:
            if not value.leaves():
                states = [step(state, value.at({})) for state in states]
                continue
            (leaf,) = value.leaves()
            plain = [value.at({id(leaf): option}) for option in leaf.options]
            reached = [step(state, option) for state in states for option in plain]
            states = list(dict.fromkeys(reached))
            tables.append(_numbered(reached, states).reshape(-1, len(plain)))
        ended = [self._finish(state) for state in states]
        options = tuple(dict.fromkeys(ended))
        if tables:
            tables[-1] = _numbered(ended, options)[tables[-1]]
        return options, tables

    @property
    def options(self) -> tuple[Option, ...]:
        return self._worked_out[0]

    @property
    def _tables(self) -> list[Table]:
        return self._worked_out[1]

    @property
    def label(self) -> str | None:
        """Its name with those of its choices; None before these have labels."""
        labels = [leaf.label for leaf in self.leaves()]
        if any(label is None for label in labels):
            return None
        return f"{self._name} of {', '.join(map(str, labels))}"

    def name(self) -> str:
        """The label. Raises ``RuntimeError`` before a space has given its choices one."""
        return named(self.label, self._name, self.options)

    def leaves(self) -> tuple[ValueChoice, ...]:
        return tuple(leaf for value, _ in self._steps for leaf in value.leaves())

    def terms(self) -> tuple[Term, ...]:
        return (self,) if self.leaves() else ()

    def at(self, assignment: Mapping[int, Option]) -> Any:
        if id(self) in assignment:
            return assignment[id(self)]
        state = self._start
        for value, step in self._steps:
            state = step(state, value.at(assignment))
        return self._finish(state)

    def read(self, architecture: Mapping[str, Option]) -> Option:
        """Its own option, where an architecture has one, or that which follows from those of its choices."""
        name = self.name()
        if name in architecture:
            return architecture[name]
        return self.at({id(leaf): architecture[leaf.name()] for leaf in self.leaves()})

    def installed(self) -> Gate:
        """How its options are resolved in this forward pass: as the gates of its choices have it."""
        gates = [leaf.installed() for leaf in self.leaves()]
        picked = self._reached([gate.picked for gate in gates])
        if all(gate.weights is None for gate in gates):
            return Gate(picked)
        live = self._reached([gate.live() for gate in gates])
        return Gate(picked, self.distribution(gates), live)

    def distribution(self, gates: Sequence[Gate]) -> Tensor:
        """How likely each option is under the gates of its choices, some of which have weights."""
        like = next(gate.weights for gate in gates if gate.weights is not None)
        row = torch.ones(1, dtype=like.dtype, device=like.device)
        for table, gate in zip(self._tables, gates, strict=True):
            weights = gate.weights
            if weights is None:
                weights = torch.zeros(table.shape[1], dtype=like.dtype, device=like.device)
                weights[gate.picked[0]] = 1.0
            joint = torch.outer(row, weights).reshape(-1)
            numbers = torch.from_numpy(table.reshape(-1)).to(like.device)
            row = joint.new_zeros(int(table.max()) + 1).index_add(0, numbers, joint)
        return row

    def _reached(self, options: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The numbers of the options that some of the choices' options lead to."""
        found = {0}
        for table, given in zip(self._tables, options, strict=True):
            found = {int(table[state, option]) for state in found for option in given}
        return tuple(sorted(found))

    def implied(self) -> list[Implied]:
        """The label of this value, after a chain of labels for the states on the way."""
        chain: list[Implied] = []
        for leaf, table in zip(self.leaves(), self._tables, strict=True):
            is_last = len(chain) == len(self._tables) - 1
            options = self.options if is_last else tuple(range(int(table.max()) + 1))
            label = self.name() if is_last else f"{self.name()}, after {leaf.name()}"
            parents = (chain[-1].label, leaf.name()) if chain else (leaf.name(),)
            chain.append(Implied(label, options, parents, table if chain else table[0]))
        return chain

    def example(self, option: Option) -> dict[str, Option]:
        """Options of its choices from which an option of its own follows."""
        wanted = self.options.index(option)
        found: dict[str, Option] = {}
        for leaf, table in zip(reversed(self.leaves()), reversed(self._tables), strict=True):
            wanted, number = map(int, np.argwhere(table == wanted)[0])
            found[leaf.name()] = leaf.options[number]
        return found

    def __repr__(self) -> str:
        return f"Fold({self._name!r}, {', '.join(repr(value) for value, _ in self._steps)})"


def _numbered(found: Sequence[Any], distinct: Sequence[Any]) -> Table:
    number = {thing: i for i, thing in enumerate(distinct)}
    return np.array([number[thing] for thing in found], dtype=np.int64)
