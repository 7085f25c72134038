"""Exact search where the score is a sum of small tables, as a cost is: the whole front, without a trial."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from profilers.cost import Cost, CostTable, Floats
from profilers.space import Architecture, Implied

Integers = npt.NDArray[np.int16]

_MOST_SUMS = 20_000_000  # of two sets of partial sums


@final
@dataclass(frozen=True)
class ParetoPoint:
    """An architecture that no other one beats: none is as good and cheaper, or as cheap and better."""

    architecture: Architecture
    score: float
    cost: float


def pareto_front(score: Cost, cost: Cost) -> list[ParetoPoint]:
    """The best score for every cost, exactly, where both are sums of small tables.

    Choices are eliminated one by one (dynamic programming). For each combination of the options that are
    still to be eliminated and share tables with it, those partial sums are kept that no other one of the
    same combination beats: whatever is dropped can be replaced in any whole by what beats it. So nothing
    is lost, whichever choices share tables and whichever are conditional.

    The best architecture under a limit alone is ``profilers.minimise(-score, [(cost, limit)])``, or
    `hwnas.derive.ranked` for probabilities.

    Args:
        score: more is better, as `hwnas.derive.score`.
        cost: less is better.

    Returns:
        The front, the cheapest first; one architecture where several have the same score and cost. Choices
        that change neither are at their first option, so inactive ones are at their default.

    Raises:
        ValueError: the two belong to different spaces, or the front is so long that two sets of partial
            sums have over 20 million sums.

    >>> from profilers import CostTable
    >>> options = {"op": ("skip", "conv"), "width": (8, 16)}
    >>> worth = [CostTable(("op",), np.array([0.0, 2.0])), CostTable(("width",), np.array([0.0, 1.0]))]
    >>> price = CostTable(("op", "width"), np.array([[0.0, 0.0], [1.0, 3.0]]))
    >>> score, cost = Cost(options, 0.0, worth, unit="nat"), Cost(options, 0.0, [price], unit="ms")
    >>> [(point.score, point.cost) for point in pareto_front(score, cost)]
    [(1.0, 0.0), (2.0, 1.0), (3.0, 3.0)]
    """
    if score.options != cost.options:
        raise ValueError(
            "score and cost must belong to one space, got the choices "
            f"{list(score.options)} and {list(cost.options)}"
        )
    implied = {follows.label: follows for found in (score, cost) for follows in found.implied}
    sizes = {label: len(options) for label, options in score.options.items()}
    sizes |= {label: len(follows.options) for label, follows in implied.items()}
    factors = [
        _Factor(table.labels, {at: _point(-worth, price) for at, worth, price in _entries(table, is_score)})
        for tables, is_score in ((score.tables, True), (cost.tables, False))
        for table in tables
    ]
    factors += [_implication(follows) for follows in implied.values()]
    whole = _point(0.0, 0.0)
    while factors:
        used = dict.fromkeys(label for factor in factors for label in factor.labels)
        label = min(used, key=lambda name: math.prod(sizes[other] for other in _beside(name, factors)))
        touching = [factor for factor in factors if label in factor.labels]
        factors = [factor for factor in factors if label not in factor.labels]
        found = _without(label, touching, sizes)
        if found.labels:
            factors.append(found)
        else:
            whole = _joined(whole, found.cells[()])
    reached = []
    for row in whole.options:
        chosen = dict(zip(whole.labels, row.tolist(), strict=True))
        architecture = {name: options[chosen.get(name, 0)] for name, options in score.options.items()}
        reached.append(ParetoPoint(architecture, score.of(architecture), cost.of(architecture)))
    # Sums in another order may differ in their last bits.
    kept = _undominated(np.array([(-point.score, point.cost) for point in reached]))
    return [reached[index] for index in kept]


@dataclass(frozen=True)
class _Points:
    """Partial sums of which none beats another, and how they came about.

    Attributes:
        sums: ``(points, 2)``: minus the score, and the cost; the cheapest first.
        labels: the choices that were eliminated on the way.
        options: ``(points, labels)``: the numbers of their options.
    """

    sums: Floats
    labels: tuple[str, ...]
    options: Integers


@dataclass(frozen=True)
class _Factor:
    """Partial sums for each combination of options at ``labels``."""

    labels: tuple[str, ...]
    cells: dict[tuple[int, ...], _Points]


def _implication(follows: Implied) -> _Factor:
    """Nothing where the option is the one that follows, and what every sum beats where it is not."""
    cells = {
        (*at, option): _point(0.0, 0.0) if option == number else _point(math.inf, math.inf)
        for at, number in np.ndenumerate(follows.numbers)
        for option in range(len(follows.options))
    }
    return _Factor((*follows.parents, follows.label), cells)


def _entries(table: CostTable, is_score: bool) -> Iterator[tuple[tuple[int, ...], float, float]]:
    for at, value in np.ndenumerate(table.values):
        yield (at, float(value), 0.0) if is_score else (at, 0.0, float(value))


def _point(minus_score: float, cost: float) -> _Points:
    return _Points(np.array([[minus_score, cost]]), (), np.zeros((1, 0), dtype=np.int16))


def _beside(label: str, factors: Sequence[_Factor]) -> tuple[str, ...]:
    """The choices that share a factor with this one, itself left out."""
    near = (name for factor in factors if label in factor.labels for name in factor.labels)
    return tuple(dict.fromkeys(name for name in near if name != label))


def _without(label: str, touching: Sequence[_Factor], sizes: Mapping[str, int]) -> _Factor:
    """The factors as one, in which the choice takes the options that are worth taking."""
    others = _beside(label, touching)
    cells = {}
    for at in np.ndindex(*(sizes[name] for name in others)):
        here = dict(zip(others, at, strict=True))
        found = []
        for option in range(sizes[label]):
            here[label] = option
            points = _point(0.0, 0.0)
            for factor in touching:
                points = _joined(points, factor.cells[tuple(here[name] for name in factor.labels)])
            column = np.full((len(points.sums), 1), option, dtype=np.int16)
            found.append(_Points(points.sums, (*points.labels, label), np.hstack([points.options, column])))
        sums = np.concatenate([points.sums for points in found])
        kept = _undominated(sums)
        options = np.concatenate([points.options for points in found])
        cells[at] = _Points(sums[kept], found[0].labels, options[kept])
    return _Factor(others, cells)


def _joined(first: _Points, second: _Points) -> _Points:
    """Every sum of one partial sum and another that no other such sum beats."""
    count = len(first.sums) * len(second.sums)
    if count > _MOST_SUMS:
        raise ValueError(
            f"the front is too long to be listed: {count} partial sums meet, at most {_MOST_SUMS} "
            "are looked at. Ask for the best under some limits: profilers.minimise(-score, [(cost, limit)])"
        )
    sums = (first.sums[:, None] + second.sums).reshape(-1, 2)
    kept = _undominated(sums)
    one, other = np.divmod(kept, len(second.sums))
    options = np.hstack([first.options[one], second.options[other]])
    return _Points(sums[kept], (*first.labels, *second.labels), options)


def _undominated(sums: Floats) -> npt.NDArray[np.intp]:
    """The numbers of the rows that no other beats, the cheapest first; of equal ones the first."""
    order = np.lexsort((sums[:, 0], sums[:, 1]))
    best = np.minimum.accumulate(sums[order, 0])
    is_better = np.append(True, sums[order[1:], 0] < best[:-1])
    kept: npt.NDArray[np.intp] = order[is_better]
    return kept
