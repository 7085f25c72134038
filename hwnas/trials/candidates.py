"""The architectures that a search may try: within its filters, and each once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from hwnas.sampling import Sampler
from hwnas.space import ModelSpace
from profilers.cost import Cost
from profilers.penalty import RangeProfilerFilter
from profilers.space import Architecture, Option

Rows = npt.NDArray[np.int64]

_PATIENCE = 100  # draws in a row that were tried before; then what is left is counted
_MOST_LEFT = 10_000  # of what is left, kept at a time
_MOST_PAIRS = 200_000  # changes of two choices that are looked at


@final
class Candidates:
    """The architectures within some ranges of cost, less those that were taken.

    All that comes out is canonical, within every filter, and was not taken before. Nothing is repaired by
    trial and error: neighbours are enumerated, and their costs are looked up at once.

    Args:
        space: whose architectures they are.
        filters: ranges that all have to be kept to; none: the whole space.
        generator: the source of randomness.

    Raises:
        ValueError: no architecture is in all ranges.
    """

    def __init__(
        self, space: ModelSpace, filters: Sequence[RangeProfilerFilter], generator: torch.Generator
    ) -> None:
        self.space = space
        self.filters = tuple(filters)
        self._generator = generator
        self._sampler = Sampler(space, filters)
        self._options = list(space.options.items())
        self._position = [{option: i for i, option in enumerate(options)} for _, options in self._options]
        self._activity = _activity_tables(space)
        self._ranges = [(found.profiler.cost, found.min, found.max) for found in filters]
        self._moves: Rows = np.array(
            [(column, i) for column, (_, found) in enumerate(self._options) for i in range(len(found))]
        )
        self._taken: set[bytes] = set()
        self._left: list[Architecture] | None = None  # what is left, once that is little

    # ---- what was taken

    def take(self, architecture: Mapping[str, Option]) -> None:
        """Never comes back."""
        self._taken.add(self._row(architecture).tobytes())

    def is_new(self, architecture: Mapping[str, Option]) -> bool:
        """Whether it was not taken."""
        return self._row(architecture).tobytes() not in self._taken

    def is_within(self, architecture: Mapping[str, Option]) -> bool:
        """Whether it keeps to every filter."""
        return all(found.filter(architecture) for found in self.filters)

    # ---- new ones

    def draw(self) -> Architecture | None:
        """A uniform draw of what is left; None: nothing is."""
        if self._left is None:
            for _ in range(_PATIENCE):
                found = self._sampler.draw(self._generator)
                if self.is_new(found):
                    return found
        # Nearly all was taken: what is left is few enough to be listed.
        self._left = [found for found in self._left or () if self.is_new(found)]
        if not self._left:
            self._left = list(itertools.islice(filter(self.is_new, self.grid()), _MOST_LEFT))
        if not self._left:
            return None
        return self._left[int(torch.randint(len(self._left), (), generator=self._generator))]

    def mutate(self, parent: Mapping[str, Option]) -> Architecture | None:
        """A uniform draw of what differs from the parent in one of its active choices.

        Choices that only take part after the change are at their default. Where nothing like it is left,
        two choices change; where nothing is left there either, it is `draw`.
        """
        row = self._row(parent)
        moves = self._moves[self._is_active(row[None])[0][self._moves[:, 0]]]
        moves = moves[row[moves[:, 0]] != moves[:, 1]]
        for changes in (moves[:, None], self._pairs(moves)):
            rows = np.repeat(row[None], len(changes), axis=0)
            for place in range(changes.shape[1]):
                rows[np.arange(len(rows)), changes[:, place, 0]] = changes[:, place, 1]
            found = self._any_new(self._canonical(rows))
            if found is not None:
                return found
        return self.draw()

    def cross(self, mother: Mapping[str, Option], father: Mapping[str, Option]) -> Architecture | None:
        """A child that takes each choice from either parent, at even odds.

        Where it is outside of a filter, it is moved towards one parent until it is inside; where it was
        taken, it is mutated.

        Args:
            mother: within the filters.
            father: within the filters.
        """
        parents = np.stack([self._row(mother), self._row(father)])
        whose = torch.randint(2, (len(self._options) + 1,), generator=self._generator).numpy()
        child = parents[whose[:-1], np.arange(len(self._options))]
        found = self._towards(child, parents[whose[-1]])
        return found if self.is_new(found) else self.mutate(found)

    def repair(self, architecture: Mapping[str, Option]) -> Architecture | None:
        """The architecture, moved choice by choice towards a uniform draw until it is within the filters.

        Where the outcome was taken, it is mutated.
        """
        row = self._canonical(self._row(architecture)[None])[0]
        found = self._towards(row, self._row(self._sampler.draw(self._generator)))
        return found if self.is_new(found) else self.mutate(found)

    def grid(self) -> Iterator[Architecture]:
        """Every canonical architecture within the filters once, taken or not.

        The last choice's options change fastest. A beginning that no ending brings within the filters, by
        the sums of its tables' least and largest numbers, is left out as a whole.
        """
        bounds = [_Bounds(*found) for found in self._ranges]
        sizes = [len(options) for _, options in self._options]
        row = np.zeros(len(sizes), dtype=np.int64)

        def extend(column: int) -> Iterator[Architecture]:
            if column == len(sizes):
                if (self._canonical(row[None])[0] == row).all():
                    found = self._named(row)
                    if self.is_within(found):
                        yield found
                return
            known = self._activity.get(column)
            # A choice may stand before those that decide whether it takes part.
            decided = known is not None and max(known[0]) < column
            idle = decided and known is not None and not known[1][tuple(row[list(known[0])])]
            for option in range(1 if idle else sizes[column]):
                row[column] = option
                if all(bound.can_hold(column, row) for bound in bounds):
                    yield from extend(column + 1)
            row[column] = 0

        yield from extend(0)

    # ---- rows: the numbers of the options

    def _row(self, architecture: Mapping[str, Option]) -> Rows:
        return np.array(
            [
                position[architecture[label]]
                for (label, _), position in zip(self._options, self._position, strict=True)
            ],
            dtype=np.int64,
        )

    def _named(self, row: Rows) -> Architecture:
        return {label: options[i] for (label, options), i in zip(self._options, row.tolist(), strict=True)}

    def _is_active(self, rows: Rows) -> npt.NDArray[np.bool_]:
        active = np.ones(rows.shape, dtype=np.bool_)
        for column, (deciders, table) in self._activity.items():
            active[:, column] = table[tuple(rows[:, list(deciders)].T)]
        return active

    def _canonical(self, rows: Rows) -> Rows:
        return np.where(self._is_active(rows), rows, 0) if self._activity else rows

    def _within(self, rows: Rows) -> npt.NDArray[np.bool_]:
        inside = np.ones(len(rows), dtype=np.bool_)
        for cost, low, high in self._ranges:
            found = cost.of_many(rows)
            inside &= (found >= low) & (found <= high)
        return inside

    def _any_new(self, rows: Rows) -> Architecture | None:
        """Any of the rows that is within the filters and new, each equally likely."""
        rows = rows[self._within(rows)]
        for index in torch.randperm(len(rows), generator=self._generator).tolist():
            if rows[index].tobytes() not in self._taken:
                return self._named(rows[index])
        return None

    def _pairs(self, moves: Rows) -> Rows:
        """Pairs of changes of two choices, ``(pairs, 2, 2)``; some of them where there are too many."""
        count = len(moves)
        if count * (count - 1) // 2 <= _MOST_PAIRS:
            first, second = np.triu_indices(count, 1)
        else:
            first, second = torch.randint(count, (2, _MOST_PAIRS), generator=self._generator).numpy()
        differ = moves[first, 0] != moves[second, 0]
        return np.stack([moves[first[differ]], moves[second[differ]]], axis=1)

    def _towards(self, row: Rows, target: Rows) -> Architecture:
        """The first that is within the filters on a way from one row to another, which is."""
        differing = np.flatnonzero(row != target)
        order = torch.randperm(len(differing), generator=self._generator).numpy()
        steps = np.repeat(row[None], len(differing) + 1, axis=0)
        for step, column in enumerate(differing[order], start=1):
            steps[step:, column] = target[column]
        steps = self._canonical(steps)
        return self._named(steps[int(self._within(steps).argmax())])


def _activity_tables(space: ModelSpace) -> dict[int, tuple[tuple[int, ...], npt.NDArray[np.bool_]]]:
    """For each choice that does not always take part: the choices that decide, and what they decide."""
    columns = {label: column for column, label in enumerate(space.options)}
    return {
        columns[label]: (
            tuple(columns[decider] for decider in activity.labels()),
            activity.table(space.options),
        )
        for label, activity in space.activity.items()
        if not activity.is_always()
    }


@final
class _Bounds:
    """What the endings of a beginning cost at least and at most, table by table.

    Args:
        cost: of the architectures.
        low: the least that is wanted.
        high: the most that is wanted.
    """

    def __init__(self, cost: Cost, low: float, high: float) -> None:
        self._cost, self._constant, self._low, self._high = cost, cost.constant, low, high
        columns = {label: column for column, label in enumerate(cost.options)}
        # A label is known with the last choice behind it.
        last = {label: max(columns[c] for c in behind) for label, behind in cost.choices_behind.items()}
        # For each table its labels, with when each is known, and its extremes by how many are known.
        self._tables: list[tuple[list[tuple[str, int]], list[tuple[Any, Any]]]] = []
        for table in cost.tables:
            axes = range(len(table.labels))
            known_at = [last[label] for label in table.labels]
            order = sorted(axes, key=known_at.__getitem__)
            values = table.values.transpose(order)
            extremes = [
                (values.min(axis=tuple(axes[known:])), values.max(axis=tuple(axes[known:])))
                for known in range(len(table.labels) + 1)
            ]
            labels = [(table.labels[axis], known_at[axis]) for axis in order]
            self._tables.append((labels, extremes))
        largest = sum(float(np.abs(table.values).max()) for table in cost.tables)
        self._slack = 1e-12 * (abs(cost.constant) + largest)  # the sums' last bits

    def can_hold(self, column: int, row: Rows) -> bool:
        """Whether the beginning up to ``column`` has an ending in the range, as far as the bounds tell."""
        least = most = self._constant
        numbers = self._cost.followed(dict(zip(self._cost.options, row.tolist(), strict=True)))
        for labels, extremes in self._tables:
            known = sum(other <= column for _, other in labels)
            at = tuple(numbers[label] for label, _ in labels[:known])
            least += extremes[known][0][at]
            most += extremes[known][1][at]
        return bool(least <= self._high + self._slack and most >= self._low - self._slack)
