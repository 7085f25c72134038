from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.running import measure_by_size, run_script

pytestmark = pytest.mark.filterwarnings("ignore")  # a search of three steps decides little, and says so


@pytest.mark.parametrize("space", ["macro", "micro"])
def test_a_network_is_searched_and_retrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    given = ("--smoke", "--out", str(tmp_path), "--accelerator", "cpu")
    measure_by_size(monkeypatch)
    filters = ("--latency-filter", str(tmp_path / "table.json")) if space == "macro" else ()
    searched = run_script(monkeypatch, "enas/search.py", *given, "--space", space, *filters)
    architecture = json.loads((tmp_path / "architecture.json").read_text())
    searched["space"].validate(architecture)
    assert len(searched["limits"]) == len(filters[1:])
    for limit in searched["limits"]:
        assert limit.profiler.profile(architecture) <= limit.max < limit.profiler.cost.bounds()[1]
    retrained = run_script(monkeypatch, "enas/retrain.py", *given)
    report = json.loads((tmp_path / "retrain.json").read_text())
    assert retrained["space"].options == searched["space"].options
    assert report["architecture"] == architecture
    assert report["onnx_accuracy"] == pytest.approx(report["test_accuracy"], abs=0.01)
    assert bool(retrained["dropped"]) == (space == "micro")
    assert (tmp_path / "subnet.pt").exists()
