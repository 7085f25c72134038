"""Builds an nn-Meter of this machine: times kernels within networks, fits predictors, registers them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import onnx

from lookup_tables import Measurement, SessionSettings, fingerprint, measure
from lookup_tables.build import Measure
from lookup_tables.calibrate import calibrate, cross_validated
from lookup_tables.profiled import Profile, profile
from lookup_tables.progress import Progress
from profilers.nn_meter.audit import Graph
from profilers.nn_meter.fusion import fusion_rules
from profilers.nn_meter.kernels import networks
from profilers.nn_meter.package import DetectedKernel, Detector, default_folder
from profilers.nn_meter.predictor import NnMeterPredictor, save_predictor
from profilers.nn_meter.regression import KernelPredictor

if TYPE_CHECKING:
    from lookup_tables.profiled import PartTimes

_SCHEMA = "hwnas nn-Meter being built, version 3"
_LEAST_US = 0.3  # what a profiler cannot tell from nothing still is a kernel
_DISCOUNT_US = 1.5  # what a profile has too much of a kernel: its share of the session, and the rounding


@final
@dataclass(frozen=True)
class BuildSettings:
    """What is measured.

    Attributes:
        networks: how many random networks have their kernels timed; each has a dozen of them.
        calibrating: how many others the sum of kernels is calibrated on; at least 6.
        resolution: of the images: kernels on larger ones are not covered.
        channels: of a layer, at most.
        largest_mmacs: millions of multiply-adds of a kernel, at most.
        seed: of every draw.

    Raises:
        ValueError: a number is too small.
    """

    networks: int = 200
    calibrating: int = 48
    resolution: int = 32
    channels: int = 640
    largest_mmacs: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"networks": 6, "calibrating": 6, "resolution": 16, "channels": 64, "largest_mmacs": 1.0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number:g}; got {getattr(self, name):g}")


def build_predictor(
    name: str,
    settings: SessionSettings,
    *,
    build: BuildSettings | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    measurer: Measure = measure,
    profiling: Profile = profile,
) -> NnMeterPredictor:
    """Times the kernels of random networks, and other networks whole; fits one predictor a kind of kernel.

    nn-Meter measures kernels alone. A kernel alone pays for bringing its data into the runtime's layout and
    back, and finds it in the cache; so here they are timed by ONNX Runtime's profiler while a network runs
    around them. Their sum is calibrated on other networks, which are measured twice, as a lookup table is
    (``scale * sum + per_kernel * n + constant``): the first two become part of each kernel's predictor, the
    constant stands beside them. Predictors are registered by nn-Meter's own mechanism (``nn-meter register
    --predictor``).

    Every measurement is appended to a journal as it is made; a build that was killed measures none of them
    again.

    Args:
        name: of the predictor.
        settings: of the sessions, as they will be deployed.
        build: what is measured.
        folder: of all predictors.
        progress: told what is being done, how much of it is done, and how much there is.
        measurer: measures models.
        profiling: times the kernels of models.

    Raises:
        ValueError: nn-Meter is not installed.

    Warns:
        UserWarning: a journal of another device or of other settings is dropped.
    """
    build, folder = build or BuildSettings(), folder or default_folder()
    report = progress or (lambda what, done, total: None)
    location = folder / "predictors" / name
    location.mkdir(parents=True, exist_ok=True)
    rules = fusion_rules(settings)
    rules_path = location / "fusion_rules.json"
    rules_path.write_bytes(rules)
    detector = Detector(rules_path, folder)
    drawn = networks(
        build.networks + build.calibrating,
        build.resolution,
        build.channels,
        build.largest_mmacs * 1e6,
        build.seed,
    )
    timed, whole = drawn[: build.networks], drawn[build.networks :]
    journal = _Journal(location.with_name(f"{name}.building.jsonl"), settings)
    journal.time(timed, build.seed, report, profiling)
    journal.measure(whole, build.seed, report, measurer)
    report("fitting", 0, 1)
    found = [kernel for net in timed for kernel in _timed(detector, net, journal.parts(net))]
    kernels = _fitted(found, build.seed)
    sums, counts = zip(*(_sum(kernels, detector, net) for net in whole), strict=True)
    once, again = ([journal.us(net, turn) for net in whole] for turn in (1, 2))
    means = [(first + second) / 2 for first, second in zip(once, again, strict=True)]
    calibration = calibrate(sums, counts, means, _DISCOUNT_US)
    facts: dict[str, Any] = {
        "source": "built here",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": fingerprint().to_json(),
        "settings": settings.to_json(),
        "build": {**asdict(build), "kernels": len(found)},
        "constant_ms": calibration.constant_us / 1e3,
        "calibration": asdict(calibration),
        "accuracy": asdict(cross_validated(sums, counts, once, again, _DISCOUNT_US)),
    }
    in_networks = [predictor.calibrated(calibration) for predictor in kernels.values()]
    save_predictor(name, in_networks, rules, facts, folder)
    journal.remove()
    report("fitting", 1, 1)
    return NnMeterPredictor.load(name, folder)


def _detected(detector: Detector, model: bytes) -> list[DetectedKernel]:
    loaded = onnx.load_from_string(model)
    graph = Graph(loaded)
    return [kernel for kernel in detector.kernels(loaded, graph.problems) if not graph.is_free(kernel.nodes)]


def _timed(detector: Detector, model: bytes, parts: PartTimes) -> list[tuple[DetectedKernel, float]]:
    """A network's kernels with their microseconds; without those that the runtime does not run as one."""
    found = []
    for kernel in _detected(detector, model):
        own = [int(name[1:].partition(".")[0]) for name in kernel.nodes]
        times = [float(np.median(parts[node])) for node in own if node in parts]
        if len(times) == 1:
            found.append((kernel, times[0]))
    return found


def _fitted(timed: Iterable[tuple[DetectedKernel, float]], seed: int) -> dict[str, KernelPredictor]:
    """By kind."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    times: dict[str, list[float]] = {}
    for kernel, us in timed:
        assert kernel.features is not None  # it is one of ours
        rows.setdefault(kernel.predictor, []).append(kernel.features)
        times.setdefault(kernel.predictor, []).append(max(us, _LEAST_US))
    return {kind: KernelPredictor.fitted(kind, rows[kind], times[kind], seed) for kind in rows}


def _sum(predictors: Mapping[str, KernelPredictor], detector: Detector, model: bytes) -> tuple[float, int]:
    """A network's kernels, in microseconds, and how many they are."""
    kernels = _detected(detector, model)
    times = [predictors[k.predictor].predict([k.features or ()])[0] for k in kernels]
    return 1e3 * float(sum(times)), len(kernels)


@final
class _Journal:
    """What was measured so far, line by line, by digest of the model: equal models are measured once."""

    def __init__(self, path: Path, settings: SessionSettings) -> None:
        self._path = path
        self._settings = settings
        self._header = {"schema": _SCHEMA, "device": fingerprint().to_json(), "settings": settings.to_json()}
        self._found: dict[str, float] = {}
        self._parts: dict[str, PartTimes] = {}
        if path.exists():
            self._resume()
        if not path.exists():
            self._append(self._header)

    def parts(self, model: bytes) -> PartTimes:
        """Microseconds of a model's nodes."""
        return self._parts[_name(model)]

    def us(self, model: bytes, turn: int) -> float:
        """The latency of a whole model, in microseconds, in the first or second turn."""
        return self._found[f"{_name(model)} {turn}"]

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def time(self, nets: Sequence[bytes], seed: int, report: Progress, profiling: Profile) -> None:
        """Times the nodes of the networks that are missing."""
        missing = {_name(net): net for net in nets if _name(net) not in self._parts}
        profiling(
            missing,
            self._settings,
            seed=seed,
            progress=lambda done, total: report("timing kernels", done, total),
            on_result=self._add_parts,
        )

    def measure(self, nets: Sequence[bytes], seed: int, report: Progress, measurer: Measure) -> None:
        """Measures what is missing, both turns mixed: drift is noise then."""
        wanted = {f"{_name(net)} {turn}": net for net in nets for turn in (1, 2)}
        missing = [name for name in wanted if name not in self._found]
        random.Random(seed).shuffle(missing)
        if not missing:
            return
        measurer(
            {name: wanted[name] for name in missing},
            self._settings,
            reference=sorted(nets, key=len)[len(nets) // 2],
            seed=seed,
            progress=lambda done, total: report("measuring", done, total),
            on_result=self._add,
        )

    def _add_parts(self, name: str, parts: PartTimes) -> None:
        self._append({"model": name, "parts": {str(node): times for node, times in parts.items()}})
        self._parts[name] = parts

    def _add(self, name: str, measured: Measurement) -> None:
        self._append({"model": name, "us": measured.p10_us})
        self._found[name] = measured.p10_us

    def _resume(self) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]  # the last may have been cut off
        try:
            header, *records = map(json.loads, whole)
            if header == self._header:
                for record in records:
                    self._take(record)
                os.truncate(self._path, sum(map(len, whole)))
                return
            reason = "it is of another device, or of other settings"
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it is damaged: {error}"
        self._path.unlink()
        warnings.warn(
            f"'{self._path}' cannot be gone on with ({reason}): measuring starts afresh", stacklevel=4
        )

    def _take(self, record: Mapping[str, Any]) -> None:
        if "us" in record:
            self._found[record["model"]] = float(record["us"])
        else:
            parts = {int(node): tuple(times) for node, times in record["parts"].items()}
            self._parts[record["model"]] = parts

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _name(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()[:16]
