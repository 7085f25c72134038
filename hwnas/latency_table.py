"""The latency table of a device for a space: which sites to measure, and on which networks to calibrate."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hwnas.freezing import Freezer
from hwnas.space import ModelSpace
from hwnas.survey import on_meta
from hwnas.wiring import wired
from lookup_tables import (
    EntrySource,
    LookupTable,
    Method,
    Networks,
    OtherDevice,
    Progress,
    SessionSettings,
    SubnetSource,
    Validation,
    Wiring,
    build_table,
    build_table_on,
    executed_graph,
    fingerprint,
    validate_table,
    write_bundle,
)
from lookup_tables.whole_file import check_can_be_written
from profilers import FlopsProfiler, distinct_parts
from profilers.profile import combinations_of
from profilers.space import Architecture, Site

CALIBRATION_SUBNETS = 32

_RANDOM_NETWORKS = 24  # that are profiled at least
_LEAST_SEEN = 3  # networks in which an entry is profiled
_PATIENCE = 10  # networks drawn for an entry without finding it
_AMPLE = 10  # a space this many times larger than the calibration can spare its networks for that alone


def build_latency_table(
    space: ModelSpace,
    example_input: Tensor,
    path: Path,
    *,
    name: str,
    settings: SessionSettings,
    method: Method | None = None,
    subnets: int = CALIBRATION_SUBNETS,
    seed: int = 0,
    progress: Progress | None = None,
    device: OtherDevice | None = None,
) -> LookupTable:
    """Measures every distinct site of a space on a device, and calibrates their sum on whole subnets.

    A build that was stopped goes on where it was; a finished table is returned as it is, or completed
    where it lacks entries.

    Args:
        space: the space.
        example_input: shape ``(1, ...)``: what a deployed network gets.
        path: the table's file.
        name: of the space, for the table's readers.
        settings: of the sessions, as they will be deployed.
        method: of measuring sites (`lookup_tables.build_table`). None: that of the finished table if there is
            one, otherwise ``profiled`` where the runtime and the device can do that, else ``isolated``.
        subnets: how many whole networks calibrate and check the table.
        seed: of their choice.
        progress: told about every step.
        device: which measures, such as `lookup_tables.SshDevice`; by default this machine.

    Raises:
        ValueError: a new table's file cannot be written; nothing is exported or measured then.
    """
    finished = LookupTable.load(path) if path.exists() else None
    if finished is None:
        check_can_be_written(path)
    if method is None:
        method = finished.protocol["method"] if finished else _usual(settings, device)
    entries, nets, networks = _sources(space, example_input, subnets, seed, method, finished, progress)
    if device is not None:
        return build_table_on(
            device,
            entries,
            nets,
            path=path,
            space=name,
            settings=settings,
            method=method,
            networks=networks,
            seed=seed,
            progress=progress,
        )
    return build_table(
        entries,
        nets,
        path=path,
        space=name,
        settings=settings,
        method=method,
        networks=networks,
        seed=seed,
        progress=progress,
    )


def _sources(
    space: ModelSpace,
    example_input: Tensor,
    subnets: int,
    seed: int,
    method: Method,
    finished: LookupTable | None,
    progress: Progress | None,
) -> tuple[dict[str, EntrySource], list[SubnetSource], Networks]:
    """What a table is made of: every part by key, whole networks, and those that are profiled, if any."""
    sites = space.sites(example_input)
    entries = site_sources(space, sites)
    chosen = spread_architectures(space, example_input, subnets, seed)
    nets = [subnet_source(space, sites, architecture, example_input) for architecture in chosen]
    networks = Networks((), {})
    if method == "profiled" and not (finished and entries.keys() <= finished.entries.keys()):
        networks = networks_to_profile(space, sites, entries, example_input, seed, chosen, progress)
    return entries, nets, networks


def networks_to_profile(
    space: ModelSpace,
    sites: Sequence[Site],
    entries: Mapping[str, EntrySource],
    example_input: Tensor,
    seed: int,
    calibrated_on: Collection[Architecture] = (),
    progress: Progress | None = None,
) -> Networks:
    """Random networks, and then such that hold what is rare, until every entry is in three of them.

    An entry that so many architectures do not have is in as many as were found.

    Args:
        space: whose networks these are.
        sites: of the space.
        entries: every part that costs something, by key.
        example_input: what a deployed network gets.
        seed: of the choice.
        calibrated_on: canonical architectures whose networks are not taken where the space has enough others.
        progress: told how many entries are in enough of them.
    """
    network = on_meta(space.network)
    generator = torch.Generator().manual_seed(seed + 1)
    source = random.Random(seed)
    parts = dict(entries)
    # Architectures with skips in different places can be one network.
    apart = calibrated_on if space.size >= _AMPLE * len(calibrated_on) else ()
    excluded = {wired(network, architecture, example_input, parts) for architecture in apart}
    found: dict[Wiring, None] = {}
    seen: Counter[str] = Counter()

    def add(architecture: Architecture) -> None:
        wiring = wired(network, space.canonical(architecture), example_input, parts)
        if wiring not in found and wiring not in excluded:
            found[wiring] = None
            seen.update({call.key for call in wiring.live()})

    for _ in range(min(_RANDOM_NETWORKS, space.size)):
        add(space.random(generator))
    where: dict[str, list[Architecture]] = {}
    for site in sites:
        for options in combinations_of(space, site):
            part = site.part(options)
            if part is not None and part.key in entries:
                where.setdefault(part.key, []).append(options)
    tries: Counter[str] = Counter()
    while lacking := [key for key in where if seen[key] < _LEAST_SEEN and tries[key] < _PATIENCE]:
        source.shuffle(lacking)
        lacking.sort(key=lambda key: (seen[key], tries[key]))
        fixed: Architecture = {}
        for key in lacking:
            options = space.without_implied(source.choice(where[key]))
            if all(fixed.get(label, option) == option for label, option in options.items()):
                fixed.update(options)
                tries[key] += 1
        add({**space.random(generator), **fixed})
        if progress is not None:
            progress("choosing networks", sum(seen[key] >= _LEAST_SEEN for key in where), len(where))
    return Networks(tuple(found), parts)


def bundle_latency_table(
    space: ModelSpace,
    example_input: Tensor,
    folder: Path,
    *,
    name: str,
    settings: SessionSettings,
    method: Method | None = None,
    subnets: int = CALIBRATION_SUBNETS,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Writes what `build_latency_table` would measure, to be measured on another device.

    Args:
        folder: of the bundle; one that was cut off is completed, a finished one is left as it is.
        space, example_input, name, settings, method, subnets, seed, progress: as for `build_latency_table`.
    """
    method = method or _usual(settings, None)
    entries, nets, networks = _sources(space, example_input, subnets, seed, method, None, progress)
    write_bundle(
        entries,
        nets,
        folder,
        space=name,
        settings=settings,
        method=method,
        networks=networks,
        seed=seed,
        progress=progress,
    )


def _usual(settings: SessionSettings, device: OtherDevice | None) -> Method:
    """The most accurate method that the runtime and the device have."""
    is_possible = settings.runtime == "onnxruntime" and (device is None or device.profiles)
    return "profiled" if is_possible else "isolated"


def site_sources(space: ModelSpace, sites: Sequence[Site]) -> dict[str, EntrySource]:
    """Every distinct part that costs something, by its key."""
    return {
        key: EntrySource(part.name, part.module, part.inputs)
        for key, part in distinct_parts(space, sites).items()
    }


def subnet_source(
    space: ModelSpace, sites: Sequence[Site], architecture: Architecture, example_input: Tensor
) -> SubnetSource:
    """A whole network to measure, with the keys of its parts."""
    parts = [part for site in sites if (part := site.part(architecture)) is not None and not part.is_free]
    module = Freezer(space.canonical(architecture))(on_meta(space.network))
    name = ", ".join(f"{label}={option}" for label, option in architecture.items())
    inputs = (torch.empty_like(example_input, device="meta"),)
    return SubnetSource(name, module, inputs, tuple(part.key for part in parts))


def validate_latency_table(
    space: ModelSpace,
    example_input: Tensor,
    table: LookupTable,
    *,
    networks: int = 30,
    seed: int = 1,
    progress: Progress | None = None,
) -> Validation:
    """Measures networks that the table was not calibrated on, against what it predicts for them.

    Args:
        space: of the table.
        example_input: that of the table.
        table: of this machine.
        networks: how many, spread over the space.
        seed: of their choice; another one than the table's takes others.
        progress: told about every step.

    Raises:
        ValueError: the table is of another device, or all networks of the space calibrate it.
        MissingEntryError: it is of another space, or of other inputs.
    """
    if differences := table.device.differences(fingerprint(table.settings.runtime)):
        raise ValueError(
            f"a table is validated on its own device; this one differs ({'; '.join(differences)})"
        )
    sites = space.sites(example_input)
    known = {net.key for net in table.subnets}
    chosen: list[SubnetSource] = []
    for architecture in spread_architectures(space, example_input, networks + len(known), seed):
        source = subnet_source(space, sites, architecture, example_input)
        table.require({key: key for key in source.keys})
        if len(chosen) < networks and executed_graph(source.module, source.inputs).key not in known:
            chosen.append(source)
    if not chosen:
        raise ValueError("every network of the space calibrates the table: there is none to validate it on")
    return validate_table(table, chosen, seed=seed, progress=progress)


def spread_architectures(
    space: ModelSpace, example_input: Tensor, count: int, seed: int
) -> list[Architecture]:
    """Different architectures from the cheapest to the dearest in multiply-adds.

    Uniform draws crowd around the middle; a calibration has to hold at the ends too. So half of them are
    uniform draws, and half are drawn at evenly spaced points between the cheapest and the dearest:
    each choice takes a random option, or one of an end, the dear one with the point's probability.
    """
    cost = FlopsProfiler(space, example_input).cost
    cheap, dear = cost.minimum(), cost.maximum()
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    found: list[Architecture] = []

    def add(architecture: Architecture) -> None:
        canonical = space.canonical(architecture)
        if canonical not in found:
            found.append(canonical)

    add(cheap)
    add(dear)
    points = np.linspace(0.0, 1.0, max(2, count // 2 - 2))
    for point in points:
        drawn = space.random(generator)
        for label in drawn:
            if source.random() < 0.6:
                drawn[label] = (dear if source.random() < point else cheap)[label]
        add(drawn)
    # A small space has fewer architectures than were asked for.
    for _ in range(20 * count):
        if len(found) >= min(count, space.size):
            break
        add(space.random(generator))
    return found[:count]
