"""The promise: a budget, what was measured against it, and everything needed to check it again."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from hwnas.export import load_session, parity, read_metadata, write_metadata
from hwnas.run_folder import read_json, write_json
from lookup_tables import (
    DeviceFingerprint,
    LatencyReading,
    LookupTable,
    SessionSettings,
    fingerprint,
    measure_latency,
)
from lookup_tables.quantise import quantised_nodes
from profilers import LatencyProfiler, count_macs, count_parameters
from profilers.space import Architecture

# A fresh measurement may lie above the budget by the noise floor, but never by more than this.
_LARGEST_TOLERANCE_PERCENT = 2.0
_LARGEST_DIFFERENCE = 1e-3
_READINGS = 5


@final
@dataclass(frozen=True)
class Certificate:
    """What a network was promised to cost and what it was measured to cost.

    Attributes:
        passed: the fresh latency keeps to the budget, on the device of the table, in a valid measurement.
        valid: the noise floor was low enough for the measurement to say anything.
        reason: why it passed or did not, in words.
        budget_ms: what was asked.
        predicted_ms: what the latency table said; None where none was asked.
        predicted_interval_ms: between which two numbers the table expected the measurement.
        measured_ms: the latency in a measurement taken after the selection: of samples of a millisecond the
            10th percentile, as in the table (`lookup_tables.measure` says why).
        measured_p10_ms, measured_median_ms, measured_p90_ms: of these samples.
        noise_floor_percent: median absolute difference of two interleaved measurements of the file.
        clock: ``thread_cpu`` or ``wall``.
        test_accuracy: share of right answers on the test set, of the file itself, by the session's runtime.
        parity_max_abs_diff: largest difference between torch's outputs and the file's; of a file in INT8
            what the quantisation changes.
        macs, params: multiply-adds and parameters, in the published convention.
        architecture: the options, by label.
        space, data, strategy, seed: how it was found; the strategy is ``given`` where an architecture was.
        device: fingerprint of the machine that measured.
        runtime: versions and session settings.
        date: of the measurement, ISO 8601.
    """

    passed: bool
    valid: bool
    reason: str
    budget_ms: float
    predicted_ms: float | None
    predicted_interval_ms: tuple[float, float] | None
    measured_ms: float
    measured_p10_ms: float
    measured_median_ms: float
    measured_p90_ms: float
    noise_floor_percent: float
    clock: str
    test_accuracy: float | None
    parity_max_abs_diff: float
    macs: float
    params: float
    architecture: Architecture
    space: str
    data: str
    strategy: str
    seed: int
    device: dict[str, Any]
    runtime: dict[str, Any]
    date: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any], source: str) -> Certificate:
        """Raises ``ValueError`` where a fact is missing."""
        names = [field.name for field in dataclasses.fields(cls)]
        if "measured_ms" in facts:  # it was the median once
            facts = {"measured_median_ms": facts["measured_ms"], **facts}
        missing = [name for name in names if name not in facts]
        if missing:
            raise ValueError(
                f"'{source}' carries no certificate: it lacks {', '.join(missing[:5])}"
                f"{' and more' if len(missing) > 5 else ''}; certificates are written by "
                "`hwnas search`"
            )
        found = {name: facts[name] for name in names}
        if found["predicted_interval_ms"] is not None:
            found["predicted_interval_ms"] = tuple(map(float, found["predicted_interval_ms"]))
        return cls(**found)

    def save(self, onnx_path: Path, json_path: Path) -> None:
        """Writes it into the ONNX file's metadata, and into a file in JSON."""
        write_metadata(onnx_path, self.to_json())
        write_json(json_path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """From a file's metadata (ONNX, or ONNX Runtime's mobile format), or from ``certificate.json``.

        Raises:
            ValueError: the file is absent or damaged, or carries no certificate.
        """
        if path.suffix == ".json":
            return cls.from_json(read_json(path, "certificate"), str(path))
        return cls.from_json(read_metadata(path), str(path))


def judge(reading: LatencyReading, budget_ms: float) -> tuple[bool, str]:
    """Whether a measurement keeps to a budget, and why.

    It passes if the latency is at most ``budget * (1 + min(noise floor, 2 %))``; an invalid measurement
    does not pass.
    """
    if not reading.valid:
        return False, f"invalid measurement: {reading.reason}"
    tolerance = min(reading.noise_floor_percent, _LARGEST_TOLERANCE_PERCENT)
    allowed = budget_ms * (1 + tolerance / 100)
    share = 100 * reading.p10_ms / budget_ms
    if reading.p10_ms <= allowed:
        return True, f"measured {reading.p10_ms:.4f} ms, {share:.1f} % of the budget"
    return False, (
        f"measured {reading.p10_ms:.4f} ms, {share:.1f} % of the budget; at most {allowed:.4f} ms "
        f"(the budget and the noise floor of {tolerance:.2f} %) would pass"
    )


def deployed_session(
    table: LookupTable | None,
    threads: int | None = None,
    optimisation: str | None = None,
    runtime: str | None = None,
    int8: bool = False,
) -> SessionSettings:
    """How a file will be run: as its latency table was measured, else as is asked, else as usual.

    Raises:
        ValueError: an unknown setting, or one that the table was not measured with.
    """
    asked: dict[str, Any] = {  # checked by the class
        "threads": threads,
        "optimisation": optimisation,
        "runtime": runtime,
        "precision": "int8" if int8 else None,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if table is None:
        return SessionSettings(**given)
    if different := [n for n, value in given.items() if getattr(table.settings, n) != value]:
        raise ValueError(
            f"the latency table was measured with {table.settings}; what is asked differs in "
            f"{', '.join(different)}: leave that to the table, or give one that was measured so"
        )
    return table.settings


def judged(reading: LatencyReading, budget_ms: float, table: LookupTable | None) -> tuple[bool, str]:
    """As `judge`; a budget by the table of another device is not passed on this one."""
    others = table.device.differences(fingerprint(table.settings.runtime)) if table is not None else []
    if others:
        return False, (
            f"the budget is for another device ({'; '.join(others)}): measure there, with "
            "`hwnas verify subnet.onnx`"
        )
    return judge(reading, budget_ms)


def patient_reading(
    path: Path,
    settings: SessionSettings,
    say: Callable[[str], None] = lambda line: None,
    readings: int = _READINGS,
) -> LatencyReading:
    """A valid reading, or the last of a few that were not: a busy machine may calm down.

    Only whether a reading is valid decides, never what it reads. One takes some six seconds.
    """
    if readings < 1:
        raise ValueError(f"readings must be at least 1, got {readings}")
    for _ in range(readings):
        reading = measure_latency(path, settings)
        if reading.valid:
            break
        say(f"a measurement is dropped: {reading.reason}")
    return reading


def certify(
    path: Path,
    subnet: nn.Module,
    latency: LatencyProfiler,
    architecture: Architecture,
    budget_ms: float,
    inputs: Iterable[Tensor],
    *,
    test_accuracy: float | None = None,
    space: str = "",
    data: str = "",
    strategy: str = "",
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
    readings: int = _READINGS,
) -> Certificate:
    """Measures an exported subnet on this machine, judges it, and writes its certificate.

    The certificate goes into the file's metadata and beside it, as ``certificate.json``.

    Args:
        path: what `hwnas.export.export_onnx` wrote, or `hwnas.mobile.quantise_file` where the table is of
            INT8.
        subnet: what was exported; the file is compared with it.
        latency: by the table that the budget is of.
        architecture: of the subnet.
        budget_ms: what was asked.
        inputs: batches on which file and subnet are compared, at least one; real ones, if there are any.
        test_accuracy: share of right answers of the file, where it classifies.
        space, data, strategy, seed: how it was found.
        facts: more of the file, for its metadata alone: other metrics than the accuracy, say.
        say: told when a measurement is not valid and is repeated.
        readings: how often it is measured at most, until a measurement is valid.

    Raises:
        ValueError: the file is absent or damaged, or is in another precision than the table; or its outputs
            differ by more than 0.001 from the subnet's (in INT8: are no numbers).
    """
    batches = list(inputs)
    settings = latency.table.settings
    check_precision(path, settings)
    difference = parity(subnet, path, batches, settings.runtime)
    check_parity(difference, path, is_quantised=settings.precision != "fp32")
    reading = patient_reading(path, settings, say, readings)
    passed, reason = judged(reading, budget_ms, latency.table)
    certificate = Certificate(
        passed=passed,
        valid=reading.valid,
        reason=reason,
        budget_ms=budget_ms,
        predicted_ms=latency.profile(architecture),
        predicted_interval_ms=latency.interval(architecture),
        measured_ms=reading.p10_ms,
        measured_p10_ms=reading.p10_ms,
        measured_median_ms=reading.median_ms,
        measured_p90_ms=reading.p90_ms,
        noise_floor_percent=reading.noise_floor_percent,
        clock=reading.clock,
        test_accuracy=test_accuracy,
        parity_max_abs_diff=difference,
        macs=float(count_macs(subnet, [batches[0][:1]]).headline),
        params=float(count_parameters(subnet)),
        architecture=architecture,
        space=space,
        data=data,
        strategy=strategy,
        seed=seed,
        device=fingerprint(settings.runtime).to_json(),
        runtime=runtime_facts(settings),
        date=now(),
    )
    write_metadata(path, facts or {})
    certificate.save(path, path.with_name("certificate.json"))
    return certificate


def check_parity(difference: float, path: Path, is_quantised: bool) -> None:
    """Raises ``ValueError`` where a file does not compute what torch does, by the largest difference.

    One in INT8 does not; that it gives numbers is all that is asked of it.
    """
    if not math.isfinite(difference):
        raise ValueError(
            f"torch, or the file, gives outputs that are no numbers: '{path}' is not to be used. Are the "
            "weights sound?"
        )
    if difference > _LARGEST_DIFFERENCE and not is_quantised:
        raise ValueError(
            f"the exported file and torch differ by {difference:.2g}, more than {_LARGEST_DIFFERENCE:g}: "
            f"'{path}' is not to be used"
        )


def check_precision(path: Path, settings: SessionSettings) -> None:
    """Raises ``ValueError`` where a file computes in another precision than the settings say."""
    load_session(path)  # tells of a file that is none
    found = "int8" if quantised_nodes(path.read_bytes()) else "fp32"
    if found != settings.precision:
        raise ValueError(
            f"'{path}' computes in {found}, and the latency table is of {settings.precision}: it says "
            "nothing about this file. Quantise it (hwnas.mobile.quantise_file), or take a table of its "
            "precision"
        )


def runtime_facts(settings: SessionSettings) -> dict[str, Any]:
    """Versions and session settings, as a certificate has them."""
    openvino = fingerprint(settings.runtime).openvino
    return {
        **({"openvino": openvino} if openvino else {}),
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "session": settings.to_json(),
    }


def now() -> str:
    """The date and time, ISO 8601, to the second, with the time zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


@final
@dataclass(frozen=True)
class Verification:
    """A certificate checked again here and now."""

    certificate: Certificate
    reading: LatencyReading
    holds: bool
    reason: str
    other_device: list[str]


def verify(path: Path) -> Verification:
    """Reads a file's certificate, measures the file again on this machine, and judges.

    Raises:
        ValueError: the file is absent or damaged, or carries no certificate.
    """
    certificate = Certificate.load(path)
    settings = SessionSettings.from_json(certificate.runtime["session"])
    differences = DeviceFingerprint.from_json(certificate.device).differences(fingerprint(settings.runtime))
    reading = patient_reading(path, settings)
    holds, reason = judge(reading, certificate.budget_ms)
    return Verification(certificate, reading, holds, reason, differences)
