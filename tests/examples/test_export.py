"""The script that exports an architecture and a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from hwnas import ModelSpace
from hwnas.certificate import Certificate
from profilers import LatencyProfiler
from tests.examples.running import read_by_size, run_script
from tests.hwnas.tiny_space import EXAMPLE, TinyNet, tiny_table


def test_architecture_and_checkpoint_become_a_certified_file(tmp_path, monkeypatch, capsys):
    read_by_size(monkeypatch)
    space = ModelSpace(TinyNet())
    architecture, checkpoint, out = (tmp_path / name for name in ("a.json", "last.ckpt", "net.onnx"))
    architecture.write_text(json.dumps(space.default()))
    torch.save(space.freeze(space.default()).state_dict(), checkpoint)
    tiny_table().save(tmp_path / "table.json")
    given = [
        str(architecture),
        str(checkpoint),
        "--space",
        "tests.hwnas.tiny_space:TinyNet",
        "--out",
        str(out),
    ]
    run_script(monkeypatch, "export.py", *given)
    assert "parity with torch" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run_script(
            monkeypatch,
            "export.py",
            *given,
            "--max-latency-ms",
            "9",
            "--device",
            str(tmp_path / "table.json"),
        )
    assert ended.value.code == 0
    predicted = LatencyProfiler(space, EXAMPLE, tiny_table()).profile(space.default())
    assert Certificate.load(out).predicted_ms == predicted
    assert str(predicted) in capsys.readouterr().out
