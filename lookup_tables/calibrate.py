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
_FEWEST = 6  # networks for three coefficients


def calibrate(
    sums_us: Sequence[float], sites: Sequence[int], measured_us: Sequence[float], least_us: float = 0.0
) -> Calibration:
    """The least-squares fit of ``scale * sum + per_site * sites + constant`` to whole networks.

    Errors are relative, and reweighted by Huber's function, so that neither the dearest networks nor a
    disturbed measurement decide. The constant is what a session costs, and at least 0. A site may count for
    less than it takes alone, where its data is brought into the layout of the kernels and back; but every
    entry of the table keeps a tenth of its time, so that no part ever makes a network faster.

    Args:
        sums_us: of each network's entries, microseconds.
        sites: how many entries each network has.
        measured_us: what the whole networks took, microseconds.
        least_us: the table's cheapest entry; 0: a site counts for what it takes, or more.

    Raises:
        ValueError: no network, or a number that is not above 0.

    >>> calibrate([100.0, 200.0, 300.0], [4, 4, 6], [120.0, 230.0, 340.0]).scale
    1.15
    """
    total, count, measured = (np.asarray(given, dtype=np.float64) for given in (sums_us, sites, measured_us))
    if not len(measured) or not (measured > 0).all() or not (total > 0).all():
        raise ValueError(
            "a calibration needs at least one whole network, with entries and times above 0; got "
            f"sums {list(sums_us)[:5]} and times {list(measured_us)[:5]}"
        )
    if len(measured) < _FEWEST:
        return Calibration(float(np.median(measured / total)), 0.0, 0.0)
    # With the largest discount of a site taken off, no coefficient is negative.
    discount = 0.9 * least_us
    columns = np.stack([total - discount * count, count, np.ones_like(total)], axis=1) / measured[:, None]
    weights = np.ones_like(measured)
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        fitted = lsq_linear(columns * root[:, None], root, bounds=(0.0, np.inf)).x
        residuals = np.abs(columns @ fitted - 1.0)
        # Below the clock's own accuracy there is nothing to tell apart.
        spread = max(1.4826 * float(np.median(residuals)), 1e-6)
        weights = np.minimum(1.0, _HUBER * spread / np.maximum(residuals, 1e-12))
    scale, per_site, constant = (float(number) for number in fitted)
    return Calibration(scale, per_site - discount * scale, constant)


def cross_validated(
    sums_us: Sequence[float],
    sites: Sequence[int],
    measured_us: Sequence[float],
    repeated_us: Sequence[float],
    least_us: float = 0.0,
) -> Accuracy:
    """The error on networks that the fit has not seen: each is predicted by a fit to all others.

    Args:
        sums_us, sites, least_us: as for `calibrate`.
        measured_us, repeated_us: two measurements of each network. The fit is to their mean, as the table's
            own; the error is against the first, which is what a user does once; the noise floor is their
            difference.
    """
    means = [(first + second) / 2 for first, second in zip(measured_us, repeated_us, strict=True)]
    return accuracy_of(held_out_us(sums_us, sites, means, least_us), measured_us, repeated_us)


def held_out_us(
    sums_us: Sequence[float], sites: Sequence[int], measured_us: Sequence[float], least_us: float = 0.0
) -> list[float]:
    """What a fit to all other networks predicts for each; arguments as for `calibrate`."""
    predicted = []
    for left_out in range(len(measured_us)):
        others = [index for index in range(len(measured_us)) if index != left_out] or [left_out]
        fit = calibrate(
            [sums_us[i] for i in others],
            [sites[i] for i in others],
            [measured_us[i] for i in others],
            least_us,
        )
        predicted.append(fit.predict_us(sums_us[left_out], sites[left_out]))
    return predicted


def accuracy_of(
    predicted_us: Sequence[float],
    measured_us: Sequence[float],
    repeated_us: Sequence[float],
    miscoverage: float = 0.05,
) -> Accuracy:
    """Predictions against measurements.

    The interval lies between two order statistics of ``measured / predicted - 1``. Where networks are
    exchangeable, a new one lies in it with the stated coverage, whatever the distribution (split conformal
    prediction, Lei et al., arXiv 1604.04173, section 2.2, with each tail at half the miscoverage; residuals
    of `cross_validated` are leave-one-out, for which this holds to a good approximation).

    Args:
        predicted_us, measured_us, repeated_us: of each network, the last two measured apart.
        miscoverage: of the interval, at most; with fewer than 39 networks it is what they allow, and said.
    """
    predicted, measured, repeated = (
        np.asarray(given, dtype=np.float64) for given in (predicted_us, measured_us, repeated_us)
    )
    count = len(measured)
    errors = np.abs(predicted / measured - 1.0) * 100
    residuals = np.sort(measured / predicted - 1.0)
    rank = max(1, math.floor((count + 1) * miscoverage / 2))
    is_ordered = count > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    correlation = float(spearmanr(predicted, measured).statistic) if is_ordered else math.nan
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
