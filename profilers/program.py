"""The cheapest architecture under exact limits, by integer program."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from profilers.space import Architecture, Implied, Option

if TYPE_CHECKING:  # `Cost.bounds` is solved here, so `profilers.cost` imports this module
    from profilers.cost import Cost, CostTable

Floats = npt.NDArray[np.float64]

# HiGHS calls a row fulfilled, and a solution optimal, within 1e-6 (absolute). Rows and objective are
# scaled so that the span of their values is this: the error is then under 1e-9 of the span.
_SPAN = 1e3
_TOLERANCE = 2e-6
# After so many solutions that break a limit by rounding alone, the limit is drawn in by the tolerance.
_PATIENCE = 20
_INFEASIBLE = 2  # `scipy.optimize.milp`'s status


def minimise(
    objective: Cost,
    constraints: Sequence[tuple[Cost, float]] = (),
    excluded: Sequence[Mapping[str, Option]] = (),
) -> Architecture | None:
    """The architecture with the lowest ``objective`` whose costs keep to their limits.

    A binary variable for each option; a table of several axes enters by one variable in [0, 1] for
    each cell, whose marginals equal the options' binaries, so that exactly the cell of the chosen
    options is 1. A label that choices imply has a variable for each option: the sum of the cells that lead
    there. A large table that is a box enters by one variable, the product of its axes' allowed options.
    HiGHS solves it to a gap of zero; "lowest" holds to 1e-9 of the objective's span. Every
    limit is checked on the true cost of the solution, without tolerance.

    Args:
        objective: what to minimise; its negative, to maximise.
        constraints: costs with the highest value that each may have; for a lowest value, ``-cost`` with
            the value's negative. Their options equal the objective's; units may differ.
        excluded: assignments of some labels, none of which may come back: the active choices of
            architectures that were seen already.

    Returns:
        An option for each label; None if no architecture keeps to the limits. Labels that decide nothing
        here come back with any of their options: ``space.canonical`` of it is the network's one name.

    Raises:
        ValueError: the costs belong to different spaces, an excluded assignment has an unknown label or
            option, or a limit is not a number.
    """
    _check(objective, constraints, excluded)
    layout = _Layout(objective, [cost for cost, _ in constraints], {label for a in excluded for label in a})
    cuts = [dict(assignment) for assignment in excluded]
    for attempt in range(10 * _PATIENCE):
        drawn_in = 0.0 if attempt < _PATIENCE else _TOLERANCE
        found = layout.solve(objective, constraints, drawn_in, cuts)
        if found is None or all(cost.of(found) <= limit for cost, limit in constraints):
            return found
        cuts.append({label: found[label] for label in layout.decisive})
    raise RuntimeError(
        f"HiGHS keeps finding architectures over the limits {[limit for _, limit in constraints]}"
    )


def _check(
    objective: Cost, constraints: Sequence[tuple[Cost, float]], excluded: Sequence[Mapping[str, Option]]
) -> None:
    for cost, limit in constraints:
        if cost.options != objective.options:
            raise ValueError(
                "the constraints must belong to the objective's space, got the choices "
                f"{list(cost.options)} and {list(objective.options)}"
            )
        if math.isnan(limit):
            raise ValueError(f"a limit must be a number of {cost.unit}, got {limit}")
    for assignment in excluded:
        for label, option in assignment.items():
            if label not in objective.options:
                raise ValueError(
                    f"an excluded assignment names choices of the space, {label!r} is none of "
                    f"{list(objective.options)}"
                )
            objective.index(label, option)


class _Layout:
    """The program's variables and the rows that every solution keeps to.

    First a binary for each option of each label, then a variable for each option of each implied label and
    for each cell of each group: the labels of a table of several axes that no other table's labels contain;
    then one for each box.
    """

    def __init__(self, objective: Cost, constraints: Sequence[Cost], fixed: Iterable[str]) -> None:
        costs = (objective, *constraints)
        self._options = objective.options
        self._implied = {follows.label: follows for cost in costs for follows in cost.implied}
        self._sizes = {label: len(options) for label, options in self._options.items()}
        self._sizes |= {label: len(follows.options) for label, follows in self._implied.items()}
        tables = [table for cost in costs for table in cost.tables]
        named = {label for table in tables for label in table.labels}
        named |= {parent for follows in self._implied.values() for parent in follows.parents}
        self.decisive = tuple(label for label in self._options if label in named)
        binaries = [label for label in self._options if label in named or label in set(fixed)]
        self._first: dict[str, int] = {}
        self._size = 0
        for label in binaries:
            self._first[label] = self._size
            self._size += self._sizes[label]
        self._binaries = self._size
        for label in self._implied:
            self._first[label] = self._size
            self._size += self._sizes[label]
        self._groups: dict[tuple[str, ...], int] = {}
        dense = {table.labels for table in tables if table.box is None}
        dense |= {follows.parents for follows in self._implied.values()}
        for labels in sorted(dense, key=lambda labels: (-len(labels), labels)):
            if len(labels) > 1 and self._home(labels) is None:
                self._groups[labels] = self._size
                self._size += math.prod(self._sizes[label] for label in labels)
        self._boxes: dict[tuple[object, ...], int] = {}
        self._sides: list[tuple[int, list[npt.NDArray[np.int64]]]] = []  # a box, its axes' allowed options
        for table in tables:
            if table.box is not None and _box_key(table) not in self._boxes:
                self._boxes[_box_key(table)] = self._size
                allowed = zip(table.labels, table.box.allowed, strict=True)
                sides = [self._first[label] + np.flatnonzero(which) for label, which in allowed]
                self._sides.append((self._size, sides))
                self._size += 1
        self._structure = self._structural_rows(binaries)

    def solve(
        self,
        objective: Cost,
        limits: Sequence[tuple[Cost, float]],
        drawn_in: float,
        cuts: Sequence[Mapping[str, Option]],
    ) -> Architecture | None:
        """The best solution of the program; its limits may be broken by HiGHS's tolerance."""
        rows = [self._structure]
        for cost, limit in limits:
            coefficients, rest, scale = self._row(cost)
            highest = (limit - rest) * scale - drawn_in
            if not np.any(coefficients):
                if limit < rest:
                    return None
            elif math.isfinite(limit):
                rows.append(optimize.LinearConstraint(coefficients[None], -np.inf, highest))
            elif limit < 0:
                return None
        for cut in cuts:
            coefficients = np.zeros(self._size)
            for label, option in cut.items():
                coefficients[self._first[label] + objective.index(label, option)] = 1.0
            rows.append(optimize.LinearConstraint(coefficients[None], -np.inf, len(cut) - 1))
        if not self._size:  # nothing depends on a choice
            return None if cuts else {label: options[0] for label, options in self._options.items()}
        is_binary = np.arange(self._size) < self._binaries
        result = optimize.milp(
            self._row(objective)[0],
            integrality=is_binary.astype(np.uint8),
            bounds=optimize.Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": 0.0},
        )
        if result.status == _INFEASIBLE:
            return None
        if result.x is None or not result.success:
            raise RuntimeError(f"HiGHS did not solve the program: {result.message}")
        found = {label: options[0] for label, options in self._options.items()}
        for label in self._first.keys() & self._options.keys():
            first, options = self._first[label], self._options[label]
            found[label] = options[int(np.argmax(result.x[first : first + len(options)]))]
        return found

    def _home(self, labels: tuple[str, ...]) -> tuple[str, ...] | None:
        return next((group for group in self._groups if set(labels) <= set(group)), None)

    def _cells(self, labels: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """The variable of each combination of options at ``labels``, those of a whole group or one label."""
        start = self._first[labels[0]] if len(labels) == 1 else self._groups[labels]
        shape = [self._sizes[label] for label in labels]
        return start + np.arange(math.prod(shape)).reshape(shape)

    def _structural_rows(self, binaries: Sequence[str]) -> optimize.LinearConstraint:
        """One option for each label; the marginals of each group's cells equal its options; boxes.

        An option of an implied label is the sum of the combinations of its parents that lead there.
        """
        row_of: list[npt.NDArray[np.int64]] = []
        column_of: list[npt.NDArray[np.int64]] = []
        value_of: list[Floats] = []
        low: list[float] = []
        high: list[float] = []

        def add(columns: npt.NDArray[np.int64], values: Floats, least: float, most: float) -> None:
            row_of.append(np.full(len(columns), len(low)))
            column_of.append(columns)
            value_of.append(values)
            low.append(least)
            high.append(most)

        for label in binaries:
            size = self._sizes[label]
            add(self._first[label] + np.arange(size), np.ones(size), 1.0, 1.0)
        for label, follows in self._implied.items():
            cells, numbers = self._leading(follows)
            for option in range(self._sizes[label]):
                leading = cells[numbers == option]
                columns = np.append(leading, self._first[label] + option)
                add(columns, np.append(np.ones(len(leading)), -1.0), 0.0, 0.0)
        for labels in self._groups:
            cells = self._cells(labels)
            for axis, label in enumerate(labels):
                for option in range(self._sizes[label]):
                    slab = cells.take(option, axis=axis).ravel()
                    columns = np.append(slab, self._first[label] + option)
                    add(columns, np.append(np.ones(len(slab)), -1.0), 0.0, 0.0)
        for box, sides in self._sides:
            # At most as much as every side, and at least what is left of 1 if each side takes what it lacks.
            for side in sides:
                add(np.append(side, box), np.append(np.ones(len(side)), -1.0), 0.0, np.inf)
            every = np.concatenate(sides)
            add(np.append(every, box), np.append(np.ones(len(every)), -1.0), -np.inf, len(sides) - 1.0)
        if not low:
            return optimize.LinearConstraint(np.zeros((1, self._size)), 0.0, 0.0)
        entries = (np.concatenate(value_of), (np.concatenate(row_of), np.concatenate(column_of)))
        matrix = sparse.csc_array(entries, shape=(len(low), self._size))
        return optimize.LinearConstraint(matrix, low, high)

    def _leading(self, follows: Implied) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The variables of the parents' combinations, and the option that follows from each."""
        home = follows.parents if len(follows.parents) == 1 else self._home(follows.parents)
        assert home is not None, "every implied label's parents are in a group"
        cells = self._cells(home)
        # The group's axes are in its own order, and it may have more.
        order = sorted(range(len(follows.parents)), key=lambda axis: home.index(follows.parents[axis]))
        shape = [self._sizes[label] if label in follows.parents else 1 for label in home]
        return cells, np.broadcast_to(follows.numbers.transpose(order).reshape(shape), cells.shape)

    def _row(self, cost: Cost) -> tuple[Floats, float, float]:
        """(coefficients, rest, scale): the cost is ``coefficients @ variables / scale + rest``.

        Every table is lowered to a minimum of 0, which its constant takes up: exactly one of its cells
        is 1; a box is lowered to 0 outside. What is left is as large as the cost's differences, whatever
        the cost itself is.
        """
        coefficients = np.zeros(self._size)
        rest, span = cost.constant, 0.0
        for table in cost.tables:
            if table.box is not None:
                weight = table.box.inside - table.box.outside
                coefficients[self._boxes[_box_key(table)]] += weight
                rest, span = rest + table.box.outside, span + abs(weight)
                continue
            lowest = float(table.values.min())
            values = table.values - lowest
            rest, span = rest + lowest, span + float(values.max())
            if len(table.labels) == 1:
                start = self._first[table.labels[0]]
            else:
                group = self._home(table.labels)
                assert group is not None, "every table's labels are in a group"
                start = self._groups[group]
                shape = [self._sizes[label] for label in group]
                kept = [n if label in table.labels else 1 for n, label in zip(shape, group, strict=True)]
                values = np.broadcast_to(values.reshape(kept), shape)
            coefficients[start : start + values.size] += values.ravel()
        scale = _SPAN / span if span > 0 else 1.0
        return coefficients * scale, rest, scale


def _box_key(table: CostTable) -> tuple[object, ...]:
    """Equal for boxes with the same cells inside."""
    assert table.box is not None, "it is a box"
    return table.labels, *(allowed.tobytes() for allowed in table.box.allowed)
