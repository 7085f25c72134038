"""One kind of kernel's latency from nn-Meter's features, kept in a file that cannot run code."""

from __future__ import annotations

import io
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
_BLOCK = 16  # channels that a runtime handles at once; with older CPUs 8, which the forest makes good
_SMALL_US = 5.0  # below this, an absolute error counts and not a relative one
_LEAST = 0.1  # of its own time, which no calibration takes from a kernel


@final
@dataclass(frozen=True, eq=False)
class Law:
    """What a predictor of ours has besides its forest.

    Attributes:
        per_quantity: milliseconds for each of `quantities`.
        low, high: of each feature that was measured.
        scale, offset_ms: what whole networks said of the sum of kernels.
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
            times_us: of each, in microseconds.
            seed: of the forest.
        """
        from sklearn.ensemble import RandomForestRegressor

        times, known = np.asarray(times_us, dtype=np.float64), quantities(kind, rows)
        weights = 1.0 / (times + _SMALL_US)
        per_quantity = nnls(known * weights[:, None], times * weights)[0]
        per_quantity[0] += 1e-3  # a kernel that does nothing takes a nanosecond: ratios are finite
        base = known @ per_quantity
        regressor = RandomForestRegressor(
            n_estimators=100, max_features=0.6, min_samples_leaf=3, random_state=seed
        )
        regressor.fit(_described(kind, rows), times / base, sample_weight=(base * weights) ** 2)
        low, high = np.min(rows, axis=0), np.max(rows, axis=0)
        return cls(kind, Forest.from_sklearn(regressor), Law(per_quantity / 1e3, low, high))

    def calibrated(self, calibration: Calibration) -> KernelPredictor:
        """The same predictor, as its kernels add up to networks."""
        assert self.law is not None
        law = replace(self.law, scale=calibration.scale, offset_ms=calibration.per_site_us / 1e3)
        return replace(self, law=law)

    def predict(self, rows: Rows) -> Floats:
        """One prediction a row of features."""
        if self.law is None:
            return self.forest.predict(rows)
        timed = self.forest.predict(_described(self.kind, rows)) * (
            quantities(self.kind, rows) @ self.law.per_quantity
        )
        own = self.law.scale * timed
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
    """What each kernel computes and moves, from nn-Meter's features of it; all but the first in millions.

    Runtimes compute on whole blocks of channels, so channels are rounded up to blocks. Of convolutions and
    pools: 1; inputs, outputs and weights; multiply-adds, in one of three columns, for a runtime has a code of
    its own for less than a block of input channels (images), for 1x1, and for the rest; those at the left and
    right border, which are computed one by one; outputs, once for each block that is summed into them; inputs
    and outputs that do not fill their blocks. Of linear layers: 1, weights, inputs and outputs. Of others: 1
    and inputs.

    >>> quantities("fc", [[256, 10, 0.002565, 0.00513]]).tolist()
    [[1.0, 0.00257, 0.000256, 1e-05]]
    """
    given = np.asarray(rows, dtype=np.float64)
    one = np.ones(len(given))
    if kind == "fc":
        cin, cout = given[:, :2].T
        columns = [one, (cin + 1) * cout / 1e6, cin / 1e6, cout / 1e6]
    elif given.shape[1] >= 5:
        columns = [one, *(column / 1e6 for column in _of_windows(kind, given))]
    else:  # height and channels
        columns = [one, given[:, 0] ** 2 * given[:, 1] / 1e6]
    return np.stack(columns, axis=1)


def _of_windows(kind: str, rows: Floats) -> list[Floats]:
    hw, cin, cout, ks, stride = rows[:, :5].T
    out, wide = np.ceil(hw / stride), _filled(cout)
    is_dense, is_deep = kind == "conv-bn-relu", cin >= _BLOCK
    held = np.where(is_deep, _filled(cin), cin) if is_dense else _filled(cin)
    summed = held if is_dense else np.ones_like(cin)  # inputs of an output, at one place of the window
    weights = np.zeros_like(cin) if kind.endswith("pool") else wide * summed * ks**2
    macs, is_window = out**2 * wide * summed * ks**2, ks > 1
    return [
        hw**2 * held,
        out**2 * wide,
        weights,
        macs * ~is_deep,
        macs * (is_deep & ~is_window),
        macs * (is_deep & is_window),
        macs / out * is_window,
        out**2 * wide * np.ceil(summed / _BLOCK),
        hw**2 * cin * (cin % _BLOCK != 0),
        out**2 * cout * (cout % _BLOCK != 0),
    ]


def _filled(channels: Floats) -> Floats:
    filled: Floats = np.ceil(channels / _BLOCK) * _BLOCK
    return filled


def _described(kind: str, rows: Rows) -> Floats:
    """nn-Meter's features, the quantities, and how channels fill the blocks that a runtime works on."""
    given = np.asarray(rows, dtype=np.float64)
    channels = given[:, :2] if kind == "fc" else given[:, 1 : 3 if given.shape[1] > 2 else 2]
    return np.hstack([given, quantities(kind, rows), channels % _BLOCK, np.ceil(channels / _BLOCK) % 4])
