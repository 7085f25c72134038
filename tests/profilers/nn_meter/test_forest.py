from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers.nn_meter.forest import Forest
from profilers.nn_meter.regression import KernelPredictor
from tests.profilers.nn_meter.forests import fitted


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), features=st.integers(1, 7), trees=st.integers(1, 12))
def test_prediction_equals_scikit_learns_to_the_last_bit(seed: int, features: int, trees: int) -> None:
    forest = fitted(max(features, 2), trees, seed)
    rows = np.random.default_rng(seed + 1).uniform(0, 320, (300, max(features, 2)))
    assert np.array_equal(Forest.from_sklearn(forest).predict(rows.tolist()), forest.predict(rows))


def test_rows_at_a_threshold_go_left_as_in_scikit_learn() -> None:
    forest = fitted()
    thresholds = np.concatenate([tree.tree_.threshold for tree in forest.estimators_])
    rows = np.repeat(thresholds[:200, None], 7, axis=1)
    assert np.array_equal(Forest.from_sklearn(forest).predict(rows), forest.predict(rows))


def test_file_of_a_predictor_holds_arrays_only_and_predicts_the_same(tmp_path: Path) -> None:
    sizes = [[float(hw), float(cin)] for hw in (1, 4, 8) for cin in (16, 40, 300)]
    predictor = KernelPredictor.fitted("relu", sizes, [hw * hw * cin / 500 for hw, cin in sizes], seed=0)
    predictor.save(tmp_path / "relu.npz")
    read = KernelPredictor.load("relu", tmp_path / "relu.npz")
    rows = [[4.0, 64.0], [7.0, 100.0]]
    assert np.array_equal(read.predict(rows), predictor.predict(rows))
    assert read.outside([4.0, 64.0]) is None
    assert read.outside([4.0, 400.0]) == "has 400 (input channels); relu was measured from 16 to 300"


def test_damaged_file_of_a_predictor_is_told(tmp_path: Path) -> None:
    (tmp_path / "relu.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"relu.npz' is no predictor of kernels .*import or build it again"):
        KernelPredictor.load("relu", tmp_path / "relu.npz")


def test_file_with_objects_is_refused(tmp_path: Path) -> None:
    arrays = {**Forest.from_sklearn(fitted(features=2)).arrays(), "low": np.array([{}, {}], dtype=object)}
    np.savez(tmp_path / "relu.npz", **arrays)
    with pytest.raises(ValueError, match="no predictor of kernels"):
        KernelPredictor.load("relu", tmp_path / "relu.npz")


@pytest.mark.parametrize(
    "change",
    [{"left": 0}, {"right": 10**6}, {"feature": 99}, {"value": np.nan}, {"roots": -1}],
    ids=lambda change: next(iter(change)),
)
def test_arrays_that_are_no_forest_are_refused(change: dict[str, float]) -> None:
    forest = Forest.from_sklearn(fitted(features=2))
    wrong = {name: np.full_like(getattr(forest, name), value) for name, value in change.items()}
    with pytest.raises(ValueError, match="these arrays do not"):
        dataclasses.replace(forest, **wrong)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of 2 numbers; got shape \(1, 3\)"):
        Forest.from_sklearn(fitted(features=2)).predict([[1.0, 2.0, 3.0]])
