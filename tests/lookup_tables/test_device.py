import dataclasses
import re
from pathlib import Path

import pytest

from lookup_tables.device import DeviceFingerprint, _linux_cpu, fingerprint


def test_fingerprint_is_the_same_each_time_and_after_json() -> None:
    here = fingerprint()
    assert here == fingerprint() == DeviceFingerprint.from_json(here.to_json())
    assert here.cpu
    assert here.differences(fingerprint()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cpu": "Other"}, "CPU: .* against Other"),
        ({"architecture": "riscv64"}, "architecture: .* against riscv64"),
        ({"cores": 999}, "logical cores: .* against 999"),
        ({"onnxruntime": "1.2.3"}, r"ONNX Runtime: .* against 1\.2"),
    ],
)
def test_each_difference_that_changes_times_is_named(change: dict[str, object], said: str) -> None:
    here = fingerprint()
    (line,) = here.differences(dataclasses.replace(here, **change))  # type: ignore[arg-type]  # test's own
    assert re.match(said, line)


def test_runtime_that_measured_is_the_one_whose_version_counts() -> None:
    here = fingerprint()
    assert here.openvino == ""
    measured = dataclasses.replace(here, openvino="2026.4.1")
    newer = dataclasses.replace(measured, openvino="2026.5.0", onnxruntime="1.2.3")
    assert measured.differences(newer) == ["OpenVINO: 2026.4 against 2026.5"]
    assert measured.differences(dataclasses.replace(newer, openvino="2026.4.0")) == []
    assert any("OpenVINO" in line for line in measured.differences(here))


def test_fingerprint_of_earlier_versions_is_one_of_onnx_runtime() -> None:
    facts = fingerprint().to_json()
    del facts["openvino"]
    assert DeviceFingerprint.from_json(facts) == fingerprint()


def test_system_python_and_patch_versions_are_no_other_device() -> None:
    here = fingerprint()
    patched = dataclasses.replace(here, system="x", python="y", onnxruntime=here.onnxruntime + ".1")
    assert here.differences(patched) == []


def test_fingerprint_that_lacks_a_fact_is_refused() -> None:
    facts = fingerprint().to_json()
    del facts["cpu"]
    with pytest.raises(ValueError, match="lacks cpu; measure again"):
        DeviceFingerprint.from_json(facts)


def test_generations_behind_one_product_name_are_told_apart(tmp_path: Path) -> None:
    names = []
    for model in (1, 17):
        (tmp_path / "cpuinfo").write_text(f"model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: {model}\n")
        names.append(_linux_cpu(tmp_path / "cpuinfo", tmp_path / "none"))
    assert names == ["AMD EPYC (cpu family 25, model 1)", "AMD EPYC (cpu family 25, model 17)"]


def test_arm_board_is_named_by_model_and_parts(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nCPU part : 0xd0b\nprocessor : 1\nCPU part : 0xd0b\n")
    (tmp_path / "model").write_text("Raspberry Pi 5 Model B\0")
    assert _linux_cpu(tmp_path / "cpuinfo", tmp_path / "model") == "Raspberry Pi 5 Model B (part 0xd0b)"
