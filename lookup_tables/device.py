"""Which machine measured: numbers of one device say nothing about another."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import onnxruntime


@final
@dataclass(frozen=True)
class DeviceFingerprint:
    """What a measurement depends on, apart from the model and the session's settings.

    Attributes:
        cpu: the processor's name, as the operating system has it.
        architecture: instruction set, such as ``x86_64`` or ``aarch64``.
        cores: logical cores.
        system: operating system and release.
        python: version of Python.
        onnxruntime: version of ONNX Runtime.
        openvino: version of OpenVINO where that is what measures (``none``: not installed), else empty.

    >>> here = fingerprint()
    >>> DeviceFingerprint.from_json(here.to_json()) == here
    True
    >>> here.differences(here)
    []
    """

    cpu: str
    architecture: str
    cores: int
    system: str
    python: str
    onnxruntime: str
    openvino: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> DeviceFingerprint:
        """Reads what `to_json` wrote, with or without OpenVINO; facts it does not know are left aside.

        Raises:
            ValueError: a fact is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        facts = {"openvino": "", **facts}
        missing = [name for name in names if name not in facts]
        if missing:
            raise ValueError(
                f"a device fingerprint needs {', '.join(names)}; it lacks {', '.join(missing)}; "
                "measure again on that device"
            )
        return cls(**{name: facts[name] for name in names})

    def differences(self, other: DeviceFingerprint) -> list[str]:
        """What makes ``other`` another device, one line each; empty where its numbers hold here too.

        Another CPU, instruction set, number of cores or minor version of the runtime (its kernels change
        between these) is another device. The operating system's and Python's versions, and a patch of ONNX
        Runtime, are not.
        """
        compared = {
            "CPU": (self.cpu, other.cpu),
            "architecture": (self.architecture, other.architecture),
            "logical cores": (self.cores, other.cores),
            "ONNX Runtime": (_minor(self.onnxruntime), _minor(other.onnxruntime)),
            "OpenVINO": (_minor(self.openvino), _minor(other.openvino)),
        }
        if self.openvino and other.openvino:  # the runtime that did not measure does not matter
            del compared["ONNX Runtime"]
        return [
            f"{what}: {ours} against {theirs}" for what, (ours, theirs) in compared.items() if ours != theirs
        ]


def fingerprint(runtime: str = "onnxruntime") -> DeviceFingerprint:
    """The machine this runs on, for measurements by a runtime of `SessionSettings`."""
    return DeviceFingerprint(
        cpu=_cpu(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        onnxruntime=onnxruntime.__version__,
        openvino=_openvino() if runtime == "openvino" else "",
    )


def _openvino() -> str:
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _cpu() -> str:
    # `platform.processor` is empty or only the architecture on Linux and macOS.
    if platform.system() == "Linux":
        found = _linux_cpu(Path("/proc/cpuinfo"), Path("/proc/device-tree/model"))
    elif platform.system() == "Darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    else:
        found = ""
    return found or platform.processor() or f"unnamed {platform.machine()} processor"


def _linux_cpu(cpuinfo: Path, board: Path) -> str:
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    name = board.read_text(errors="replace").strip("\0\n ") if board.exists() else ""
    return cpu_name(text, name)


def cpu_name(cpuinfo: str, board: str) -> str:
    """The CPU's name and its family, model and stepping; on ARM, which has no name, the board's and parts."""
    pairs = [line.partition(":") for line in cpuinfo.splitlines()]
    values: dict[str, list[str]] = {}
    for key, _, value in pairs:
        values.setdefault(key.strip(), []).append(value.strip())
    if "model name" in values:
        # Clouds hide the product behind names such as "AMD EPYC": the numbers tell generations apart.
        numbers = [f"{key} {values[key][0]}" for key in ("cpu family", "model", "stepping") if key in values]
        return values["model name"][0] + (f" ({', '.join(numbers)})" if numbers else "")
    parts = [f"part {part}" for part in sorted(set(values.get("CPU part", [])))]
    return " ".join([*filter(None, [board]), *([f"({', '.join(parts)})"] if parts else [])])
