"""Uniform draws of the architectures that keep to a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from hwnas.space import ModelSpace
from profilers.cost import Cost, CostTable
from profilers.penalty import RangeProfilerFilter
from profilers.program import minimise
from profilers.space import Architecture, Implied

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

Filters = RangeProfilerFilter | Sequence[RangeProfilerFilter] | None
"""One range, several that all have to be kept to, or none."""

_MOST_COUNTS = 16_000_000  # numbers that all steps together may keep
_FEWEST_BINS, _MOST_BINS = 8, 4_096  # of one cost
_TRIAL = 512  # draws that tell how many are in vain
_LEAST_KEPT = 1e-3
_STEPS = 20  # of the random walk between two draws, for each choice


@final
class Sampler:
    """Draws architectures within ranges of cost, each canonical one equally likely.

    A cost is a sum of small tables. Their numbers, less each table's least and rounded down to whole bins,
    are added up by dynamic programming over the choices; a draw goes back through the counts and is kept
    if its true cost is in every range. Rounding down loses no architecture that is in range, so what is
    kept is uniform. The number of bins grows until nine of ten draws are kept, as far as memory allows.

    Where fewer than one draw in a thousand is kept even so (several costs at once, or choices too entangled
    for tables), a random walk takes over: from an architecture in range it redraws two choices at a
    time among all their options that stay in range (Gibbs sampling). Its draws are uniform in the limit, over
    what such steps connect.

    Args:
        space: whose architectures are drawn.
        filters: ranges that all have to be kept to; none: the whole space.

    Attributes:
        is_exact: whether draws are independent and exactly uniform.

    Raises:
        ValueError: no architecture is in all ranges, or one is of another space's cost.

    >>> from torch import nn
    >>> from hwnas import LayerChoice
    >>> from profilers import ParamsProfiler
    >>> layers = [nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)]
    >>> space = ModelSpace(nn.Sequential(LayerChoice(layers, label="op")))
    >>> sampler = Sampler(space, [RangeProfilerFilter(ParamsProfiler(space), min=1, max=16)])
    >>> sampler.draw(torch.Generator())
    {'op': 2}
    """

    def __init__(self, space: ModelSpace, filters: Filters = None) -> None:
        self.space = space
        self.filters = as_filters(filters)
        for found in self.filters:
            space.check_cost(found.profiler.cost)
        self.is_exact = True
        self._options = list(space.options.items())
        self._share = 1.0
        self._counts: _Counts | None = None
        self._walk: _Walk | None = None
        if not self.filters:
            return
        if len(self.filters) > 1:  # a filter alone has checked that it holds something
            _any_within(space, self.filters)
        self._ranges = [
            (found.profiler.cost, found.min, min(found.max, _ceiling(found.profiler.cost)))
            for found in self.filters
        ]
        self._counts = self._settled()
        if self._counts is None:
            self.is_exact = False
            self._walk = _Walk(space, self._ranges, _any_within(space, self.filters))

    @property
    def size(self) -> float:
        """How many architectures are in range, estimated from draws; NaN where the random walk draws."""
        if not self.filters:
            return float(self.space.size)
        return math.nan if self._counts is None else self._counts.total * self._share

    def draw(self, generator: torch.Generator) -> Architecture:
        """One architecture; which one depends on the generator alone."""
        return self.draw_many(1, generator)[0]

    def draw_many(self, count: int, generator: torch.Generator) -> list[Architecture]:
        """``count`` architectures, with repetition."""
        if not self.filters:
            return [self.space.random(generator) for _ in range(count)]
        if self._walk is not None:
            return [self._named(row) for row in self._walk.draw(count, generator)]
        assert self._counts is not None  # one of the two draws
        found: list[Architecture] = []
        while (missing := count - len(found)) > 0:
            # As many as will be enough most often: a whole number that does not hang on what came before.
            drawn = self._counts.draw(math.ceil(1.2 * missing / self._share) + 1, generator)
            found += itertools.islice(self._kept(drawn), missing)
        return found

    def _kept(self, drawn: Integers) -> Iterator[Architecture]:
        for row in drawn[_in_range(self._ranges, drawn)]:
            architecture = self._named(row)
            # The sums of many at once may differ in the last bit.
            if all(found.filter(architecture) for found in self.filters):
                yield architecture

    def _named(self, row: Integers) -> Architecture:
        return {label: options[i] for (label, options), i in zip(self._options, row.tolist(), strict=True)}

    def _settled(self) -> _Counts | None:
        """Counts with as many bins as are needed to draw well; None: there are no such counts."""
        generator = torch.Generator().manual_seed(0)
        plan = _Plan(self.space, self._ranges)
        finest = min(_MOST_BINS, plan.most_bins())
        bins = min(256 if len(self._ranges) == 1 else 32, finest)
        if bins < _FEWEST_BINS:
            return None
        counts = _Counts(plan, bins)
        while (share := self._share_kept(counts, _TRIAL, generator)) < 0.9 and bins < finest:
            bins = min(4 * bins, finest)
            counts = _Counts(plan, bins)
        if share < 0.05:
            share = self._share_kept(counts, 40 * _TRIAL, generator)
        self._share = share
        return counts if share >= _LEAST_KEPT else None

    def _share_kept(self, counts: _Counts, draws: int, generator: torch.Generator) -> float:
        return float(_in_range(self._ranges, counts.draw(draws, generator)).mean())


Range = tuple[Cost, float, float]


@dataclass(frozen=True)
class _Factor:
    """What some choices have to do with each other: costs that they add, joint options that are ruled out.

    Attributes:
        labels: one for each axis.
        costs: float64 ``(ranges, *options)``, each range's least being 0.
        allowed: bool ``(*options)``.
    """

    labels: tuple[str, ...]
    costs: Floats
    allowed: npt.NDArray[np.bool_]


@final
class _Plan:
    """In what order choices are added to the count, and which of them a step has to tell apart."""

    def __init__(self, space: ModelSpace, ranges: Sequence[Range]) -> None:
        self.choices = list(space.options)
        implied = {follows.label: follows for cost, _, _ in ranges for follows in cost.implied}
        self.labels = [*self.choices, *implied]
        self.sizes = {label: len(options) for label, options in space.options.items()}
        self.sizes |= {label: len(follows.options) for label, follows in implied.items()}
        self.ranges = ranges
        self.factors = [
            *_cost_factors(self.sizes, ranges),
            *_activity_factors(space, len(ranges)),
            *(_implication(follows, len(ranges)) for follows in implied.values()),
        ]
        self._touching = {label: [f for f in self.factors if label in f.labels] for label in self.labels}
        orders = [self._steps([*labels]) for labels in (self._greedy_labels(), self._closing_labels())]
        self.order = min(orders, key=self._cells)

    def most_bins(self) -> int:
        """The largest number of bins for each cost with which all counts find room."""
        return int((_MOST_COUNTS / self._cells(self.order)) ** (1 / len(self.ranges))) - 1

    def _cells(self, order: Sequence[tuple[str, list[_Factor], list[str]]]) -> int:
        """How many counts all steps keep, for each bin."""
        cells, frontier = 0, set[str]()
        for label, _, forgotten in order:
            frontier.add(label)
            for gone in forgotten:
                cells += math.prod(self.sizes[name] for name in frontier)
                frontier.remove(gone)
        return cells

    def _steps(self, labels: Sequence[str]) -> list[tuple[str, list[_Factor], list[str]]]:
        """Each label with the factors that it completes and the labels that nothing needs any more."""
        added: set[str] = set()
        frontier: set[str] = set()
        order = []
        for label in labels:
            added.add(label)
            frontier.add(label)
            complete = [f for f in self._touching[label] if added.issuperset(f.labels)]
            forgotten = sorted(self._settled(frontier, added))
            order.append((label, complete, forgotten))
            frontier.difference_update(forgotten)
        return order

    def _settled(self, frontier: set[str], added: set[str]) -> list[str]:
        """Of the frontier, what nothing needs any more."""
        return [n for n in frontier if all(added.issuperset(f.labels) for f in self._touching[n])]

    def _greedy_labels(self) -> Iterator[str]:
        """Next is the label after which there is least to tell apart."""
        added, frontier = set[str](), set[str]()

        def room(label: str) -> tuple[int, int]:
            wider = frontier | {label}
            after = wider.difference(self._settled(wider, added | {label}))
            return self._width(after), self._width(wider)

        while len(added) < len(self.labels):
            label = min((name for name in self.labels if name not in added), key=room)
            yield label
            added.add(label)
            frontier.add(label)
            frontier.difference_update(self._settled(frontier, added))

    def _closing_labels(self) -> Iterator[str]:
        """Next is a label at hand, with all that shares a factor with it: then nothing needs it any more."""
        near = {
            label: {n for f in self._touching[label] for n in f.labels} | {label} for label in self.labels
        }
        added, frontier = set[str](), set[str]()

        def room(label: str) -> tuple[int, int]:
            wider = frontier | (near[label] - added)
            after = wider.difference(self._settled(wider, added | wider))
            return self._width(after), self._width(wider)

        while len(added) < len(self.labels):
            at_hand = {name for label in frontier for name in near[label] if near[name] - added}
            left = [n for n in self.labels if n in at_hand] or [n for n in self.labels if n not in added]
            missing = near[min(left, key=room)] - added
            for label in sorted(missing, key=lambda name: (-len(self._touching[name]), name)):
                yield label
                added.add(label)
            frontier |= missing
            frontier.difference_update(self._settled(frontier, added))

    def _width(self, labels: set[str]) -> int:
        return math.prod(self.sizes[name] for name in labels)


@final
class _Counts:
    """How many architectures have each sum of rounded costs, choice by choice.

    Args:
        plan: the order of the choices.
        bins: into how many parts the way from the least sum to a range's upper end is cut.

    Attributes:
        total: how many architectures' rounded costs are in range.
    """

    def __init__(self, plan: _Plan, bins: int) -> None:
        self._plan = plan
        self._bins = bins
        axes = len(plan.ranges)
        self._widths, first = [], []
        for axis, (cost, low, high) in enumerate(plan.ranges):
            base = cost.constant + sum(float(table.values.min()) for table in cost.tables)
            # Not quite as wide as could be: a sum at the upper end stays in, whatever the last bit says.
            width = max((high - base) / bins * (1 + 1e-9), 1e-12 * max(abs(high), 1.0))
            self._widths.append(width)
            rounded = sum(bool(factor.costs[axis].any()) for factor in plan.factors)
            first.append(0 if low == -math.inf else max(0, math.floor((low - base) / width) - rounded))
        self._shifts: dict[int, Integers] = {}
        self._steps: list[tuple[str, tuple[str, ...], Floats]] = []
        self._order: list[_Factor | int] = []  # factors, and numbers of steps, as they come

        state = np.zeros((bins + 1,) * axes)
        state[(0,) * axes] = 1.0
        frontier: list[str] = []
        log_scale = 0.0
        for label, complete, forgotten in plan.order:
            frontier.append(label)
            state = np.repeat(np.expand_dims(state, len(frontier) - 1), plan.sizes[label], len(frontier) - 1)
            for factor in complete:
                state = self._applied(factor, state, frontier)
                self._order.append(factor)
            for gone in forgotten:
                axis = frontier.index(gone)
                frontier.remove(gone)
                # The forgotten choice's axis comes last: a draw reads it whole.
                self._order.append(len(self._steps))
                self._steps.append((gone, tuple(frontier), np.moveaxis(state, axis, -1)))
                state = state.sum(axis)
                scale = state.max()
                state = state / scale
                log_scale += math.log(scale)
        window = tuple(slice(start, None) for start in first)
        self._last = np.zeros_like(state)
        self._last[window] = state[window]
        self.total = float(self._last.sum()) * math.exp(log_scale)

    def draw(self, count: int, generator: torch.Generator) -> Integers:
        """Numbers of options ``(count, choices)``, uniform over what is in range after rounding."""
        points = torch.rand((count, len(self._steps) + 1), generator=generator, dtype=torch.float64).numpy()
        sums = self._last.ravel().cumsum()
        last = np.searchsorted(sums, points[:, -1] * sums[-1], side="right")
        bins = list(np.unravel_index(np.minimum(last, len(sums) - 1), self._last.shape))
        drawn: dict[str, Integers] = {}
        for event in reversed(self._order):
            if isinstance(event, int):
                gone, others, counts = self._steps[event]
                sums = counts[(*(drawn[name] for name in others), *bins)].cumsum(axis=1)
                drawn[gone] = (sums <= points[:, event, None] * sums[:, -1:]).sum(axis=1)
            else:
                at = tuple(drawn[name] for name in event.labels)
                bins = [b - shifts[at] for b, shifts in zip(bins, self._shifts[id(event)], strict=True)]
        return np.stack([drawn[label] for label in self._plan.choices], axis=1)

    def _applied(self, factor: _Factor, state: Floats, frontier: Sequence[str]) -> Floats:
        """The counts after the factor's costs: moved up by whole bins, and gone where it is ruled out."""
        # An infinite number of bins is as good as one too many.
        shifts = np.stack(
            [
                np.minimum(np.floor(costs / width), self._bins + 1).astype(np.int64)
                for costs, width in zip(factor.costs, self._widths, strict=True)
            ]
        )
        self._shifts[id(factor)] = shifts
        moved = np.zeros_like(state)
        for cell in np.argwhere(factor.allowed):
            options: dict[str, Any] = dict(zip(factor.labels, cell, strict=True))
            at = tuple(options.get(name, slice(None)) for name in frontier)
            shift = shifts[:, *cell]
            if (shift <= self._bins).all():
                target = tuple(slice(s, None) for s in shift)
                source = tuple(slice(None, self._bins + 1 - s) for s in shift)
                moved[*at, ..., *target] = state[*at, ..., *source]
        return moved


@final
class _Walk:
    """Gibbs sampling over pairs of choices, from an architecture in range."""

    def __init__(self, space: ModelSpace, ranges: Sequence[Range], start: Architecture) -> None:
        self._sizes = [len(options) for options in space.options.values()]
        ruled_out = [
            CostTable(factor.labels, np.where(factor.allowed, 0.0, 1.0))
            for factor in _activity_factors(space, 0)
        ]
        canonical = Cost(space.options, 0.0, ruled_out, unit="inactive choice off its default")
        self._ranges = [*ranges, (canonical, -math.inf, 0.0)]
        self._start = ranges[0][0].indices([start])[0]

    def draw(self, count: int, generator: torch.Generator) -> Iterator[Integers]:
        row = self._start.copy()
        choices = [i for i, size in enumerate(self._sizes) if size > 1]
        for _ in range(count):
            for _ in range(_STEPS * len(choices)):
                picks = torch.randperm(len(choices), generator=generator)[:2].tolist()
                self._redraw(row, [choices[pick] for pick in picks], generator)
            yield row.copy()

    def _redraw(self, row: Integers, columns: Sequence[int], generator: torch.Generator) -> None:
        sizes = [self._sizes[column] for column in columns]
        rows = np.repeat(row[None], math.prod(sizes), axis=0)
        rows[:, columns] = np.indices(sizes).reshape(len(sizes), -1).T
        # What is there now is in range, whatever the last bit of a sum says.
        allowed = np.flatnonzero(_in_range(self._ranges, rows) | (rows == row).all(axis=1))
        row[:] = rows[allowed[int(torch.randint(len(allowed), (), generator=generator))]]


def _cost_factors(sizes: dict[str, int], ranges: Sequence[Range]) -> Iterator[_Factor]:
    """All costs' tables; those over the same choices are one factor."""
    found: dict[tuple[str, ...], Floats] = {}
    for axis, (cost, _, _) in enumerate(ranges):
        for table in cost.tables:
            shape = tuple(sizes[label] for label in table.labels)
            costs = found.setdefault(table.labels, np.zeros((len(ranges), *shape)))
            costs[axis] += table.values - table.values.min()
    for labels, costs in found.items():
        yield _Factor(labels, costs, np.ones(costs.shape[1:], dtype=np.bool_))


def _activity_factors(space: ModelSpace, axes: int) -> Iterator[_Factor]:
    """A choice that takes no part has its default."""
    for label, activity in space.activity.items():
        if not activity.is_always():
            labels, allowed = activity.canonical(label, space.options)
            yield _Factor(labels, np.zeros((axes, *allowed.shape)), allowed)


def _implication(follows: Implied, axes: int) -> _Factor:
    """An implied label has the option that follows."""
    allowed = follows.numbers[..., None] == np.arange(len(follows.options))
    return _Factor((*follows.parents, follows.label), np.zeros((axes, *allowed.shape)), allowed)


def _in_range(ranges: Sequence[Range], rows: Integers) -> npt.NDArray[np.bool_]:
    inside = np.ones(len(rows), dtype=np.bool_)
    for cost, low, high in ranges:
        found = cost.of_many(rows)
        slack = 1e-9 * abs(high)
        inside &= (found >= low - slack) & (found <= high + slack)
    return inside


def _ceiling(cost: Cost) -> float:
    """What no architecture costs more than."""
    return cost.constant + sum(float(table.values.max()) for table in cost.tables)


def as_filters(given: Filters) -> tuple[RangeProfilerFilter, ...]:
    """One filter, several or none as a tuple. Raises ``TypeError`` where it is something else."""
    found = given if isinstance(given, list | tuple) else [] if given is None else [given]
    wrong = [type(each).__name__ for each in found if not isinstance(each, RangeProfilerFilter)]
    if wrong:
        raise TypeError(f"a filter is a RangeProfilerFilter or a list of them; got {', '.join(wrong)}")
    return tuple(found)


def _any_within(space: ModelSpace, filters: Sequence[RangeProfilerFilter]) -> Architecture:
    limits = [limit for f in filters for limit in f.limits]
    found = minimise(filters[0].profiler.cost * 0.0, limits)  # any will do
    if found is None:
        ranges = "; ".join(map(str, filters))
        raise ValueError(
            f"no architecture of the space is in all of these ranges: {ranges}. Each alone holds some: "
            "widen one"
        )
    return space.canonical({**space.default(), **found})
