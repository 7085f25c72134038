"""A cost fitted to whole networks that were measured, where their parts cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profilers.cost import Cost, CostTable, Floats, Indices
from profilers.space import Option

# As `lookup_tables.calibrate` does.
_HUBER = 2.5
_REWEIGHTINGS = 10


def fit_cost(
    options: Mapping[str, tuple[Option, ...]],
    indices: Indices,
    measured: Sequence[float] | Floats,
    unit: str,
) -> Cost:
    """The sum of one table for each choice that is nearest to measurements of whole networks.

    A least-squares fit of relative errors, exact where the cost is a sum over choices. Residuals beyond 2.5
    median absolute deviations weigh less (Huber's weights), so that a disturbed measurement does not decide,
    nor a network that is far cheaper than all others. Where a choice has no effect in some networks (an edge
    that leads nowhere), give all these the same option.

    Args:
        options: every choice of the space with its options, in the space's order.
        indices: integers ``(networks, choices)``, as `Cost.of_many` takes them.
        measured: what each network cost, in ``unit``, all above 0.
        unit: of the measurements.

    Raises:
        ValueError: shapes do not match, a measurement is not above 0, or no network has one of the options,
            whose cost nothing tells.

    >>> options = {"op": ("skip", "conv"), "width": (8, 16)}
    >>> cost = fit_cost(options, np.array([[0, 0], [1, 0], [0, 1]]), [1.0, 3.0, 1.5], "ms")
    >>> round(cost.of({"op": "conv", "width": 16}), 6)
    3.5
    """
    Cost(options, 0.0, [], unit).of_many(indices)  # checks them
    times = np.asarray(measured, dtype=np.float64)
    if times.shape != (len(indices),) or not len(times) or not (np.isfinite(times) & (times > 0)).all():
        raise ValueError(
            f"each of {len(indices)} networks needs a measurement above 0; got {times.shape} with values "
            f"from {times.min(initial=np.inf):g}"
        )
    for column, (label, choice) in enumerate(options.items()):
        if unseen := [choice[i] for i in range(len(choice)) if i not in indices[:, column]]:
            raise ValueError(f"no measured network has {label!r} at {unseen}: measure some that have")
    sizes = [len(choice) for choice in options.values()]
    picked = [np.eye(size)[indices[:, column]] for column, size in enumerate(sizes)]
    columns = np.hstack([np.ones((len(times), 1)), *picked]) / times[:, None]
    weights = np.ones_like(times)
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(columns * root[:, None], root, rcond=None)[0]
        residuals = np.abs(columns @ solution - 1.0)
        # Below the accuracy of the arithmetic there is nothing to tell apart.
        spread = max(1.4826 * float(np.median(residuals)), 1e-12)
        weights = np.minimum(1.0, _HUBER * spread / np.maximum(residuals, 1e-300))
    parts = np.split(solution[1:], np.cumsum(sizes)[:-1])
    tables = [CostTable((label,), part) for label, part in zip(options, parts, strict=True)]
    return Cost(options, float(solution[0]), tables, unit)
