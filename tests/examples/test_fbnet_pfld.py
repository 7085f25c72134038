from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from hwnas.certificate import Certificate
from hwnas.export import read_metadata
from lookup_tables import LookupTable
from tests.examples.running import EXAMPLES, measure_by_size, read_by_size, run_script

QUIET = pytest.mark.filterwarnings("ignore")  # a search of two epochs decides little, and says so


@QUIET
def test_a_network_is_searched_trained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_by_size(monkeypatch)
    read_by_size(monkeypatch)
    data, out = tmp_path / "data", tmp_path / "out"
    folders = ("--data", str(data), "--out", str(out))

    searched = run_script(monkeypatch, "fbnet_pfld/search.py", "--smoke", *folders, "--accelerator", "cpu")
    assert "SYNTHETIC" in capsys.readouterr().out
    architecture = json.loads((out / "architecture.json").read_text())
    assert searched["latency"].profile(architecture) <= searched["budget_ms"]
    table = LookupTable.load(out / "latency_table.json")
    assert len(table.entries) == 9 + 9 + 9 + 3  # equal layers share theirs; stem, reduction, head

    trained = run_script(monkeypatch, "fbnet_pfld/retrain.py", "--smoke", *folders, "--accelerator", "cpu")
    report = json.loads((out / "retrain.json").read_text())
    assert report["architecture"] == architecture
    assert 0 < report["test_nme"] < 10

    run_script(monkeypatch, "fbnet_pfld/export.py", *folders)
    certificate = Certificate.load(out / "subnet.onnx")
    assert certificate == Certificate.load(out / "certificate.json")
    assert certificate.architecture == architecture
    assert certificate.parity_max_abs_diff < 1e-3
    # The file's error is that of the trained network, as its own test said.
    assert read_metadata(out / "subnet.onnx")["test_nme"] == pytest.approx(report["test_nme"], rel=1e-3)
    assert f"{100 * report['test_nme']:.2f} %" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "subnet.onnx", providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 28, 28)
    (landmarks,) = session.run(None, {"input": image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(landmarks, trained["subnet"].eval()(image), atol=1e-3)
    assert landmarks.shape == (1, 212)  # no pose


@pytest.fixture
def faces(monkeypatch: pytest.MonkeyPatch):
    """The modules beside the scripts."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "fbnet_pfld"))
    import faces
    import synthetic_faces

    yield faces, synthetic_faces
    for name in ("faces", "synthetic_faces", "face_shape"):
        del sys.modules[name]


def test_synthetic_faces_have_the_landmarks_that_are_drawn(faces) -> None:
    _, synthetic = faces
    for number in range(20):
        image, landmarks, angles = synthetic.make_face(np.random.default_rng((0, number)), 112)
        assert landmarks.shape == (106, 2)
        assert landmarks.min() > 0
        assert landmarks.max() < 1
        # 35 and 93 are the outer corners of the eyes, in the face's own direction: across, by its roll.
        across = np.array([np.cos(angles[2]), np.sin(angles[2])])
        eyes = landmarks[np.r_[33:41, 87:95]] @ across
        assert np.abs(angles[1]) > 0.5 or (eyes.argmin(), eyes.argmax()) == (2, 14), number
        again, *_ = synthetic.make_face(np.random.default_rng((0, number)), 112)
        assert image.tobytes() == again.tobytes()


def test_a_list_file_is_read_with_and_without_attributes(faces, tmp_path: Path) -> None:
    data, synthetic = faces
    synthetic.write_faces(tmp_path, train=2, test=1, size=40)
    path = tmp_path / "train_data" / "list.txt"
    plain = data.ListFile(tmp_path, "train_data", 40)
    name, *numbers = path.read_text().splitlines()[0].split()
    image, targets = plain[0]
    assert image.shape == (3, 40, 40)
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    torch.testing.assert_close(targets, torch.tensor([float(x) for x in numbers]))
    path.write_text(" ".join([name, *numbers[:212], "0 1 0 0 1 0", *numbers[212:]]) + "\n")
    assert torch.equal(data.ListFile(tmp_path, "train_data", 40)[0][1], targets)
    path.write_text(" ".join([name, *numbers[:200]]) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* needs a path, 212 coordinates"):
        data.ListFile(tmp_path, "train_data", 40)
