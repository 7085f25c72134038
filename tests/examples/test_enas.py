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


def test_a_search_stays_in_the_range_of_latency_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_by_size(monkeypatch)
    given = ("--smoke", "--out", str(tmp_path), "--accelerator", "cpu", "--space", "macro")
    table = ("--latency-filter", str(tmp_path / "table.json"))
    (anything,) = run_script(monkeypatch, "enas/search.py", *given, *table)["limits"]
    least = 0.9 * anything.max
    (limit,) = run_script(monkeypatch, "enas/search.py", *given, *table, "--min-latency", str(least))[
        "limits"
    ]
    assert anything.profiler.cost.bounds()[0] < least == limit.min
    assert (
        least <= limit.profiler.profile(json.loads((tmp_path / "architecture.json").read_text())) <= limit.max
    )


@pytest.mark.parametrize(
    "asked",
    [
        ("enas/search.py", "--max-latency", "1"),
        ("enas/search.py", "--min-latency", "1"),
        ("spos/search.py", "--min-latency", "1"),
        ("darts/search.py", "--max-latency", "1"),
    ],
    ids=" ".join,
)
def test_a_latency_without_a_table_is_refused(
    asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script(monkeypatch, *asked)
    assert "give --latency-filter, too" in capsys.readouterr().err
