"""Forests as scikit-learn 0.23 pickled them are read; what else a pickle may hold is not run."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profilers.nn_meter.pickles import RefusedPickleError, read_forest
from tests.profilers.nn_meter.forests import fitted, old_pickle


def test_forest_of_the_old_layout_predicts_what_it_did() -> None:
    forest = fitted()
    read = read_forest(io.BytesIO(old_pickle(forest)))
    rows = np.random.default_rng(1).uniform(0, 320, (300, 7))
    assert np.array_equal(read.predict(rows), forest.predict(rows))


def test_what_is_read_as_old_is_what_scikit_learn_of_today_refuses() -> None:
    with pytest.raises(ValueError, match="incompatible dtype"):
        pickle.loads(old_pickle(fitted(trees=1)))


@pytest.mark.parametrize("protocol", [3, 4])
def test_forest_of_the_new_layout_is_read_too(protocol: int) -> None:
    forest = fitted(trees=3)
    read = read_forest(io.BytesIO(pickle.dumps(forest, protocol)))
    rows = np.random.default_rng(1).uniform(0, 320, (20, 7))
    assert np.array_equal(read.predict(rows), forest.predict(rows))


class _Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: _Runs(os.system, f"touch {path}"), "posix.system"),
        (lambda path: _Runs(subprocess.check_call, ["touch", path]), "subprocess.check_call"),
        (lambda path: _Runs(eval, f"open({path!r}, 'w')"), "builtins.eval"),
        (lambda path: _Runs(getattr, "", "join"), "builtins.getattr"),
        (lambda path: _Runs(np.load, path), "numpy.load"),
    ],
    ids=["system", "subprocess", "eval", "getattr", "numpy"],
)
@pytest.mark.parametrize("where", ["alone", "in a forest"])
def test_planted_code_is_refused_by_its_name_and_not_run(
    make: Any, name: str, where: str, tmp_path: Path
) -> None:
    planted = make(str(tmp_path / "ran"))
    forest: Any = fitted(trees=1)
    forest.verbose = planted
    content = pickle.dumps(planted if where == "alone" else forest, 3)
    with pytest.raises(RefusedPickleError, match=f"names {name}, .* nothing of it was run"):
        read_forest(io.BytesIO(content))
    assert not (tmp_path / "ran").exists()


def test_class_that_a_pickle_tries_to_change_stays() -> None:
    # Asks for what stands for a scalar of numpy, and sets its attributes by the operation BUILD.
    content = b"cnumpy.core.multiarray\nscalar\n(N}(V__init__\nVmine\nutb."
    with pytest.raises(RefusedPickleError, match=r"tries to set _Scalar.__init__"):
        read_forest(io.BytesIO(content))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "EOFError"),
        (b"not a pickle", "damaged or no forest"),
        (pickle.dumps({"a": 1}), "no fitted forest"),
        (pickle.dumps([1, 2], 0), "no fitted forest"),
    ],
)
def test_what_is_no_forest_is_refused(content: bytes, text: str) -> None:
    with pytest.raises(RefusedPickleError, match=text):
        read_forest(io.BytesIO(content))


def test_forest_that_was_cut_off_is_refused() -> None:
    with pytest.raises(RefusedPickleError, match="damaged"):
        read_forest(io.BytesIO(old_pickle(fitted(trees=1))[:-200]))
