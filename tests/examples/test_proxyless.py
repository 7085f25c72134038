from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hwnas.certificate import Certificate
from lookup_tables import LookupTable
from tests.examples.running import measure_by_size, read_by_size, run_script

pytestmark = pytest.mark.filterwarnings("ignore")  # a search of two epochs decides little, and says so


def search(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str):
    return run_script(
        monkeypatch, "proxyless/search.py", "--smoke", "--out", str(out), "--accelerator", "cpu", *arguments
    )


def test_a_network_is_searched_retrained_and_certified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_by_size(monkeypatch)
    read_by_size(monkeypatch)
    searched = search(monkeypatch, tmp_path)
    architecture = json.loads((tmp_path / "architecture.json").read_text())
    assert searched["latency"].profile(architecture) <= searched["reference"]

    # The authors' loss, with microseconds in the logarithms.
    probabilities = searched["strategy"].probabilities()
    expected = float(searched["latency"].cost.expected(probabilities))
    factor = 0.2 * (math.log(1000 * expected) / math.log(1000 * searched["reference"])) ** 0.3
    found = searched["penalty"](torch.tensor(2.0), probabilities)
    assert float(found) == pytest.approx(2 * factor, rel=1e-5)

    run_script(monkeypatch, "proxyless/retrain.py", "--smoke", "--out", str(tmp_path), "--accelerator", "cpu")
    report = json.loads((tmp_path / "retrain.json").read_text())
    certificate = Certificate.load(tmp_path / "subnet.onnx")
    assert report["architecture"] == architecture == certificate.architecture
    assert report["test_accuracy"] == pytest.approx(certificate.test_accuracy, abs=0.01)
    assert report["budget_ms"] == searched["reference"]

    # The same device for another search, with the other loss and a reference of its own.
    low, high = searched["latency"].cost.bounds()
    asked = low + 0.3 * (high - low)
    table = tmp_path / "latency_table.json"
    again = search(
        monkeypatch,
        tmp_path / "again",
        *("--device", str(table), "--ref-latency", str(asked), "--grad-reg-loss-type", "add#linear"),
    )
    assert LookupTable.load(tmp_path / "again" / "latency_table.json") == LookupTable.load(table)
    probabilities = again["strategy"].probabilities()
    expected = float(again["latency"].cost.expected(probabilities))
    found = again["penalty"](torch.tensor(2.0), probabilities)
    assert float(found) == pytest.approx(2 + 0.1 * (expected - asked) / asked, rel=1e-5)
    assert again["latency"].profile(again["architecture"]) <= asked
