from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lookup_tables import LookupTable
from tests.examples.running import measure_by_size, run_script


@pytest.mark.filterwarnings("ignore")  # a search of one epoch decides little, and says so
def test_every_device_gets_a_winner_within_its_own_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_by_size(monkeypatch)
    ran = run_script(
        monkeypatch, "multi_device.py", "--smoke", "--out", str(tmp_path), "--accelerator", "cpu"
    )
    names = list(ran["DEVICES"])
    assert len({LookupTable.load(tmp_path / f"{name}.json").settings for name in names}) == 3
    facts = json.loads((tmp_path / "devices.json").read_text())
    for name in names:
        assert facts["costs_ms"][name][name] <= facts["budgets_ms"][name]
        for other in names:
            cost = ran["latencies"][other].profile(facts["winners"][name])
            assert facts["costs_ms"][name][other] == pytest.approx(cost)
    assert ran["regret"].shape == (3, 3)
    assert (ran["regret"].diagonal() == 0).all()
    assert "points of accuracy lost" in capsys.readouterr().out
    with Image.open(tmp_path / "regret.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn
