"""A table that another device has measured, by the commands: bundled, brought back, used."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hwnas import ModelSpace
from hwnas.cli import app
from lookup_tables import LookupTable, Measurement, SessionSettings, fingerprint
from lookup_tables.runner import Results, item_name
from profilers import LatencyProfiler
from tests.lookup_tables.test_bundle import small_models  # noqa: F401  # a fixture: nothing is exported
from tests.lookup_tables.test_remote import TwoLayers

SPACE = "tests.lookup_tables.test_remote:TwoLayers"
PHONE = replace(fingerprint(), cpu="Cortex-X3", cores=9)


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(text: str) -> str:
    return " ".join(text.split())


def measured(folder: Path, leave: int = 0) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [item_name(item) for item in manifest["measure"]]
    results = Results(folder / "results.jsonl")
    with results.recording(manifest, PHONE, {"clock": "wall", "cpus": [8]}):
        for n, name in enumerate(names[: len(names) - leave], start=10):
            results.add(name, Measurement(float(n), n - 1.0, n + 1.0, 56), {"celsius": None})
        for key, item in results.unprofiled().items():
            times = {place: (5.0 + place,) * 3 for place in range(len(item["calls"]))}
            results.add_profile(key, times, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = call("table", "bundle", tmp_path / "b", "--space", SPACE, "--threads", 2)
    assert result.exit_code == 0, result.output
    assert f"hwnas table import {tmp_path / 'b'}" in result.output
    return tmp_path / "b"


def test_imported_table_serves_the_space_it_was_bundled_for(folder: Path, tmp_path: Path) -> None:
    measured(folder)
    result = call("table", "import", folder, "--out", tmp_path / "phone.json")
    assert result.exit_code == 0, result.output
    assert "Cortex-X3, 9 cores" in one_line(result.output)
    assert "held-out error" in result.output
    table = LookupTable.load(tmp_path / "phone.json")
    assert (table.device, table.settings, table.space) == (PHONE, SessionSettings(threads=2), SPACE)
    space, images = ModelSpace(TwoLayers()), torch.zeros(1, 1, 28, 28)
    with pytest.raises(ValueError, match=r"another device .*Cortex-X3"):
        LatencyProfiler(space, images, table)
    with pytest.warns(UserWarning, match="another device"):
        profiler = LatencyProfiler(space, images, table, allow_other_device=True)
    default = space.default()
    assert profiler.profile(default) == pytest.approx(table.predict_us(profiler.keys(default)) / 1000)


def test_profiled_bundle_gives_a_profiled_table(tmp_path: Path) -> None:
    folder = tmp_path / "profiled"
    result = call("table", "bundle", folder, "--space", SPACE)
    assert result.exit_code == 0, result.output
    measured(folder)
    result = call("table", "import", folder, "--out", tmp_path / "phone.json")
    assert result.exit_code == 0, result.output
    table = LookupTable.load(tmp_path / "phone.json")
    assert {entry.method for entry in table.entries.values()} == {"profiled"}
    result = call("table", "bundle", tmp_path / "openvino", "--space", SPACE, "--runtime", "openvino")
    assert json.loads((tmp_path / "openvino" / "manifest.json").read_text())["method"] == "isolated"


def test_results_file_alone_is_enough(folder: Path, tmp_path: Path) -> None:
    measured(folder)
    alone = (folder / "results.jsonl").rename(tmp_path / "alone.jsonl")
    assert call("table", "import", alone, "--out", tmp_path / "phone.json").exit_code == 0
    assert LookupTable.load(tmp_path / "phone.json").device == PHONE


def test_half_a_measurement_is_no_table_and_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    measured(folder, leave=2)
    result = call("table", "import", folder, "--out", tmp_path / "phone.json")
    assert result.exit_code == 2
    assert re.search(r"2 of \d+ measurements are missing", one_line(result.output))
    assert "run `python3 measure.py`" in one_line(result.output)
    assert not (tmp_path / "phone.json").exists()


def test_table_of_another_device_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    measured(folder)
    out = tmp_path / "table.json"
    assert call("table", "import", folder, "--out", out).exit_code == 0
    assert call("table", "import", folder, "--out", out).exit_code == 0  # the same device's is
    replace(LookupTable.load(out), device=fingerprint()).save(out)
    before = out.read_bytes()
    result = call("table", "import", folder, "--out", out)
    assert result.exit_code == 2
    assert "holds another table (CPU: " in one_line(result.output)
    assert out.read_bytes() == before


def test_bundle_of_something_else_is_not_written_over(folder: Path) -> None:
    result = call("table", "bundle", folder, "--space", SPACE, "--threads", 1)
    assert result.exit_code == 2
    assert "holds another bundle; write into another folder" in one_line(result.output)
