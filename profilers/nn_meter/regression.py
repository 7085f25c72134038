"""One kind of kernel's latency from nn-Meter's features, kept in a file that cannot run code."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import final

import numpy as np
from scipy.optimize import nnls

from lookup_tables import Calibration
from lookup_tables.whole_file import write_whole
from profilers.nn_meter.forest import Floats, Forest, Rows

_PRODUCTS = ("millions of MACs", "millions of weights")
_NAMES = ("height", "input channels", "output channels", "filter", "stride", *_PRODUCTS)
_LOOSE = 1.25  # how far beyond what was measured a feature may lie
_BLOCK = 16  # channels that a runtime handles at once, or half as many
_SMALL_US = 5.0  # below this, an absolute error counts and not a relative one
_LEAST = 0.1  # of its own time, which no calibration takes from a kernel


@final
@dataclass(frozen=True, eq=False)
class Law:
    """What a predictor of ours has besides its forest.

    Attributes:
        per_quantity: milliseconds for each of `quantities`.
        low, high: of each feature that was measured.
        scale, offset_ms: what whole networks said of kernels that were measured alone.
    """

    per_quantity: Floats
    low: Floats
    high: Floats
    scale: Floats | float = 1.0
    offset_ms: Floats | float = 0.0


@final
@dataclass(frozen=True, eq=False)
class KernelPredictor:
    """Milliseconds of the kernels of one kind.

    One that nn-Meter published is a forest over nn-Meter's features. One of ours has a law, too: what a
    kernel computes and moves, weighed, times a forest that says how far this shape is from that. A forest
    alone is a step function that needs thousands of samples; the ratio is nearly flat.

    Attributes:
        kind: nn-Meter's name of it, such as ``"conv-bn-relu"``.
        forest: of the milliseconds, or of the ratio.
        law: of a predictor of ours.
    """

    kind: str
    forest: Forest
    law: Law | None = None

    @classmethod
    def fitted(cls, kind: str, rows: Rows, times_us: Sequence[float], seed: int) -> KernelPredictor:
        """A predictor of ours.

        Args:
            kind: of the kernels.
            rows: nn-Meter's features of each.
            times_us: of each alone, in microseconds.
            seed: of the forest.
        """
        from sklearn.ensemble import RandomForestRegressor

        times, known = np.asarray(times_us, dtype=np.float64), quantities(kind, rows)
        weights = 1.0 / (times + _SMALL_US)
        per_quantity = nnls(known * weights[:, None], times * weights)[0]
        per_quantity[0] += 1e-3  # a kernel that does nothing takes a nanosecond: ratios are finite
        base = known @ per_quantity
        regressor = RandomForestRegressor(n_estimators=100, max_features=0.6, random_state=seed)
        regressor.fit(_described(kind, rows), times / base, sample_weight=(base * weights) ** 2)
        low, high = np.min(rows, axis=0), np.max(rows, axis=0)
        return cls(kind, Forest.from_sklearn(regressor), Law(per_quantity / 1e3, low, high))

    def calibrated(self, calibration: Calibration) -> KernelPredictor:
        """The same predictor, as its kernels are in networks."""
        assert self.law is not None
        law = replace(self.law, scale=calibration.scale, offset_ms=calibration.per_site_us / 1e3)
        return replace(self, law=law)

    def predict(self, rows: Rows) -> Floats:
        """One prediction a row of features."""
        if self.law is None:
            return self.forest.predict(rows)
        alone = self.forest.predict(_described(self.kind, rows)) * (
            quantities(self.kind, rows) @ self.law.per_quantity
        )
        own = self.law.scale * alone
        return np.maximum(own + self.law.offset_ms, _LEAST * own)

    def outside(self, row: Sequence[float]) -> str | None:
        """Which feature lies a quarter or more outside of what was measured; None: none, or nobody knows."""
        if self.law is None:
            return None
        names = _NAMES[1:3] + _PRODUCTS if self.kind == "fc" else _NAMES
        for name, number, low, high in zip(names, row, self.law.low, self.law.high, strict=False):
            # Little of two things that are in range is nothing new.
            least = 0.0 if name in _PRODUCTS else low / _LOOSE
            if not least <= number <= high * _LOOSE:
                return f"has {number:g} ({name}); {self.kind} was measured from {low:g} to {high:g}"
        return None

    def save(self, path: Path) -> None:
        """Writes an npz file, whole or not at all."""
        arrays = self.forest.arrays()
        if self.law is not None:
            arrays |= {f.name: np.asarray(getattr(self.law, f.name)) for f in fields(Law)}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_whole(path, content.getvalue())

    @classmethod
    def load(cls, kind: str, path: Path) -> KernelPredictor:
        """Reads what `save` wrote; no object is made that the file names.

        Raises:
            ValueError: the file is absent or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as held:
                arrays = dict(held)
            law = {
                f.name: np.asarray(arrays.pop(f.name), np.float64) for f in fields(Law) if f.name in arrays
            }
            return cls(kind, Forest.from_arrays(arrays), Law(**law) if law else None)
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"'{path}' is no predictor of kernels ({error}); import or build it again"
            ) from error


def quantities(kind: str, rows: Rows) -> Floats:
    """What each kernel computes and moves, from nn-Meter's features of it.

    Columns: 1, multiply-adds, inputs, outputs and weights, in millions; and multiply-adds and outputs once
    more where the input's channels do not fill the blocks that a runtime works on, which some kernels need.

    >>> quantities("fc", [[256, 10, 0.002565, 0.00513]]).tolist()
    [[1.0, 0.00256, 0.000256, 1e-05, 0.00257, 0.0, 0.0]]
    """
    plain = np.array([_quantities(kind, *row) for row in rows])
    broken = _channels(kind, rows)[:, :1] % _BLOCK != 0
    return np.hstack([plain, plain[:, [1, 3]] * broken])


def _quantities(kind: str, *row: float) -> list[float]:
    if kind == "fc":
        cin, cout = row[:2]
        macs, given, made, weights = cin * cout, cin, cout, (cin + 1) * cout
    elif len(row) >= 5:  # convolutions and pools
        hw, cin, cout, ks, stride = row[:5]
        given, made = hw**2 * cin, math.ceil(hw / stride) ** 2 * cout
        weights = {"conv-bn-relu": cin * cout, "dwconv-bn-relu": cout}.get(kind, 0) * ks**2
        macs = made * ks**2 * (cin if kind == "conv-bn-relu" else 1)
    else:  # height and channels
        macs = given = made = row[0] ** 2 * row[1]
        weights = 0
    return [1.0, macs / 1e6, given / 1e6, made / 1e6, weights / 1e6]


def _described(kind: str, rows: Rows) -> Floats:
    """nn-Meter's features, the quantities, and whether channels fill the blocks that a runtime works on."""
    return np.hstack([np.asarray(rows), quantities(kind, rows), _channels(kind, rows) % _BLOCK == 0])


def _channels(kind: str, rows: Rows) -> Floats:
    """Those of the input, and of the output where a kernel changes them."""
    given = np.asarray(rows, dtype=np.float64)
    return given[:, :2] if kind == "fc" else given[:, 1 : 3 if given.shape[1] > 2 else 2]
