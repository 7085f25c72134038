"""Builds a device's table: exports, measures, calibrates; a build that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, final

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from lookup_tables.assembly import Wiring, assembled
from lookup_tables.calibrate import calibrate, cross_validated
from lookup_tables.device import DeviceFingerprint, fingerprint
from lookup_tables.export import to_onnx
from lookup_tables.graph import executed_graph
from lookup_tables.measure import Measurement, measure
from lookup_tables.profiled import PartTimes, Profile, profile
from lookup_tables.quantise import quantise_untrained
from lookup_tables.session import SessionSettings
from lookup_tables.slope import COPIES, chains
from lookup_tables.table import Entry, LookupTable, Subnet

Progress = Callable[[str, int, int], None]
Method = Literal["isolated", "slope", "profiled"]
Which = tuple[str, str]  # what a measurement is of: its kind, and a key
# By network, the times of each of its entries at each place where it runs: a number a session.
Profiles = dict[str, tuple[tuple[str, tuple[float, ...]], ...]]

_SCHEMA = "hwnas table being built, version 2"
_OVERHEAD = ("overhead", "empty model")  # what a session costs that does nothing: every entry holds it once
TURNS = ("subnet 1", "subnet 2")
_CHAINS = ("one copy", f"{COPIES} copies")
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


@final
@dataclass(frozen=True)
class Networks:
    """Whole networks to profile.

    Attributes:
        wirings: what each runs; best such that every entry is in three of them or more.
        parts: everything that they run, by key, also what costs nothing.
    """

    wirings: tuple[Wiring, ...]
    parts: Mapping[str, EntrySource]


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
    path: str | Path,
    space: str,
    settings: SessionSettings,
    method: Method = "isolated",
    networks: Networks | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    measurer: Measure = measure,
    profiler: Profile = profile,
) -> LookupTable:
    """Measures every entry, and every subnet whole, twice, and calibrates the first by the second.

    An entry is measured by one of three methods:

    ============  ===========================================================================================
    ``isolated``  alone in a session, less what a session costs that does nothing
    ``slope``     five copies less one, over four (`lookup_tables.slope`): without the session, but for parts
                  that keep their input's shape also without bringing data into the kernels' layout and back
    ``profiled``  inside the given whole networks, by ONNX Runtime's profiler (`lookup_tables.profiled`); what
                  is in none of them is measured alone, and says so (`Entry.method`)
    ============  ===========================================================================================

    Every measurement is appended to ``<path>.building.jsonl`` as it is made; a build that was killed
    measures none of them again. The table itself appears whole, at the end. A finished table of the same
    device and settings is completed, not made anew.

    Args:
        entries: what to measure, by key.
        subnets: whole networks of these entries; at least one.
        path: of the table.
        space: name of the space, for who reads the table.
        settings: of the sessions, as they will be deployed.
        method: of measuring entries.
        networks: to profile; other than the subnets, or the calibration is checked on what it was made of.
        seed: of the order of the measurements.
        progress: told what is being done, how much of it is done, and how much there is.
        measurer: measures models.
        profiler: measures parts inside networks.

    Raises:
        ValueError: no subnet, no networks to profile, a subnet with an entry that is not given, a module that
            cannot be exported, or a file at ``path`` that is no table of this space, device, settings and
            method.

    Warns:
        UserWarning: a build that was cut off belongs to another device, space or settings: it is dropped.
    """
    if not subnets:
        raise ValueError("a table is calibrated on whole networks: give at least one subnet")
    if method == "profiled":
        if networks is None:
            raise ValueError("profiled entries are measured in networks: give some, or take another method")
        if settings.runtime != "onnxruntime":
            raise ValueError(f"{settings.runtime} has no profiler that is read here: take another method")
    path = Path(path)
    report = progress or (lambda what, done, total: None)
    finished = _finished(path, space, settings, method) if path.exists() else None
    known = entries.keys() | (finished.entries.keys() if finished else set())
    for net in subnets:
        if unknown := sorted(set(net.keys) - known):
            raise ValueError(f"'{net.name}' executes what is not among the entries: {', '.join(unknown)}")
    keyed = by_key(subnets)
    journal = _Journal(path, space, settings, method)
    lacking = {key: source for key, source in entries.items() if not finished or key not in finished.entries}
    if method == "profiled" and networks is not None:
        _profile_missing(journal, lacking, networks, seed, report, profiler)
    _measure_missing(journal, finished, lacking, keyed, seed, report, measurer)
    table = assemble_table(
        journal.found,
        {key: source.name for key, source in entries.items()},
        {key: (net.name, net.keys) for key, net in keyed.items()},
        device=journal.device,
        space=space,
        settings=settings,
        method=method,
        profiles=journal.profiles,
        finished=finished,
    )
    table.save(path)
    journal.remove()
    return table


def _finished(path: Path, space: str, settings: SessionSettings, method: Method) -> LookupTable:
    """The table at the path, if it can be completed."""
    table = LookupTable.load(path)
    differences = table.device.differences(fingerprint(settings.runtime))
    for what, theirs, ours in (
        ("settings", table.settings, settings),
        ("space", table.space, space),
        ("method", table.protocol["method"], method),
    ):
        if theirs != ours:
            differences.append(f"{what}: {theirs} against {ours}")
    if differences:
        raise ValueError(
            f"'{path}' holds a table that was measured otherwise ({'; '.join(differences)}); build into "
            "another file, or move it away"
        )
    return table


@final
class _Journal:
    """What a build has measured so far, on disk line by line."""

    def __init__(self, path: Path, space: str, settings: SessionSettings, method: Method) -> None:
        self._path = path.with_name(path.name + ".building.jsonl")
        self.device = fingerprint(settings.runtime)
        self.settings = settings
        self.method: Method = method
        self.found: dict[Which, Measurement] = {}
        self.profiles: Profiles = {}
        if self._path.exists():
            self._resume(space)
        if not self._path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"device": self.device.to_json(), "settings": settings.to_json()}
            self._append({"schema": _SCHEMA, "space": space, "method": method, **facts})

    def add(self, kind: str, key: str, measured: Measurement) -> None:
        self._append({"kind": kind, "key": key, **asdict(measured)})
        self.found[kind, key] = measured

    def add_profile(self, network: str, times: Sequence[tuple[str, tuple[float, ...]]]) -> None:
        self._append({"kind": "profile", "key": network, "us": times})
        self.profiles[network] = tuple(times)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _resume(self, space: str) -> None:
        """Takes in what a build that was cut off has measured, if it was this one; drops it otherwise."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        # The last line may have been cut off in the middle of a write.
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            header, *records = map(json.loads, whole)
            reasons = self._differences(header, space)
            for record in records if not reasons else ():
                which = record.pop("kind"), record.pop("key")
                if which[0] == "profile":
                    times = tuple((key, tuple(us)) for key, us in record["us"])
                    if not all(type(n) in (int, float) and n >= 0 for _, us in times for n in us):
                        raise ValueError(f"{which} was measured as {times}")
                    self.profiles[which[1]] = times
                    continue
                measured = Measurement(**record)
                if not all(type(number) in (int, float) and number > 0 for number in record.values()):
                    raise ValueError(f"{which} was measured as {measured}")
                self.found[which] = measured
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reasons = [f"damaged: {error}"]
        if not reasons:
            if len(whole) < len(lines):
                os.truncate(self._path, sum(map(len, whole)))
            return
        self.found, self.profiles = {}, {}
        self._path.unlink()
        warnings.warn(
            f"'{self._path}', left by a build that was cut off, cannot be gone on with "
            f"({'; '.join(reasons)}): measuring starts afresh",
            stacklevel=4,
        )

    def _differences(self, header: Mapping[str, Any], space: str) -> list[str]:
        then = DeviceFingerprint.from_json(header["device"])
        here = {"schema": _SCHEMA, "space": space, "method": self.method, "settings": self.settings.to_json()}
        return then.differences(self.device) + [
            f"{what}: {header[what]} against {ours}" for what, ours in here.items() if header[what] != ours
        ]

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _profile_missing(
    journal: _Journal,
    lacking: Mapping[str, EntrySource],
    networks: Networks,
    seed: int,
    report: Progress,
    profiler: Profile,
) -> None:
    """Profiles the networks that hold a lacking entry and are not in the journal yet."""
    wanted: dict[str, Wiring] = {}
    for wiring in networks.wirings:
        name = hashlib.sha256(repr(wiring).encode()).hexdigest()[:20]
        if name not in journal.profiles and any(call.key in lacking for call in wiring.live()):
            wanted[name] = wiring
    if not wanted:
        return
    keys = {call.key for wiring in wanted.values() for call in wiring.live()}
    models = _exported(
        {key: networks.parts[key] for key in sorted(keys)}, journal.settings, "exporting blocks", report
    )

    put_together = {}
    for name, wiring in wanted.items():
        # What is in no network that can be put together is measured alone.
        with contextlib.suppress(ValueError):
            put_together[name] = assembled(wiring, models)

    def add(name: str, found: PartTimes) -> None:
        calls = wanted[name].live()
        sessions = len(next(iter(found.values())))
        # A part without a node of its own was fused into another's, whose time holds it.
        times = [(call.key, found.get(place, (0.0,) * sessions)) for place, call in enumerate(calls)]
        journal.add_profile(name, [(key, us) for key, us in times if key in lacking])

    profiler(
        put_together,
        journal.settings,
        seed=seed,
        progress=_step(report, "profiling networks"),
        on_result=add,
    )


def _measure_missing(
    journal: _Journal,
    finished: LookupTable | None,
    lacking: Mapping[str, EntrySource],
    subnets: Mapping[str, SubnetSource],
    seed: int,
    report: Progress,
    measurer: Measure,
) -> None:
    """Measures what neither the finished table nor the journal has, all of it mixed."""
    profiled = {key for times in journal.profiles.values() for key, _ in times}
    have: set[Which] = set(journal.found)
    if finished is not None:
        have.add(_OVERHEAD)
        have |= {(turn, net.key) for net in finished.subnets for turn in TURNS}
    alone = [key for key in lacking if key not in profiled]
    missing = [which for which in to_measure(alone, subnets, seed, journal.method) if which not in have]
    if not missing:
        return
    models, reference = export_models(missing, lacking, subnets, journal.settings, report)
    by_name = {f"{kind} {key}": (kind, key) for kind, key in missing}
    measurer(
        {name: models[which] for name, which in by_name.items()},
        journal.settings,
        reference=reference,
        seed=seed,
        progress=_step(report, "measuring"),
        on_result=lambda name, measured: journal.add(*by_name[name], measured),
    )


def by_key(subnets: Sequence[SubnetSource]) -> dict[str, SubnetSource]:
    """Each network once, by the digest of what it executes."""
    return {executed_graph(net.module, net.inputs).key: net for net in subnets}


def to_measure(
    entries: Iterable[str], subnets: Iterable[str], seed: int, method: Method = "isolated"
) -> list[Which]:
    """What a table is made of, by the keys of its parts and networks, in the order of measuring.

    A machine drifts over minutes: parts, networks and the networks' second turn are mixed, so that they meet
    the same weather, and drift is noise and not a bias of one against the other.
    """
    kinds = _CHAINS if method == "slope" else ("entry",)
    wanted = [_OVERHEAD, *((kind, key) for key in entries for kind in kinds)]
    wanted += [(turn, key) for key in subnets for turn in TURNS]
    random.Random(seed).shuffle(wanted)
    return wanted


def export_models(
    wanted: Iterable[Which],
    entries: Mapping[str, EntrySource],
    subnets: Mapping[str, SubnetSource],
    settings: SessionSettings,
    report: Progress,
) -> tuple[dict[Which, bytes], bytes]:
    """The model of each measurement, and one of middling size to look at between them."""
    wanted = list(wanted)
    parts = {key: entries[key] for kind, key in wanted if kind in ("entry", *_CHAINS)}
    has_chains = any(kind in _CHAINS for kind, _ in wanted)
    # One at least, to look at between others.
    nets = {key: subnets[key] for kind, key in wanted if kind in TURNS} or dict([*subnets.items()][:1])
    whole = _exported(nets, settings, "exporting networks", report)
    blocks = _exported(parts, settings, "exporting blocks", report)
    models = {_OVERHEAD: _empty_model()}
    for key, model in blocks.items():
        models["entry", key] = model
        if has_chains:
            models |= {(kind, key): chain for kind, chain in zip(_CHAINS, chains(model), strict=True)}
    models |= {(turn, key): model for key, model in whole.items() for turn in TURNS}
    return {which: models[which] for which in wanted}, _middle(whole)


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
    sources: Mapping[str, EntrySource] | Mapping[str, SubnetSource],
    settings: SessionSettings,
    what: str,
    report: Progress,
) -> dict[str, bytes]:
    modules = {key: (source.module, source.inputs) for key, source in sources.items()}
    models = to_onnx(modules, progress=_step(report, what))
    if settings.precision == "fp32":
        return models
    return {key: quantise_untrained(model) for key, model in models.items()}


def assemble_table(
    found: Mapping[Which, Measurement],
    names: Mapping[str, str],
    nets: Mapping[str, tuple[str, tuple[str, ...]]],
    *,
    device: DeviceFingerprint,
    space: str,
    settings: SessionSettings,
    clock: str | None = None,
    method: Method = "isolated",
    profiles: Profiles | None = None,
    finished: LookupTable | None = None,
) -> LookupTable:
    """The table that measurements make, with its calibration and its held-out error.

    Args:
        found: the measurements.
        names: of the entries, by key.
        nets: name and parts of the networks, by key.
        device: which measured.
        space, settings: as for `build_table`.
        clock: what was read; by default what the settings say.
        method: as for `build_table`.
        profiles: of networks, where entries were profiled.
        finished: a table that is completed.
    """
    entries = dict(finished.entries) if finished else {}
    subnets = {net.key: net for net in finished.subnets} if finished else {}
    overhead = finished.protocol["overhead_us"] if finished else found[_OVERHEAD].median_us
    for key, name in names.items():
        if key not in entries:
            entries[key] = _entry(found, profiles or {}, key, name, overhead)
    for key, (name, parts) in nets.items():
        if key not in subnets:
            once, again = (found[turn, key] for turn in TURNS)
            spread = {"median_us": once.median_us, "p10_us": once.p10_us, "p90_us": once.p90_us}
            subnets[key] = Subnet(key, name, parts, **spread, samples=once.samples, repeat_us=again.median_us)
    sums = [sum(entries[key].median_us for key in net.parts) for net in subnets.values()]
    counts = [len(net.parts) for net in subnets.values()]
    firsts = [net.median_us for net in subnets.values()]
    seconds = [net.repeat_us for net in subnets.values()]
    means = [(first + second) / 2 for first, second in zip(firsts, seconds, strict=True)]
    least = min(entry.median_us for entry in entries.values())
    return LookupTable(
        space=space,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        device=device,
        settings=settings,
        protocol={"method": method, "clock": clock or settings.clock, "overhead_us": overhead},
        entries=entries,
        subnets=tuple(subnets.values()),
        calibration=calibrate(sums, counts, means, least),
        accuracy=cross_validated(sums, counts, firsts, seconds, least),
    )


def _entry(
    found: Mapping[Which, Measurement], profiles: Profiles, key: str, name: str, overhead_us: float
) -> Entry:
    if all((kind, key) in found for kind in _CHAINS):
        one, several = (found[kind, key] for kind in _CHAINS)
        ends = (
            (several.median_us, one.median_us),
            (several.p10_us, one.p10_us),
            (several.p90_us, one.p90_us),
        )
        times = sorted(max((high - low) / (COPIES - 1), _LEAST_US) for high, low in ends)
        median = max((several.median_us - one.median_us) / (COPIES - 1), _LEAST_US)
        return Entry(key, name, median, times[0], times[-1], several.samples, "slope")
    seen = [us for times in profiles.values() for other, us in times if other == key]
    if seen:
        # What disturbs a session only adds to it. A part that is fused into its neighbour in one network
        # and not in another has two times: their mean is right for a sum.
        typical = max(float(np.mean([min(us) for us in seen])), _LEAST_US)
        every = [number for us in seen for number in us]
        low, high = (max(float(end), _LEAST_US) for end in np.percentile(every, [10, 90]))
        return Entry(key, name, typical, min(low, typical), max(high, typical), len(every), "profiled")
    alone = found["entry", key]
    # Its own, without the session's.
    median, low, high = (
        max(number - overhead_us, _LEAST_US) for number in (alone.median_us, alone.p10_us, alone.p90_us)
    )
    return Entry(key, name, median, low, high, alone.samples, "isolated")
