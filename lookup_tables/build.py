"""Builds a device's table: exports, measures, calibrates; a build that was killed goes on where it was."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, final

import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from lookup_tables.calibrate import accuracy_of, calibrate, cross_validated
from lookup_tables.device import fingerprint
from lookup_tables.export import to_onnx
from lookup_tables.graph import executed_graph
from lookup_tables.measure import Measurement, measure
from lookup_tables.session import SessionSettings
from lookup_tables.table import Accuracy, Entry, LookupTable, Subnet

Progress = Callable[[str, int, int], None]

_OVERHEAD = "session overhead"
_TURNS = ("subnet 1", "subnet 2")
_LEAST_US = 0.05  # an entry that is no dearer than the session's overhead still is an entry


@final
@dataclass(frozen=True)
class EntrySource:
    """A part to measure: a plain module on the ``meta`` device with its inputs."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class SubnetSource:
    """A whole network to measure, with the keys of the entries that it executes, as often as it does."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    keys: tuple[str, ...]


class Measure(Protocol):
    """`lookup_tables.measure`, or a stand-in for it."""

    def __call__(
        self,
        models: Mapping[str, bytes],
        settings: SessionSettings,
        *,
        reference: bytes | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_result: Callable[[str, Measurement], None] | None = None,
    ) -> dict[str, Measurement]: ...


def build_table(
    entries: Mapping[str, EntrySource],
    subnets: Sequence[SubnetSource],
    *,
    path: Path,
    space: str,
    settings: SessionSettings,
    seed: int = 0,
    progress: Progress | None = None,
    measurer: Measure = measure,
) -> LookupTable:
    """Measures every entry alone and every subnet whole, twice, and calibrates the first by the second.

    Every measurement is appended to ``<path>.building.jsonl`` as it is made; a build that was killed
    measures none of them again. The table itself appears whole, at the end. A finished table of the same
    device and settings is completed, not made anew.

    Args:
        entries: what to measure, by key.
        subnets: whole networks of these entries; at least one.
        path: of the table.
        space: name of the space, for who reads the table.
        settings: of the sessions, as they will be deployed.
        seed: of the order of the measurements.
        progress: told what is being done, how much of it is done, and how much there is.
        measurer: measures models.

    Raises:
        ValueError: no subnet, or a module that cannot be exported.
    """
    if not subnets:
        raise ValueError("a table is calibrated on whole networks: give at least one subnet")
    report = progress or (lambda what, done, total: None)
    journal = _Journal(path, space, settings)
    keyed = {executed_graph(net.module, net.inputs).key: net for net in subnets}
    _measure_missing(journal, entries, keyed, seed, report, measurer)
    table = _table(journal, entries, keyed, space, settings)
    table.save(path)
    journal.remove()
    return table


def validate_table(
    table: LookupTable,
    subnets: Sequence[SubnetSource],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    measurer: Measure = measure,
) -> Accuracy:
    """The error of a table on networks that are measured here and now, twice.

    Raises:
        MissingEntryError: a network has a part that the table lacks.
    """
    report = progress or (lambda what, done, total: None)
    predicted = [table.predict_us(net.keys) for net in subnets]
    models = _exported({str(n): net for n, net in enumerate(subnets)}, "exporting networks", report)
    passes = [
        measurer(
            models,
            table.settings,
            reference=_middle(models),
            seed=seed + turn,
            progress=_step(report, f"measuring networks ({turn + 1}/2)"),
        )
        for turn in (0, 1)
    ]
    first, second = ([done[str(n)].median_us for n in range(len(subnets))] for done in passes)
    return accuracy_of(predicted, first, second)


@final
class _Journal:
    """What has been measured: from a finished table at the path, and from a build that was cut off."""

    def __init__(self, path: Path, space: str, settings: SessionSettings) -> None:
        self._path = path.with_name(path.name + ".building.jsonl")
        self.device = fingerprint()
        self.settings = settings
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        if path.exists():
            self._take_finished(LookupTable.load(path), path)
        header = {"device": self.device.to_json(), "settings": settings.to_json(), "space": space}
        if self._path.exists() and not self._take_journal(header):
            self._path.unlink()
        if not self._path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(header)

    def has(self, kind: str, key: str) -> bool:
        return (kind, key) in self.records

    def add(self, kind: str, key: str, measured: Measurement) -> None:
        record = {"kind": kind, "key": key, **asdict(measured)}
        self._append(record)
        self.records[kind, key] = record

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _take_finished(self, table: LookupTable, path: Path) -> None:
        differences = table.device.differences(self.device)
        if table.settings != self.settings:
            differences.append(f"settings: {table.settings} against {self.settings}")
        if differences:
            raise ValueError(
                f"'{path}' holds a table of another device or other settings ({'; '.join(differences)}); "
                "build into another file, or move it away"
            )
        for entry in table.entries.values():
            overhead = float(table.protocol["overhead_us"])
            values = {"median_us": entry.median_us, "p10_us": entry.p10_us, "p90_us": entry.p90_us}
            raw = {name: value + overhead for name, value in values.items()}
            self.records["entry", entry.key] = {**raw, "samples": entry.samples}
        self.records["overhead", _OVERHEAD] = {"median_us": float(table.protocol["overhead_us"])}
        for net in table.subnets:
            values = {"median_us": net.median_us, "p10_us": net.p10_us, "p90_us": net.p90_us}
            self.records["subnet 1", net.key] = {**values, "samples": net.samples}
            self.records["subnet 2", net.key] = {**values, "median_us": net.repeat_us, "samples": net.samples}

    def _take_journal(self, header: Mapping[str, Any]) -> bool:
        """Whether the journal belongs to this build; its whole lines are taken in."""
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        # The last line may have been cut off in the middle of a write.
        whole = [line for line in lines if line.endswith("\n")]
        try:
            first, *records = [json.loads(line) for line in whole]
            same = first == header
            taken = {(record["kind"], record["key"]): record for record in records}
        except (ValueError, KeyError, TypeError):
            same, taken = False, {}
        if not same:
            warnings.warn(
                f"'{self._path}' was left by a build on another device, with other settings or for another "
                "space, or is damaged: measuring starts afresh",
                stacklevel=4,
            )
            return False
        self.records.update(taken)
        self._path.write_text("".join(whole), encoding="utf-8")
        return True

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _measure_missing(
    journal: _Journal,
    entries: Mapping[str, EntrySource],
    subnets: Mapping[str, SubnetSource],
    seed: int,
    report: Progress,
    measurer: Measure,
) -> None:
    """Measures what the journal lacks, all of it mixed.

    A machine drifts over minutes: parts, networks and the networks' second turn meet the same weather, so
    that drift is noise and not a bias of one against the other.
    """
    wanted = [("overhead", _OVERHEAD)]
    wanted += [("entry", key) for key in entries]
    wanted += [(kind, key) for key in subnets for kind in _TURNS]
    missing = [which for which in wanted if not journal.has(*which)]
    if not missing:
        return
    models = {("overhead", _OVERHEAD): _empty_model()}
    parts = {key: entries[key] for kind, key in missing if kind == "entry"}
    models |= {("entry", key): model for key, model in _exported(parts, "exporting blocks", report).items()}
    nets = {key: subnets[key] for kind, key in missing if kind in _TURNS}
    if not nets:  # one to look at between others
        nets = dict(itertools.islice(subnets.items(), 1))
    whole = _exported(nets, "exporting networks", report)
    models |= {(kind, key): model for key, model in whole.items() for kind in _TURNS}
    random.Random(seed).shuffle(missing)
    by_name = {f"{kind} {key}": (kind, key) for kind, key in missing}
    measurer(
        {name: models[which] for name, which in by_name.items()},
        journal.settings,
        reference=_middle(whole),
        seed=seed,
        progress=_step(report, "measuring"),
        on_result=lambda name, measured: journal.add(*by_name[name], measured),
    )


def _step(report: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: report(what, done, total)


def _middle(models: Mapping[str, bytes]) -> bytes:
    """A model of middling size, to look at between others."""
    return sorted(models.values(), key=len)[len(models) // 2]


def _empty_model() -> bytes:
    """A model that does as good as nothing."""
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")
    )
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "empty", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _exported(
    sources: Mapping[str, EntrySource] | Mapping[str, SubnetSource], what: str, report: Progress
) -> dict[str, bytes]:
    return to_onnx(
        {key: (source.module, source.inputs) for key, source in sources.items()},
        progress=_step(report, what),
    )


def _table(
    journal: _Journal,
    sources: Mapping[str, EntrySource],
    nets: Mapping[str, SubnetSource],
    space: str,
    settings: SessionSettings,
) -> LookupTable:
    overhead = float(journal.records["overhead", _OVERHEAD]["median_us"])

    def alone(record: Mapping[str, Any], name: str) -> float:
        return max(float(record[name]) - overhead, _LEAST_US)

    entries = {}
    for key, source in sources.items():
        record = journal.records["entry", key]
        times = {name: alone(record, name) for name in ("median_us", "p10_us", "p90_us")}
        entries[key] = Entry(key, source.name, **times, samples=int(record["samples"]))
    subnets = []
    for key, net in nets.items():
        first, second = journal.records["subnet 1", key], journal.records["subnet 2", key]
        times = {name: float(first[name]) for name in ("median_us", "p10_us", "p90_us")}
        repeat = float(second["median_us"])
        subnets.append(
            Subnet(key, net.name, net.keys, **times, samples=int(first["samples"]), repeat_us=repeat)
        )
    sums = [sum(entries[key].median_us for key in net.parts) for net in subnets]
    counts = [len(net.parts) for net in subnets]
    once, again = [net.median_us for net in subnets], [net.repeat_us for net in subnets]
    means = [(one + other) / 2 for one, other in zip(once, again, strict=True)]
    least = min(entry.median_us for entry in entries.values())
    return LookupTable(
        space=space,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        device=journal.device,
        settings=settings,
        protocol={"method": "isolated", "clock": settings.clock, "overhead_us": overhead},
        entries=entries,
        subnets=tuple(subnets),
        calibration=calibrate(sums, counts, means, least),
        accuracy=cross_validated(sums, counts, once, again, least),
    )
