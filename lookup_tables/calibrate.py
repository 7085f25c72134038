"""From a sum of isolated entries to a network's latency, and how far that can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear
from scipy.stats import spearmanr

from lookup_tables.table import Accuracy, Calibration

Floats = NDArray[np.float64]

# Relative residuals beyond this many median absolute deviations weigh less (Huber's weights).
_HUBER = 2.5
_REWEIGHTINGS = 10


def calibrate(sums_us: Sequence[float], sites: Sequence[int], measured_us: Sequence[float]) -> Calibration:
    """The least-squares fit of ``scale * sum + per_site * sites + constant`` to whole networks.

    Errors are relative, and reweighted by Huber's function, so that neither the dearest networks nor a
    disturbed measurement decide. No coefficient is negative: entries come without session overhead, so a
    network never costs less than its parts.

    Args:
        sums_us: of each network's entries, microseconds.
        sites: how many entries each network has.
        measured_us: what the whole networks took, microseconds.

    Raises:
        ValueError: no network, or a measurement that is not above 0.

    >>> calibrate([100.0, 200.0, 300.0], [4, 4, 6], [120.0, 230.0, 340.0]).scale
    1.1
    """
    total, count, measured = (np.asarray(given, dtype=np.float64) for given in (sums_us, sites, measured_us))
    if not len(measured) or not (measured > 0).all() or not (total > 0).all():
        raise ValueError(
            "a calibration needs at least one whole network, with entries and times above 0; got "
            f"sums {list(sums_us)[:5]} and times {list(measured_us)[:5]}"
        )
    if len(measured) < 4:  # too few for three coefficients
        return Calibration(float(np.median(measured / total)), 0.0, 0.0)
    columns = np.stack([total, count, np.ones_like(total)], axis=1) / measured[:, None]
    weights = np.ones_like(measured)
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        fitted = lsq_linear(columns * root[:, None], root, bounds=(0.0, np.inf)).x
        residuals = np.abs(columns @ fitted - 1.0)
        spread = 1.4826 * float(np.median(residuals))
        weights = np.minimum(1.0, _HUBER * spread / np.maximum(residuals, 1e-12)) if spread > 0 else weights
    scale, per_site, constant = (round(float(number), 9) for number in fitted)
    return Calibration(scale, per_site, constant)


def cross_validated(
    sums_us: Sequence[float],
    sites: Sequence[int],
    measured_us: Sequence[float],
    repeated_us: Sequence[float],
    miscoverage: float = 0.1,
) -> Accuracy:
    """The error on networks that the fit has not seen: each is predicted by a fit to all others.

    The interval is between two order statistics of these residuals; for exchangeable networks a new one lies
    in it with the stated coverage (split conformal prediction, Lei et al. 2018, arXiv 1604.04173, with
    leave-one-out residuals).

    Args:
        sums_us, sites, measured_us: as for `calibrate`.
        repeated_us: a second measurement of each network, for the noise floor.
        miscoverage: of the interval, at most, where there are enough networks.
    """
    count = len(measured_us)
    predicted = []
    for left_out in range(count):
        others = [index for index in range(count) if index != left_out] or [left_out]
        fit = calibrate(
            [sums_us[i] for i in others], [sites[i] for i in others], [measured_us[i] for i in others]
        )
        predicted.append(fit.predict_us(sums_us[left_out], sites[left_out]))
    return accuracy_of(predicted, measured_us, repeated_us, miscoverage)


def accuracy_of(
    predicted_us: Sequence[float],
    measured_us: Sequence[float],
    repeated_us: Sequence[float],
    miscoverage: float = 0.1,
) -> Accuracy:
    """Predictions against measurements."""
    predicted, measured, repeated = (
        np.asarray(given, dtype=np.float64) for given in (predicted_us, measured_us, repeated_us)
    )
    count = len(measured)
    errors = np.abs(predicted / measured - 1.0) * 100
    residuals = np.sort(measured / predicted - 1.0)
    rank = max(1, math.floor((count + 1) * miscoverage / 2))
    correlation = float(spearmanr(predicted, measured).statistic) if count > 2 else math.nan
    return Accuracy(
        mape_percent=float(errors.mean()),
        within_5_percent=float((errors <= 5).mean() * 100),
        within_10_percent=float((errors <= 10).mean() * 100),
        spearman=correlation if math.isfinite(correlation) else 0.0,
        noise_floor_percent=float(np.median(np.abs(measured - repeated) / measured) * 100),
        subnets=count,
        interval_low=float(residuals[rank - 1]),
        interval_high=float(residuals[count - rank]),
        coverage=max((count + 1 - 2 * rank) / (count + 1), 1 / (count + 1)),
    )
