"""Builds an nn-Meter of this machine: measures kernels and networks, fits predictors, registers them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import onnx

from lookup_tables import Measurement, SessionSettings, fingerprint, measure
from lookup_tables.build import Measure
from lookup_tables.calibrate import calibrate, cross_validated
from lookup_tables.progress import Progress
from profilers.nn_meter.audit import Graph
from profilers.nn_meter.fusion import fusion_rules
from profilers.nn_meter.kernels import Network, kernel_model, networks, sampled
from profilers.nn_meter.package import DetectedKernel, Detector, default_folder
from profilers.nn_meter.predictor import NnMeterPredictor, save_predictor
from profilers.nn_meter.regression import KernelPredictor

_SCHEMA = "hwnas nn-Meter being built, version 1"
_LEAST_US = 0.3  # a kernel that is no dearer than the session's overhead still is one
_DISCOUNT_US = (
    1.5  # for what a kernel alone pays and one in a network does not: bringing data into its layout
)


@final
@dataclass(frozen=True)
class BuildSettings:
    """What is measured.

    Attributes:
        kernels: how many kernels, of all kinds.
        networks: how many whole networks the sum of kernels is calibrated on; at least 6.
        resolution: of the images: kernels on larger ones are not covered.
        channels: of a layer, at most.
        largest_mmacs: millions of multiply-adds of a kernel, at most.
        seed: of every draw.

    Raises:
        ValueError: a number is too small.
    """

    kernels: int = 260
    networks: int = 24
    resolution: int = 32
    channels: int = 640
    largest_mmacs: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"kernels": 1, "networks": 6, "resolution": 16, "channels": 64, "largest_mmacs": 1.0}
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
) -> NnMeterPredictor:
    """Measures kernels alone, and whole networks twice; fits one predictor a kind of kernel to the first.

    A kernel alone pays for bringing its data into the runtime's layout, and finds it in the cache. So the sum
    over kernels is calibrated on networks, as a lookup table is (``scale * sum + per_kernel * n +
    constant``): the first two become part of each kernel's predictor, the constant stands beside them.
    Predictors are registered by nn-Meter's own mechanism (``nn-meter register --predictor``).

    Every measurement is appended to a journal as it is made; a build that was killed measures none of them
    again.

    Args:
        name: of the predictor.
        settings: of the sessions, as they will be deployed.
        build: what is measured.
        folder: of all predictors.
        progress: told what is being done, how much of it is done, and how much there is.
        measurer: measures models.

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
    drawn = sampled(build.kernels, build.resolution, build.channels, build.largest_mmacs * 1e6, build.seed)
    models = [kernel_model(kernel) for kernel in drawn]
    # What the runtime does not fuse (a sum with ReLU, on CPUs) is two kernels, each with its own predictor.
    kernels = [model for model in models if len(_detected(detector, model)) == 1]
    nets = networks(build.networks, build.resolution, build.channels, build.seed)
    journal = _Journal(location.with_name(f"{name}.building.jsonl"), settings)
    journal.measure([_empty(), *kernels], nets, build.seed, report, measurer)
    overhead = journal.us(_empty())
    report("fitting", 0, 1)
    alone = _fitted(detector, kernels, [journal.us(model) - overhead for model in kernels], build.seed)
    sums, counts = zip(*(_sum(alone, detector, net) for net in nets), strict=True)
    once, again = ([journal.us(net, turn) for net in nets] for turn in (1, 2))
    means = [(first + second) / 2 for first, second in zip(once, again, strict=True)]
    calibration = calibrate(sums, counts, means, _DISCOUNT_US)
    facts: dict[str, Any] = {
        "source": "built here",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": fingerprint().to_json(),
        "settings": settings.to_json(),
        "build": asdict(build),
        "constant_ms": calibration.constant_us / 1e3,
        "calibration": asdict(calibration),
        "accuracy": asdict(cross_validated(sums, counts, once, again, _DISCOUNT_US)),
    }
    in_networks = [predictor.calibrated(calibration) for predictor in alone.values()]
    save_predictor(name, in_networks, rules, facts, folder)
    journal.remove()
    report("fitting", 1, 1)
    return NnMeterPredictor.load(name, folder)


def _empty() -> bytes:
    """A model that does as good as nothing: what a session costs."""
    net = Network()
    return net.model(net.relu(net.input(1, 1)))


def _detected(detector: Detector, model: bytes) -> list[DetectedKernel]:
    loaded = onnx.load_from_string(model)
    graph = Graph(loaded)
    return [kernel for kernel in detector.kernels(loaded, graph.problems) if not graph.is_free(kernel.nodes)]


def _fitted(
    detector: Detector, models: Sequence[bytes], times_us: Sequence[float], seed: int
) -> dict[str, KernelPredictor]:
    """By kind."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    times: dict[str, list[float]] = {}
    for model, us in zip(models, times_us, strict=True):
        (kernel,) = _detected(detector, model)
        assert kernel.features is not None  # it is one of ours
        rows.setdefault(kernel.predictor, []).append(kernel.features)
        times.setdefault(kernel.predictor, []).append(max(us, _LEAST_US))
    return {kind: KernelPredictor.fitted(kind, rows[kind], times[kind], seed) for kind in rows}


def _sum(predictors: Mapping[str, KernelPredictor], detector: Detector, model: bytes) -> tuple[float, int]:
    """A network's kernels alone, in microseconds, and how many they are."""
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
        if path.exists():
            self._resume()
        if not path.exists():
            self._append(self._header)

    def us(self, model: bytes, turn: int = 1) -> float:
        """The median of a model, in microseconds; a network is measured in two turns."""
        return self._found[_name(model, turn)]

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def measure(
        self,
        kernels: Sequence[bytes],
        nets: Sequence[bytes],
        seed: int,
        report: Progress,
        measurer: Measure,
    ) -> None:
        """Measures what is missing, all of it mixed: drift is noise then, and not a bias of one kind."""
        wanted = {_name(model, 1): model for model in (*kernels, *nets)}
        wanted |= {_name(net, 2): net for net in nets}
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

    def _add(self, name: str, measured: Measurement) -> None:
        self._append({"model": name, "us": measured.median_us})
        self._found[name] = measured.median_us

    def _resume(self) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]  # the last may have been cut off
        try:
            header, *records = map(json.loads, whole)
            if header == self._header:
                self._found = {record["model"]: float(record["us"]) for record in records}
                os.truncate(self._path, sum(map(len, whole)))
                return
            reason = "it is of another device, or of other settings"
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it is damaged: {error}"
        self._path.unlink()
        warnings.warn(
            f"'{self._path}' cannot be gone on with ({reason}): measuring starts afresh", stacklevel=4
        )

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _name(model: bytes, turn: int) -> str:
    return f"{hashlib.sha256(model).hexdigest()[:16]} {turn}"
