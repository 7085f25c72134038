"""Every architecture's cost as a sum of small tables over the choices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from profilers import program
from profilers.space import Architecture, Implied, Option

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.integer[Any]]

# Architectures that `of_many` takes at a time: its intermediate arrays then stay in the processor's cache.
_CHUNK = 16_384

# Cells of a table up to which it is contracted together with all others.
_SMALL = 1_024
# Cells of a table from which a box is told from other tables: for fewer, the cells are as quick.
_LEAST_BOX = 128


@final
@dataclass(frozen=True)
class Box:
    """A table with one number inside a box and another one outside of it.

    Attributes:
        allowed: bool ``(options,)`` for each axis; a cell is inside where every axis has an allowed option.
        inside: the number there.
        outside: the number everywhere else.
    """

    allowed: tuple[npt.NDArray[np.bool_], ...]
    inside: float
    outside: float


@final
@dataclass(frozen=True)
class CostTable:
    """The cost of one place of a network, for every combination of the choices that it depends on.

    Attributes:
        labels: the choices, one for each axis.
        values: float64; ``values[i, j]`` is the cost at option ``i`` of the first label and ``j`` of
            the second.
    """

    labels: tuple[str, ...]
    values: Floats

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.labels):
            raise ValueError(
                f"a cost table needs one axis a label: {len(self.labels)} labels {self.labels}, "
                f"values of shape {self.values.shape}"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"the labels of a cost table must differ, got {self.labels}")

    @cached_property
    def box(self) -> Box | None:
        """What a large table is, if it is a box: what always costs the same and runs under many conditions.

        Its expectation is a product, not a sum over all cells, and an integer program needs one variable
        for it. None for small tables, where that saves nothing.
        """
        return _box_of(self.values) if self.values.size >= _LEAST_BOX else None


@final
class Cost:
    """What every architecture of a space costs: ``constant + Σ table[a[c1], a[c2], ...]``.

    A place of the network that depends on ``k`` choices is a table of ``k`` axes. Tables over the same
    choices, or over some of another table's choices, are added up, so that there are as few as possible; but
    a large `Box` is added to equal boxes alone. Axes along which nothing changes are left out. An axis may
    also be a label that choices imply, and all that is said here stays exact.
    A cost does not change after it was made; costs of one space and unit add.

    >>> kernel = CostTable(("kernel", "width"), np.array([[1.0, 2.0], [3.0, 6.0]]))
    >>> cost = Cost({"kernel": (3, 5), "width": (8, 16)}, 10.0, [kernel], unit="MAC")
    >>> cost.of({"kernel": 5, "width": 16}), cost.bounds()
    (16.0, (11.0, 16.0))
    """

    def __init__(
        self,
        options: Mapping[str, tuple[Option, ...]],
        constant: float,
        tables: Sequence[CostTable],
        unit: str,
        implied: Sequence[Implied] = (),
    ) -> None:
        """Add up the tables.

        Args:
            options: every choice of the space with its options, in the space's order.
            constant: what every architecture costs.
            tables: in any order, over labels of ``options`` and ``implied`` in any order.
            unit: ``"ms"``, ``"MAC"``, ... Costs of two units do not add.
            implied: what follows from the choices, parents first; what no table needs is left out.

        Raises:
            ValueError: a table has an unknown label, a wrong shape, or a number that is not finite; or one
                choice is behind two labels of a table.
        """
        every = {**options, **{follows.label: follows.options for follows in implied}}
        for table in tables:
            _check_table(table, every)
        if not math.isfinite(constant):
            raise ValueError(f"a cost's constant must be finite, got {constant}")
        self.options: Mapping[str, tuple[Option, ...]] = dict(options)
        merged = _merged([table for table in tables if table.labels], every)
        constants = [table for table in (*tables, *merged) if not table.labels]
        self.constant = float(constant) + sum(float(table.values) for table in constants)
        self.tables = tuple(table for table in merged if table.labels)
        self.unit = unit
        needed = {label for table in self.tables for label in table.labels}
        for follows in reversed(implied):
            if follows.label in needed:
                needed.update(follows.parents)
        self.implied = tuple(follows for follows in implied if follows.label in needed)
        self._column = {label: i for i, label in enumerate((*self.options, *(f.label for f in self.implied)))}
        self._position = {
            label: {_hashable(o): i for i, o in enumerate(choice)} for label, choice in self.options.items()
        }
        self._used = tuple(label for label in self.options if label in needed)
        self.choices_behind = _choices_behind(self.options, self.implied)
        for labels in (*(t.labels for t in self.tables), *(f.parents for f in self.implied)):
            behind = [choice for label in labels for choice in self.choices_behind[label]]
            if len(set(behind)) < len(behind):
                raise ValueError(f"no choice can be behind two labels of one table, got {labels}")

    def of(self, architecture: Mapping[str, Option]) -> float:
        """The cost of one architecture.

        Raises:
            ValueError: a label that the cost depends on is missing, or has an option that does not exist.
        """
        numbers = self.followed({label: self._index(label, architecture) for label in self._used})
        total = self.constant
        for table in self.tables:
            total += float(table.values[tuple(numbers[label] for label in table.labels)])
        return total

    def followed(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """The numbers of options with those of the implied labels, which follow."""
        found = dict(numbers)
        for follows in self.implied:
            found[follows.label] = int(follows.numbers[tuple(found[parent] for parent in follows.parents)])
        return found

    def index(self, label: str, option: Option) -> int:
        """The number of an option among its choice's options.

        Raises:
            ValueError: the choice does not have the option.
        """
        position = self._position[label].get(_hashable(option))
        if position is None:
            raise ValueError(f"{label!r} must be one of {self.options[label]}, got {option!r}")
        return position

    def indices(self, architectures: Sequence[Mapping[str, Option]]) -> npt.NDArray[np.int64]:
        """The options' numbers, ``(architectures, choices)``, in the order of ``options``.

        Raises:
            ValueError: a label is missing, or has an option that does not exist.
        """
        rows = [
            [self._index(label, architecture) for label in self.options] for architecture in architectures
        ]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.options))

    def of_many(self, indices: Indices) -> Floats:
        """The costs of many architectures at once, millions a second.

        Args:
            indices: integers ``(architectures, choices)``: the number of each choice's option, in the
                order of ``options``.

        Returns:
            float64 ``(architectures,)``.

        Raises:
            ValueError: the shape is wrong, or a number is outside its choice's options.
        """
        self._check_indices(indices)
        total = np.full(len(indices), self.constant)
        for start in range(0, len(indices), _CHUNK):
            # Whole columns of small integers: contiguous, and half the memory of int64.
            columns = [*np.ascontiguousarray(indices[start : start + _CHUNK].T, dtype=np.int32)]
            for follows in self.implied:
                parents = tuple(columns[self._column[parent]] for parent in follows.parents)
                columns.append(follows.numbers[parents].astype(np.int32))
            for labels, cells in self._flat_tables:
                flat = columns[labels[0][0]] * labels[0][1]
                for column, stride in labels[1:]:
                    flat += columns[column] * stride
                total[start : start + _CHUNK] += cells[flat]
        return total

    def expected(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The mean cost under independent choices: exact, and differentiable in the probabilities.

        The sum over all cells of the cell's cost times the product of its options' probabilities. It
        is multilinear, so its gradient for one option is the mean cost given that option.

        Args:
            probabilities: for each label that the cost depends on, ``(options,)`` numbers that sum to 1.

        Returns:
            float64 scalar, on the CPU (a loss on another device can add it).

        Raises:
            ValueError: a label is missing or has a wrong number of probabilities.
        """
        (first, _), (cells, factors) = self._row, self._contraction
        if not self._used:
            return torch.tensor(self.constant, dtype=torch.float64)
        given = _row_of([self._checked(label, probabilities) for label in self._used])
        flat = torch.cat([given, _ONE])
        for (places, *others), options, count in self._implications:
            joint = flat.index_select(0, places)
            for other in others:
                joint = joint * flat.index_select(0, other)
            flat = torch.cat([flat, joint.new_zeros(count).index_add(0, options, joint)])
        product = cells
        for factor in factors:
            product = product * flat.index_select(0, factor)
        total = product.sum() + self.constant
        if self._boxes is not None:
            allowed, rows, count, axes, outside, weights = self._boxes
            shares = flat.new_zeros(count).index_add(0, rows, flat.index_select(0, allowed))
            total = total + outside + weights @ shares[axes].prod(dim=1)
        for labels, rest in self._large:
            for label, size in zip(reversed(labels), reversed(rest.shape), strict=True):
                rest = rest @ flat.narrow(0, first[label], size)
            total = total + rest
        return total

    def bounds(self) -> tuple[float, float]:
        """The cheapest and the dearest cost of the space, exactly."""
        return self.of(self.minimum()), self.of(self.maximum())

    def minimum(self) -> Architecture:
        """A cheapest architecture."""
        return dict(self._extremes[0])

    def maximum(self) -> Architecture:
        """A dearest architecture."""
        return dict(self._extremes[1])

    def __mul__(self, factor: float) -> Cost:
        tables = [CostTable(table.labels, table.values * factor) for table in self.tables]
        return Cost(self.options, self.constant * factor, tables, self.unit, self.implied)

    def __neg__(self) -> Cost:
        return self * -1.0

    def __add__(self, other: Cost) -> Cost:
        if self.unit != other.unit:
            raise ValueError(f"costs must have one unit to be added, got {self.unit!r} and {other.unit!r}")
        if self.options != other.options:
            raise ValueError(
                "costs must belong to one space to be added, got the choices "
                f"{list(self.options)} and {list(other.options)}"
            )
        constant = self.constant + other.constant
        # Each in the order of its own; what both have is one.
        implied = {follows.label: follows for follows in (*self.implied, *other.implied)}
        return Cost(self.options, constant, [*self.tables, *other.tables], self.unit, [*implied.values()])

    @cached_property
    def _extremes(self) -> tuple[Architecture, Architecture]:
        cheapest, dearest = program.minimise(self), program.minimise(-self)
        assert cheapest is not None, "without constraints there is a cheapest architecture"
        assert dearest is not None, "without constraints there is a dearest architecture"
        return cheapest, dearest

    @cached_property
    def _flat_tables(self) -> list[tuple[list[tuple[int, int]], Floats]]:
        """Each table as (column, stride) of its labels, and its cells in one row."""
        flat = []
        for table in self.tables:
            strides = [math.prod(table.values.shape[axis + 1 :]) for axis in range(len(table.labels))]
            columns = [self._column[label] for label in table.labels]
            flat.append((list(zip(columns, strides, strict=True)), table.values.ravel()))
        return flat

    @cached_property
    def _levels(self) -> list[list[Implied]]:
        """The implied labels, each after those that imply it; those of one level do not imply each other."""
        level: dict[str, int] = {}
        for follows in self.implied:
            level[follows.label] = 1 + max(level.get(parent, 0) for parent in follows.parents)
        return [
            [follows for follows in self.implied if level[follows.label] == number]
            for number in range(1, 1 + max(level.values(), default=0))
        ]

    @cached_property
    def _row(self) -> tuple[dict[str, int], int]:
        """Where each label's probabilities begin in the row of them all, and where a 1 stands in it.

        First come the choices, then the 1, then the implied labels by level.
        """
        sizes = {label: len(self.options[label]) for label in self._used}
        one = sum(sizes.values())
        implied = [follows for level in self._levels for follows in level]
        ends = itertools.accumulate((len(follows.options) for follows in implied), initial=one + 1)
        first = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        return first | dict(zip((follows.label for follows in implied), ends, strict=False)), one

    @cached_property
    def _contraction(self) -> tuple[Tensor, list[Tensor]]:
        """All small tables' cells in one row, and for each axis the places of the cells' probabilities.

        A few operations then contract every table at once.
        """
        tables = [t for t in self.tables if t.values.size <= _SMALL and t.box is None]
        cells = np.concatenate([np.zeros(0), *(table.values.ravel() for table in tables)])
        axes = self._places([(table.labels, table.values.shape) for table in tables])
        return torch.from_numpy(cells), axes

    @cached_property
    def _implications(self) -> list[tuple[list[Tensor], Tensor, int]]:
        """For each level of implied labels: where the probabilities of their parents' options stand, for each
        axis and combination; which option it leads to, counted over the level; how many there are.
        """
        found = []
        for level in self._levels:
            axes = self._places([(follows.parents, follows.numbers.shape) for follows in level])
            sizes = [len(follows.options) for follows in level]
            starts = itertools.accumulate(sizes[:-1], initial=0)
            numbers = [f.numbers.ravel() + start for f, start in zip(level, starts, strict=True)]
            found.append((axes, torch.from_numpy(np.concatenate(numbers)), sum(sizes)))
        return found

    def _places(self, grids: Sequence[tuple[tuple[str, ...], tuple[int, ...]]]) -> list[Tensor]:
        """For each axis, where the probabilities of all cells of several grids stand in the row of them.

        The 1 in the row stands for the axes that a grid does not have.
        """
        first, one = self._row
        width = max((len(labels) for labels, _ in grids), default=0)
        places: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(width)]
        for labels, shape in grids:
            coordinates = np.indices(shape).reshape(len(labels), -1)
            for axis in range(width):
                if axis < len(labels):
                    places[axis].append(coordinates[axis] + first[labels[axis]])
                else:
                    places[axis].append(np.full(math.prod(shape), one))
        return [torch.from_numpy(np.concatenate(axis)) for axis in places]

    @cached_property
    def _boxes(self) -> tuple[Tensor, Tensor, int, Tensor, float, Tensor] | None:
        """(allowed, rows, count, axes, outside, weights) of all boxes together; None where there are none.

        The probability that an axis has an allowed option is the sum of those in ``allowed``, places in the
        row of `_row`, that have the axis's number in ``rows``, one of ``count``; number 0 is a 1. ``axes``
        has the numbers of each box's own, filled up with 0; inside a box the cost is the weight more than
        outside.
        """
        boxes = [(table.labels, table.box) for table in self.tables if table.box is not None]
        if not boxes:
            return None
        first, one = self._row
        places = [np.array([one])]
        axes = np.zeros((len(boxes), max(len(labels) for labels, _ in boxes)), dtype=np.int64)
        for number, (labels, box) in enumerate(boxes):
            for axis, (label, allowed) in enumerate(zip(labels, box.allowed, strict=True)):
                axes[number, axis] = len(places)
                places.append(first[label] + np.flatnonzero(allowed))
        rows = np.repeat(np.arange(len(places)), list(map(len, places)))
        outside = sum(box.outside for _, box in boxes)
        weights = torch.tensor([box.inside - box.outside for _, box in boxes], dtype=torch.float64)
        every = torch.from_numpy(np.concatenate(places))
        return every, torch.from_numpy(rows), len(places), torch.from_numpy(axes), outside, weights

    @cached_property
    def _large(self) -> list[tuple[tuple[str, ...], Tensor]]:
        """The other tables. Axis by axis each becomes smaller, and most of the work is one product."""
        large = (table for table in self.tables if table.values.size > _SMALL and table.box is None)
        return [(table.labels, torch.from_numpy(table.values)) for table in large]

    def _index(self, label: str, architecture: Mapping[str, Option]) -> int:
        if label not in architecture:
            raise ValueError(
                f"the architecture must name an option of {label!r}; it has {list(architecture)}"
            )
        return self.index(label, architecture[label])

    def _check_indices(self, indices: Indices) -> None:
        if indices.ndim != 2 or indices.shape[1] != len(self.options):
            raise ValueError(
                f"indices must have the shape (architectures, {len(self.options)}), one column for each "
                f"of {list(self.options)}, got {indices.shape}"
            )
        if not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"indices must be integers, got {indices.dtype}")
        if not len(indices):
            return
        lowest, highest = indices.min(axis=0), indices.max(axis=0)
        for label, low, high in zip(self.options, lowest, highest, strict=True):
            if low < 0 or high >= len(self.options[label]):
                raise ValueError(
                    f"the indices of {label!r} must lie in 0 to {len(self.options[label]) - 1}, "
                    f"got {low} to {high}"
                )

    def _checked(self, label: str, probabilities: Mapping[str, Tensor]) -> Tensor:
        if label not in probabilities:
            raise ValueError(f"the probabilities of {label!r} are missing; given: {list(probabilities)}")
        given = probabilities[label]
        if given.shape != (len(self.options[label]),):
            raise ValueError(
                f"{label!r} needs probabilities of shape ({len(self.options[label])},), one for each of "
                f"{self.options[label]}, got {tuple(given.shape)}"
            )
        return given


def _row_of(given: Sequence[Tensor]) -> Tensor:
    """Several vectors as one, float64 on the CPU; in one step where they lie on one device."""
    if len({vector.device for vector in given}) > 1:
        given = [vector.to("cpu") for vector in given]
    return torch.cat([*given]).to(device="cpu", dtype=torch.float64)


_ONE = torch.ones(1, dtype=torch.float64)


def _hashable(option: Option) -> Option:
    """An option that came back from JSON has lists where it had tuples."""
    return tuple(_hashable(part) for part in option) if isinstance(option, list | tuple) else option


def _choices_behind(
    options: Mapping[str, tuple[Option, ...]], implied: Sequence[Implied]
) -> dict[str, tuple[str, ...]]:
    """The choices that decide a label, by label: itself, or those that imply it."""
    behind: dict[str, tuple[str, ...]] = {label: (label,) for label in options}
    for follows in implied:
        behind[follows.label] = tuple(choice for parent in follows.parents for choice in behind[parent])
    return behind


def _check_table(table: CostTable, options: Mapping[str, tuple[Option, ...]]) -> None:
    unknown = [label for label in table.labels if label not in options]
    if unknown:
        raise ValueError(f"the labels of a cost table must be choices of the space, {unknown} are not")
    shape = tuple(len(options[label]) for label in table.labels)
    if table.values.shape != shape:
        raise ValueError(
            f"the cost table over {table.labels} must have the shape {shape}, got {table.values.shape}"
        )
    if not np.isfinite(table.values).all():
        raise ValueError(f"the cost table over {table.labels} must be finite, got {table.values}")


def _merged(tables: Sequence[CostTable], options: Mapping[str, tuple[Option, ...]]) -> list[CostTable]:
    """The same sum in fewer tables: one whose labels another one has is added into that one.

    A large box is added to equal ones alone: in a sum with others it would be a box no more. Axes come out
    in the order of ``options``, without those along which nothing changes.
    """
    order = {label: i for i, label in enumerate(options)}
    merged: dict[tuple[str, ...], Floats] = {}
    boxes: dict[tuple[object, ...], CostTable] = {}
    for table in sorted(tables, key=lambda table: -len(table.labels)):
        labels = tuple(sorted(table.labels, key=order.__getitem__))
        values = table.values.transpose([table.labels.index(label) for label in labels])
        ordered = CostTable(labels, np.array(values, dtype=np.float64, order="C"))
        if ordered.box is not None:
            key = (labels, *(allowed.tobytes() for allowed in ordered.box.allowed))
            known = boxes.get(key)
            boxes[key] = ordered if known is None else CostTable(labels, known.values + ordered.values)
            continue
        home = next((other for other in merged if set(labels) <= set(other)), None)
        if home is None:
            merged[labels] = ordered.values
        else:
            merged[home] += values.reshape([len(options[label]) if label in labels else 1 for label in home])
    found = [CostTable(labels, values) for labels, values in merged.items()]
    return [_without_idle_axes(table) for table in (*found, *boxes.values())]


def _without_idle_axes(table: CostTable) -> CostTable:
    labels, values = table.labels, table.values
    for axis in reversed(range(len(labels))):
        first = values.take([0], axis=axis)
        if np.array_equal(values, np.broadcast_to(first, values.shape)):
            labels, values = (*labels[:axis], *labels[axis + 1 :]), first.squeeze(axis)
    return table if labels == table.labels else CostTable(labels, np.array(values, order="C"))


def _box_of(values: Floats) -> Box | None:
    """The box that a table is; None where it is none."""
    differs = values != values.flat[0]
    for is_inside in (differs, ~differs):
        inside, outside = values[is_inside], values[~is_inside]
        if not (len(inside) and len(outside)) or (inside != inside[0]).any() or (outside != outside[0]).any():
            return None
        axes = range(values.ndim)
        allowed = [is_inside.any(axis=tuple(other for other in axes if other != axis)) for axis in axes]
        if math.prod(int(which.sum()) for which in allowed) == len(inside):
            return Box(tuple(allowed), float(inside[0]), float(outside[0]))
    return None
