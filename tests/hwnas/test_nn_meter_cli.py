from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hwnas.cli import app
from tests.profilers.nn_meter.conftest import FEATURES, RULES
from tests.profilers.nn_meter.forests import fitted, old_pickle


def call(*arguments: object):
    return CliRunner().invoke(app, ["nnmeter", *[str(argument) for argument in arguments]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A predictor as nn-Meter publishes them, of a device of its own."""
    made = tmp_path / "toy"
    made.mkdir()
    (made / "fusion_rules.json").write_text(json.dumps(RULES))
    for kind, features in FEATURES.items():
        (made / f"{kind}.pkl").write_bytes(old_pickle(fitted(features, 3)))
    return made


def test_imported_predictor_is_listed_and_profiles_a_space(source: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    result = call("import", source, "--allow-unknown", "--folder", ours)
    assert result.exit_code == 0, result.output
    assert "toy" in call("list", "--folder", ours).output
    result = call(
        "profile", "toy", "--space", "tests.hwnas.tiny_space:TinyNet", "--folder", ours, "--allow-partial"
    )
    assert result.exit_code == 0, result.output
    for text in ("cheapest", "dearest", "not covered: "):
        assert text in result.output.replace("\n", "")


def test_planted_pickle_is_refused_in_a_line(source: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (source / "relu.pkl").write_bytes(pickle.dumps(Planted()))
    result = call("import", source, "--allow-unknown", "--folder", tmp_path / "ours")
    assert result.exit_code == 2
    assert "relu.pkl" in result.output
    assert "names posix.system" in result.output.replace("\n", " ")
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_told_in_a_line(tmp_path: Path) -> None:
    result = call("profile", "adreno640gpu_tflite21", "--folder", tmp_path)
    assert result.exit_code == 2
    assert "hwnas nnmeter import adreno640gpu_tflite21.zip" in result.output.replace("\n", " ")


def test_build_refuses_what_it_cannot_calibrate_on(tmp_path: Path) -> None:
    result = call("build", "--networks", 2, "--folder", tmp_path)
    assert result.exit_code == 2
    assert "networks must be at least 6; got 2" in result.output
