"""Builds a device's table: exports, measures, calibrates; a build that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lookup_tables.assembly import Wiring
from lookup_tables.device import fingerprint
from lookup_tables.from_measurements import LATENCY, assemble_table, times_by_key
from lookup_tables.journal import Journal
from lookup_tables.measure import Measurement, measure
from lookup_tables.profiled import Profile, profile
from lookup_tables.progress import Progress, step
from lookup_tables.session import SessionSettings
from lookup_tables.sources import (
    OVERHEAD,
    TURNS,
    EntrySource,
    Method,
    Networks,
    SubnetSource,
    Which,
    by_key,
    export_models,
    put_together,
    to_measure,
)
from lookup_tables.table import LookupTable

if TYPE_CHECKING:
    from lookup_tables.profiled import PartTimes


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
    check_networks(subnets, method, networks, settings)
    path = Path(path)
    report = progress or (lambda what, done, total: None)
    finished = _finished(path, space, settings, method) if path.exists() else None
    known = entries.keys() | (finished.entries.keys() if finished else set())
    for net in subnets:
        if unknown := sorted(set(net.keys) - known):
            raise ValueError(f"'{net.name}' executes what is not among the entries: {', '.join(unknown)}")
    keyed = by_key(subnets)
    journal = Journal(path, space, settings, method)
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


def check_networks(
    subnets: Sequence[SubnetSource], method: Method, networks: Networks | None, settings: SessionSettings
) -> None:
    """Raises ``ValueError`` where networks are missing, or cannot be profiled."""
    if not subnets:
        raise ValueError("a table is calibrated on whole networks: give at least one subnet")
    if method == "profiled":
        if networks is None:
            raise ValueError("profiled entries are measured in networks: give some, or take another method")
        if settings.runtime != "onnxruntime":
            raise ValueError(f"{settings.runtime} has no profiler that is read here: take another method")


def _finished(path: Path, space: str, settings: SessionSettings, method: Method) -> LookupTable:
    """The table at the path, if it can be completed."""
    table = LookupTable.load(path)
    differences = table.device.differences(fingerprint(settings.runtime))
    for what, theirs, ours in (
        ("settings", table.settings, settings),
        ("space", table.space, space),
        ("method", table.protocol["method"], method),
        ("latency", table.protocol.get("latency"), LATENCY),
    ):
        if theirs != ours:
            differences.append(f"{what}: {theirs} against {ours}")
    if differences:
        raise ValueError(
            f"'{path}' holds a table that was measured otherwise ({'; '.join(differences)}); build into "
            "another file, or move it away"
        )
    return table


def _profile_missing(
    journal: Journal,
    lacking: Mapping[str, EntrySource],
    networks: Networks,
    seed: int,
    report: Progress,
    profiler: Profile,
) -> None:
    """Profiles the networks that hold a lacking entry and are not in the journal yet."""
    wanted: dict[str, Wiring] = {}
    for name, wiring in networks.by_name().items():
        if name not in journal.profiles and any(call.key in lacking for call in wiring.live()):
            wanted[name] = wiring
    if not wanted:
        return

    def add(name: str, found: PartTimes) -> None:
        times = times_by_key([call.key for call in wanted[name].live()], found)
        journal.add_profile(name, [(key, us) for key, us in times if key in lacking])

    profiler(
        put_together(wanted, networks.parts, journal.settings, report),
        journal.settings,
        seed=seed,
        progress=step(report, "profiling networks"),
        on_result=add,
    )


def _measure_missing(
    journal: Journal,
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
        have.add(OVERHEAD)
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
        progress=step(report, "measuring"),
        on_result=lambda name, measured: journal.add(*by_name[name], measured),
    )
