from __future__ import annotations

from pathlib import Path

import pytest

from hwnas.certificate import Certificate, judge
from lookup_tables import LatencyReading
from tests.examples.running import EXAMPLES, measure_by_size, run_script

SCRIPT = "latency_constrained_search.py"


def test_the_tour_is_under_sixty_lines() -> None:
    assert len((EXAMPLES / SCRIPT).read_text().splitlines()) < 60


@pytest.mark.filterwarnings("ignore")  # a search of one epoch decides little, and says so
def test_the_tour_ends_with_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_by_size(monkeypatch)  # the file itself is really measured
    found = run_script(monkeypatch, SCRIPT, "--smoke", "--out", str(tmp_path), "--accelerator", "cpu")
    certificate = Certificate.load(tmp_path / "subnet.onnx")
    assert certificate == Certificate.load(tmp_path / "certificate.json") == found["proof"]
    assert certificate.predicted_ms <= certificate.budget_ms
    measured = certificate.measured_ms, certificate.measured_p10_ms, certificate.measured_p90_ms
    floor, clock = certificate.noise_floor_percent, certificate.clock
    reading = LatencyReading(*measured, floor, clock, certificate.valid, certificate.reason)
    assert certificate.passed == judge(reading, certificate.budget_ms)[0]
    assert certificate.test_accuracy == found["right"]
    assert 0 < found["right"] < 1
    assert ("; passed" in capsys.readouterr().out) == certificate.passed
