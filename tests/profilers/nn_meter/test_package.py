from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
from profilers.nn_meter.package import registered
assert "nn_meter" not in sys.modules
names = registered(Path(sys.argv[1]))
assert "nn_meter" in sys.modules
print(*names)
"""


def test_nothing_is_written_at_home_nor_told_and_pkg_resources_is_not_needed(tmp_path: Path) -> None:
    home, ours = tmp_path / "home", tmp_path / "ours"
    home.mkdir()
    # What is imported under this name fails: nn-Meter gets our stand-in.
    (tmp_path / "pkg_resources.py").write_text("raise ModuleNotFoundError('gone with setuptools 82')")
    found = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", PROGRAM, str(ours)],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [
        "cortexA76cpu_tflite21",
        "adreno640gpu_tflite21",
        "adreno630gpu_tflite21",
        "myriadvpu_openvino2019r2",
    ]
    assert {path.name for path in home.iterdir()} <= {".cache"}  # ONNX Runtime's own
    assert not [path for path in home.rglob("*") if "meter" in path.name]
    assert (ours / "config" / "predictors.yaml").is_file()
