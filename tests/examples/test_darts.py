from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from hwnas.spaces import DARTSCells
from hwnas.spaces.drop_path import DropPath
from tests.examples.running import measure_by_size, run_script

pytestmark = pytest.mark.filterwarnings("ignore")  # a search of three steps decides little, and says so


@pytest.mark.parametrize("order", ["1", "2"])
def test_cells_are_searched_and_retrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    given = ("--smoke", "--out", str(tmp_path), "--accelerator", "cpu")
    measure_by_size(monkeypatch)
    limits = {"1": ("--max-macs", "3e6"), "2": ("--latency-filter", str(tmp_path / "table.json"))}
    searched = run_script(monkeypatch, "darts/search.py", *given, "--order", order, *limits[order])
    architecture = json.loads((tmp_path / "architecture.json").read_text())
    ((profiler, most),) = searched["limit"].items()
    assert profiler.unit == {"1": "MAC", "2": "ms"}[order]
    assert profiler.profile(architecture) <= most < profiler.cost.bounds()[1]
    genotype = json.loads((tmp_path / "search.json").read_text())["genotype"]
    assert searched["space"].canonical(DARTSCells.architecture_of(genotype)) == searched["space"].canonical(
        architecture
    )
    if order == "2":
        return
    retrained = run_script(monkeypatch, "darts/retrain.py", *given)
    report = json.loads((tmp_path / "retrain.json").read_text())
    assert report["architecture"] == architecture
    assert report["onnx_accuracy"] == pytest.approx(report["test_accuracy"], abs=0.01)
    assert report["params"] == sum(p.numel() for p in retrained["subnet"].parameters())
    # Drop path has risen to a half of its end in the second of two epochs.
    dropped = {m.probability for m in retrained["subnet"].modules() if isinstance(m, DropPath)}
    assert dropped == {0.1}
    rows = list(csv.DictReader((tmp_path / "retrain" / "metrics.csv").open()))
    assert {row["epoch"] for row in rows if row["train_loss"]} == {"0", "1"}
