from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch

from hwnas.certificate import Certificate
from lookup_tables import LookupTable
from tests.examples.running import measure_by_size, read_by_size, run_script

pytestmark = pytest.mark.filterwarnings("ignore")  # a supernet of one epoch has not learned much, and says so


def test_a_supernet_is_trained_searched_and_its_answer_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_by_size(monkeypatch)
    read_by_size(monkeypatch)
    out, smoke = ("--out", str(tmp_path)), "--smoke"

    trained = run_script(monkeypatch, "spos/supernet.py", smoke, *out, "--accelerator", "cpu")
    assert trained["space"].size == 8**2
    state = torch.load(tmp_path / "supernet.pt", weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained["space"].state_dict().items())

    # Both limits at once, the table being measured on the way.
    table = tmp_path / "device" / "table.json"
    limits = ("--max-macs", "90e3", "--latency-filter", str(table))
    searched = run_script(monkeypatch, "spos/search.py", smoke, *out, *limits)
    assert len(LookupTable.load(table).entries) == 2 * 8 + 3
    assert len(searched["found"].trials) == 8
    for trial in searched["found"].trials:
        assert trial.metrics["macs"] <= 90e3
        assert trial.metrics["latency_ms"] <= searched["most"]
    best = json.loads((tmp_path / "architecture.json").read_text())
    accuracies = [trial.metrics["accuracy"] for trial in searched["found"].trials]
    assert json.loads((tmp_path / "search.json").read_text())["accuracy"] == max(accuracies)

    # The same command goes on where it was: all of its trials are made already.
    capsys.readouterr()
    run_script(monkeypatch, "spos/search.py", smoke, *out, *limits)
    assert "\n0 {" not in capsys.readouterr().out
    assert json.loads((tmp_path / "architecture.json").read_text()) == best

    evaluated = run_script(monkeypatch, "spos/evaluation.py", smoke, *out, "--accelerator", "cpu")
    report = json.loads((tmp_path / "evaluation.json").read_text())
    certificate = Certificate.load(tmp_path / "subnet.onnx")
    assert report["budget_ms"] == certificate.budget_ms == searched["most"]
    assert report["architecture"] == best
    assert report["macs"] == searched["macs"].profile(best)
    assert report["file_accuracy"] == pytest.approx(report["test_accuracy"], abs=0.01)
    session = onnxruntime.InferenceSession(tmp_path / "subnet.onnx", providers=["CPUExecutionProvider"])
    image = torch.rand(1, 1, 28, 28)
    (scores,) = session.run(None, {"input": image.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(scores), evaluated["subnet"](image), rtol=1e-3, atol=1e-4)


def test_blocks_alone_are_searched_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--smoke", "--out", str(tmp_path), "--accelerator", "cpu", "--search", "blocks")
    trained = run_script(monkeypatch, "spos/supernet.py", *arguments, "--max-macs", "100e3")
    assert trained["space"].size == 4**2
    profiler = trained["within"].profiler
    assert profiler.cost.bounds()[1] > 100e3
    drawn = trained["trainer"].callbacks[0].sample(torch.Generator().manual_seed(0))
    assert profiler.profile(drawn) <= 100e3
