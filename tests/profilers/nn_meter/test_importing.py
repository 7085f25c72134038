"""Predictors as nn-Meter publishes them: pickled forests of scikit-learn 0.23, in a folder or a zip."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profilers.nn_meter import importing
from profilers.nn_meter.importing import import_predictor
from profilers.nn_meter.official import OFFICIAL, OfficialFile, OfficialPredictor
from profilers.nn_meter.pickles import RefusedPickleError
from profilers.nn_meter.predictor import NnMeterPredictor
from profilers.nn_meter.regression import KernelPredictor
from tests.profilers.nn_meter.conftest import RULES
from tests.profilers.nn_meter.forests import fitted, old_pickle

NAME = "cortexA76cpu_tflite21"


@pytest.fixture
def forests() -> dict[str, Any]:
    return {"conv-bn-relu": fitted(7, 4, 0), "relu": fitted(2, 4, 1)}


@pytest.fixture
def folder(tmp_path: Path, forests: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the published files: their digests are what is known of the predictor."""
    made = tmp_path / "from the net" / NAME
    made.mkdir(parents=True)
    (made / "fusion_rules.json").write_text(json.dumps(RULES))
    known = {}
    for kind, forest in forests.items():
        content = old_pickle(forest)
        (made / f"{kind}.pkl").write_bytes(content)
        known[kind] = OfficialFile(hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setattr(importing, "OFFICIAL", {NAME: OfficialPredictor(NAME, known)})
    return made


@pytest.mark.parametrize("form", ["folder", "zip", "zip of a folder"])
def test_imported_forests_predict_what_the_pickled_ones_did(
    form: str, folder: Path, forests: dict[str, Any], tmp_path: Path
) -> None:
    source = folder
    if form != "folder":
        source = tmp_path / f"{NAME}.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in folder.iterdir():
                archive.write(path, path.name if form == "zip" else f"{NAME}/{path.name}")
    made = import_predictor(source, folder=tmp_path / "ours")
    assert not [*made.rglob("*.pkl")]
    assert NnMeterPredictor.load(NAME, tmp_path / "ours").kernels.keys() == forests.keys()
    for kind, forest in forests.items():
        rows = np.random.default_rng(0).uniform(0, 300, (50, forest.n_features_in_))
        found = KernelPredictor.load(kind, made / f"{kind}.npz").predict(rows.tolist())
        assert np.array_equal(found, forest.predict(rows))


def test_file_that_differs_from_what_was_published_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "relu.pkl").write_bytes(old_pickle(fitted(2, 4, seed=7)))
    with pytest.raises(ValueError, match=r"relu.pkl must have \d+ bytes with sha256 .*--allow-unknown"):
        import_predictor(folder, folder=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    made = import_predictor(folder, folder=tmp_path / "ours", allow_unknown=True)
    assert (made / "relu.npz").exists()


def test_predictor_of_which_nothing_is_known_is_taken_when_that_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no size and sha256 of conv-bn-relu.pkl of 'mine' are known"):
        import_predictor(folder, name="mine", folder=tmp_path / "ours")
    import_predictor(folder, name="mine", folder=tmp_path / "ours", allow_unknown=True)
    assert NnMeterPredictor.load("mine", tmp_path / "ours").name == "mine"


def test_planted_pickle_is_refused_also_where_unknown_files_are_allowed(folder: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    (folder / "relu.pkl").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(RefusedPickleError, match=r"relu.pkl of .* is refused: it names posix.system"):
        import_predictor(folder, folder=tmp_path / "ours", allow_unknown=True)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="nothing is downloaded unasked"):  # it was not registered
        NnMeterPredictor.load(NAME, tmp_path / "ours")


def test_pointer_in_place_of_a_file_is_told(folder: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1067\nsize 31757462\n"
    (folder / "relu.pkl").write_text(pointer)
    with pytest.raises(ValueError, match=r"relu.pkl is a Git LFS pointer.*git lfs pull"):
        import_predictor(folder, folder=tmp_path / "ours")


@pytest.mark.parametrize("missing", ["fusion_rules.json", "pickles"])
def test_folder_without_a_predictor_is_told(missing: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if (path.suffix == ".json") == (missing == "fusion_rules.json"):
            path.unlink()
    with pytest.raises(ValueError, match=r"must hold KERNEL.pkl files and fusion_rules.json"):
        import_predictor(folder, folder=tmp_path / "ours")


def test_rules_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "fusion_rules.json").write_text('{"BF_conv_relu": true}')
    with pytest.raises(ValueError, match="must give each rule its 'obey'"):
        import_predictor(folder, folder=tmp_path / "ours")


def test_neither_folder_nor_zip_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("nothing")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        import_predictor(tmp_path / "a.zip", folder=tmp_path / "ours")


def test_official_sizes_sum_up_to_what_the_archives_unpack_to() -> None:
    assert [round(found.unpacked_bytes / 1e9, 1) for found in OFFICIAL.values()] == [1.3, 1.1, 1.4, 2.8]
    for found in OFFICIAL.values():
        assert all(len(file.sha256) == 64 and file.size > 1e6 for file in found.files.values())
