"""The best architecture under a budget, exactly: never an argmax that happens to overshoot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hwnas.space import ModelSpace
from profilers.cost import Cost, CostTable
from profilers.profile import Profiler
from profilers.program import minimise
from profilers.space import Architecture, Option

Budget = Mapping[Profiler, float]
"""Profilers with the most (or the least) that an architecture may cost by each, in its unit."""

# exp(-50): an option of a smaller probability is as good as ruled out, and its logarithm stays finite.
_LEAST_LOG = -50.0


def score(space: ModelSpace, probabilities: Mapping[str, Tensor]) -> Cost:
    """How well an architecture fits independent probabilities, as a sum of small tables, in nats.

    ``Σ log p(option) - max log p`` over the choices that take part in the network, each label once. The
    best option of every choice scores 0; without that reference a deeper network, which has more
    choices, would score lower than a shallow one for its depth alone.

    Args:
        space: the space.
        probabilities: one row ``(options,)`` for each label.
    """
    options = dict(space.options)
    derived = space.derived_probabilities(probabilities)
    tables = []
    for label, activity in space.activity.items():
        given = torch.log(derived[label].detach().double().cpu()).clamp(min=_LEAST_LOG).numpy()
        relative = given - given.max()
        if activity.is_always():
            tables.append(CostTable((label,), relative))
        else:
            active = activity.table(options)[..., None]
            tables.append(CostTable((*activity.labels(), label), np.where(active, relative, 0.0)))
    return Cost(options, 0.0, tables, unit="nat")


def ranked(
    space: ModelSpace,
    probabilities: Mapping[str, Tensor],
    max_cost: Budget | None = None,
    min_cost: Budget | None = None,
    excluded: Sequence[Mapping[str, Option]] = (),
) -> Iterator[Architecture]:
    """Canonical architectures from the best `score` downwards, all of them within the budgets.

    Each is the exact optimum of an integer program from which those before it are cut off.

    Args:
        space: the space.
        probabilities: one row ``(options,)`` for each label.
        max_cost: the most that it may cost; nothing: unlimited.
        min_cost: the least that it may cost.
        excluded: architectures that are not to come back.

    Raises:
        ValueError: no architecture of the space keeps to a budget.
    """
    _check(max_cost or {}, min_cost or {})
    objective = -score(space, probabilities)
    limits = [(profiler.cost, limit) for profiler, limit in (max_cost or {}).items()]
    limits += [(-profiler.cost, -limit) for profiler, limit in (min_cost or {}).items()]
    # Architectures that differ in choices that take no part are one network.
    seen: list[Mapping[str, Option]] = [space.active(architecture) for architecture in excluded]
    while (found := minimise(objective, limits, seen)) is not None:
        architecture = space.canonical({**space.default(), **found})
        yield architecture
        seen.append(space.active(architecture))


def _check(max_cost: Budget, min_cost: Budget) -> None:
    for profiler, limit in max_cost.items():
        low, high = profiler.cost.bounds()
        if limit < low:
            raise ValueError(
                f"a budget of {limit:g} {profiler.unit} cannot be kept: the cheapest architecture of the "
                f"space costs {low:.6g} {profiler.unit}, the dearest {high:.6g}; ask for at least {low:.6g}"
            )
    for profiler, limit in min_cost.items():
        low, high = profiler.cost.bounds()
        if limit > high:
            raise ValueError(
                f"no architecture costs {limit:g} {profiler.unit}: the dearest of the space costs "
                f"{high:.6g} {profiler.unit}, the cheapest {low:.6g}"
            )


def check_k(k: int) -> None:
    """Raises ``ValueError`` where there are not so many architectures to ask for."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k is how many architectures are asked for, a whole number of at least 1; got {k}")
