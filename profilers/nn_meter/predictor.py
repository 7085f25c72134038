"""A predictor of nn-Meter: a device's kernel predictors and fusion rules, asked with an audit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import onnx
from torch import Tensor, nn

from lookup_tables import to_onnx
from lookup_tables.whole_file import write_whole
from profilers.nn_meter.audit import Graph
from profilers.nn_meter.official import OFFICIAL
from profilers.nn_meter.package import DetectedKernel, Detector, default_folder, register, registered
from profilers.nn_meter.regression import KernelPredictor

_SCHEMA = "hwnas nn-Meter predictor, version 1"
_FACTS = "predictor.json"
_RULES = "fusion_rules.json"
_SHOWN = 5  # gaps that an error names


@final
@dataclass(frozen=True)
class Gap:
    """A kernel that nn-Meter cannot tell the time of.

    Attributes:
        layer: its operators with their shapes.
        reason: what is in the way.
        macs: its multiply-adds.
    """

    layer: str
    reason: str
    macs: float


@final
@dataclass(frozen=True)
class Coverage:
    """How much of a network a number stands for: kernels, and multiply-adds, that are not in it.

    >>> print(Coverage(10, 2, 4e6, 1e6))
    not covered: 2 of 10 kernels (20.0 %), 25.0 % of the multiply-adds
    """

    kernels: int = 0
    uncovered_kernels: int = 0
    macs: float = 0.0
    uncovered_macs: float = 0.0

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            self.kernels + other.kernels,
            self.uncovered_kernels + other.uncovered_kernels,
            self.macs + other.macs,
            self.uncovered_macs + other.uncovered_macs,
        )

    @property
    def uncovered_kernel_share(self) -> float:
        return self.uncovered_kernels / self.kernels if self.kernels else 0.0

    @property
    def uncovered_mac_share(self) -> float:
        return self.uncovered_macs / self.macs if self.macs else 0.0

    def __str__(self) -> str:
        return (
            f"not covered: {self.uncovered_kernels} of {self.kernels} kernels "
            f"({100 * self.uncovered_kernel_share:.1f} %), {100 * self.uncovered_mac_share:.1f} % of the "
            "multiply-adds"
        )


@final
@dataclass(frozen=True)
class Reading:
    """What nn-Meter says of a module.

    Attributes:
        ms: the sum over the kernels that are covered, in milliseconds.
        gaps: those that are not.
        coverage: how much these are.
    """

    ms: float
    gaps: tuple[Gap, ...]
    coverage: Coverage


class UncoveredError(ValueError):
    """A network has kernels that nn-Meter cannot tell the time of."""


@final
class NnMeterPredictor:
    """Kernel predictors and fusion rules of one device.

    Each distinct kernel is predicted once, and each kind's file is read when it is first needed.

    Args:
        name: of the device and its runtime.
        kernels: by nn-Meter's name of a kind, the npz file of its predictor.
        rules: nn-Meter's ``fusion_rules.json`` of the device.
        folder: where nn-Meter's configuration is kept.
        facts: what else is known: ``constant_ms``, which every network takes besides its kernels, and where
            the predictors come from.

    >>> NnMeterPredictor.load("cortexA76cpu_tflite21")  # doctest: +SKIP
    """

    def __init__(
        self, name: str, kernels: Mapping[str, Path], rules: Path, folder: Path, facts: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.kernels = dict(kernels)
        self.facts = dict(facts)
        self.constant_ms = float(facts.get("constant_ms", 0.0))
        self._detector = Detector(rules, folder)
        self._loaded: dict[str, KernelPredictor] = {}
        self._known: dict[tuple[str, tuple[float, ...]], float] = {}

    @classmethod
    def load(cls, name: str, folder: Path | None = None) -> NnMeterPredictor:
        """A predictor that was imported or built, found by its name in nn-Meter's register.

        Nothing is downloaded.

        Raises:
            ValueError: nn-Meter is not installed; there is no such predictor, or its files are not here: the
                error says where they come from, and what else can be done.
        """
        folder = folder or default_folder()
        known = registered(folder)
        if name not in known:
            raise ValueError(
                f"nn-Meter has no predictor {name!r} in '{folder}'; there are {', '.join(known)}. Build one "
                "of this machine: hwnas nnmeter build"
            )
        if "package_location" not in known[name]:
            raise ValueError(_missing(name, known[name]["download"], folder))
        location = Path(known[name]["package_location"])
        try:
            facts = json.loads((location / _FACTS).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"'{location / _FACTS}' cannot be read ({error}); import or build it again"
            ) from error
        if not isinstance(facts, dict) or facts.get("schema") != _SCHEMA:
            raise ValueError(f"'{location / _FACTS}' must have schema {_SCHEMA!r}; import or build it again")
        kernels = {kind: location / f"{kind}.npz" for kind in facts["kernels"]}
        return cls(name, kernels, location / _RULES, folder, facts)

    def read(self, models: Mapping[str, bytes]) -> dict[str, Reading]:
        """Audits and predicts ONNX models with named nodes, static shapes and folded BatchNorm.

        Raises:
            ValueError: a predictor's file is damaged.
        """
        audited = {key: self._audited(onnx.load_from_string(model)) for key, model in models.items()}
        self._learn(kernel for kernels, *_ in audited.values() for kernel in kernels)
        return {
            key: Reading(sum(self._known[_key(kernel)] for kernel in kernels), tuple(gaps), coverage)
            for key, (kernels, gaps, coverage) in audited.items()
        }

    def predict_ms(self, network: nn.Module, inputs: Sequence[Tensor], allow_partial: bool = False) -> float:
        """A whole network, its kernels fused wherever the device fuses them.

        Args:
            network: in evaluation mode, on the ``meta`` device.
            inputs: what it is called with.
            allow_partial: leave out what is not covered, in place of the error.

        Raises:
            UncoveredError: nn-Meter cannot tell the time of some kernel.
        """
        model = to_onnx({type(network).__name__: (network, tuple(inputs))})
        ((name, reading),) = self.read(model).items()
        if reading.gaps and not allow_partial:
            raise uncovered(self.name, {name: reading})
        return reading.ms + self.constant_ms

    def _audited(self, model: onnx.ModelProto) -> tuple[list[DetectedKernel], list[Gap], Coverage]:
        graph = Graph(model)
        kernels, gaps, count, macs = [], [], 0, 0.0
        for kernel in self._detector.kernels(model, refused=graph.problems):
            if graph.is_free(kernel.nodes):
                continue
            count += 1
            own = graph.macs(kernel.nodes)
            macs += own
            reason = self._reason(kernel, graph)
            if reason is None:
                kernels.append(kernel)
            else:
                gaps.append(Gap(graph.layer(kernel.nodes), reason, own))
        left_out = sum(gap.macs for gap in gaps)
        return kernels, gaps, Coverage(count, len(gaps), macs, left_out)

    def _reason(self, kernel: DetectedKernel, graph: Graph) -> str | None:
        """Why a kernel is not covered."""
        for name in kernel.nodes:
            if name in graph.problems:
                return graph.problems[name]
        if kernel.features is None:
            return f"nn-Meter has no features for {kernel.operators!r}: it would count 0 ms"
        if kernel.predictor not in self.kernels:
            return f"'{self.name}' has no predictor of {kernel.predictor!r}: nn-Meter would count 0 ms"
        return self._kernel_predictor(kernel.predictor).outside(kernel.features)

    def _learn(self, kernels: Iterable[DetectedKernel]) -> None:
        """Predicts the kernels that were not met before, each kind at once."""
        new: dict[str, dict[tuple[float, ...], None]] = {}
        for kernel in kernels:
            if _key(kernel) not in self._known:
                new.setdefault(kernel.predictor, {})[_key(kernel)[1]] = None
        for kind, rows in new.items():
            found = self._kernel_predictor(kind).predict(list(rows))
            self._known.update({(kind, row): float(ms) for row, ms in zip(rows, found, strict=True)})

    def _kernel_predictor(self, kind: str) -> KernelPredictor:
        if kind not in self._loaded:
            self._loaded[kind] = KernelPredictor.load(kind, self.kernels[kind])
        return self._loaded[kind]


def save_predictor(
    name: str,
    kernels: Iterable[KernelPredictor],
    rules: bytes,
    facts: Mapping[str, Any],
    folder: Path | None = None,
) -> Path:
    """Writes a predictor's files, kernel by kernel, and enters it into nn-Meter's register.

    Args:
        name: of the device and its runtime.
        kernels: taken and written one after the other, so that one alone need be in memory.
        rules: nn-Meter's ``fusion_rules.json``.
        facts: plain JSON; see `NnMeterPredictor`.
        folder: of all predictors.

    Returns:
        The predictor's folder.
    """
    folder = folder or default_folder()
    location = folder / "predictors" / name
    kinds = []
    for kernel in kernels:
        kernel.save(location / f"{kernel.kind}.npz")
        kinds.append(kernel.kind)
    write_whole(location / _RULES, rules)
    written = {"schema": _SCHEMA, "name": name, "kernels": kinds, **facts}
    write_whole(location / _FACTS, json.dumps(written, indent=1) + "\n")
    register(folder, name, kinds, location)
    return location


def uncovered(predictor: str, readings: Mapping[str, Reading]) -> UncoveredError:
    """The error that names the layers.

    Args:
        predictor: name of it.
        readings: by the name of what has the layers.
    """
    found = [f"{name}: {gap.layer} {gap.reason}" for name, read in readings.items() for gap in read.gaps]
    found = list(dict.fromkeys(found))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return UncoveredError(
        f"nn-Meter's predictor '{predictor}' does not cover {len(found)} layers: "
        f"{'; '.join(found[:_SHOWN])}{more}. Change these layers, measure a lookup table instead (hwnas "
        "table build), or pass allow_partial=True for a number that leaves them out and says how much that is"
    )


def _key(kernel: DetectedKernel) -> tuple[str, tuple[float, ...]]:
    assert kernel.features is not None  # it was audited
    return kernel.predictor, kernel.features


def _missing(name: str, url: str, folder: Path) -> str:
    official = OFFICIAL.get(name)
    size = f"{official.unpacked_bytes / 1e9:.1f} GB unpacked" if official else "of unknown size"
    return (
        f"the files of nn-Meter's predictor {name!r} are not in '{folder}', and nothing is downloaded "
        f"unasked. They are {name}.zip, {size}, at {url}. Fetch it and run: hwnas nnmeter import {name}.zip; "
        "or build predictors of this machine: hwnas nnmeter build; or measure a lookup table: hwnas table "
        "build"
    )
