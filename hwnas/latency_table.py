"""The latency table of a device for a space: which sites to measure, and on which networks to calibrate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hwnas.freezing import Freezer
from hwnas.progress import Report
from hwnas.space import ModelSpace
from hwnas.survey import on_meta
from lookup_tables import (
    EntrySource,
    LookupTable,
    OtherDevice,
    SessionSettings,
    SubnetSource,
    build_table,
    build_table_on,
    write_bundle,
)
from profilers import FlopsProfiler, distinct_parts
from profilers.space import Architecture, Site

CALIBRATION_SUBNETS = 32


def build_latency_table(
    space: ModelSpace,
    example_input: Tensor,
    path: Path,
    *,
    name: str,
    settings: SessionSettings,
    subnets: int = CALIBRATION_SUBNETS,
    seed: int = 0,
    progress: Report | None = None,
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
        subnets: how many whole networks calibrate and check the table.
        seed: of their choice.
        progress: told about every step.
        device: which measures, such as `lookup_tables.SshDevice`; by default this machine.
    """
    entries, nets = table_sources(space, example_input, subnets, seed)
    build = build_table if device is None else partial(build_table_on, device)
    return build(
        entries,
        nets,
        path=path,
        space=name,
        settings=settings,
        seed=seed,
        progress=progress,
    )


def bundle_latency_table(
    space: ModelSpace,
    example_input: Tensor,
    folder: Path,
    *,
    name: str,
    settings: SessionSettings,
    subnets: int = CALIBRATION_SUBNETS,
    seed: int = 0,
    progress: Report | None = None,
) -> None:
    """Writes what `build_latency_table` would measure, to be measured on another device.

    Args:
        folder: of the bundle; one that was cut off is completed, a finished one is left as it is.
        space, example_input, name, settings, subnets, seed, progress: as for `build_latency_table`.
    """
    entries, nets = table_sources(space, example_input, subnets, seed)
    write_bundle(entries, nets, folder, space=name, settings=settings, seed=seed, progress=progress)


def table_sources(
    space: ModelSpace, example_input: Tensor, subnets: int, seed: int
) -> tuple[dict[str, EntrySource], list[SubnetSource]]:
    """What a table of a space measures: every distinct part by its key, and whole networks."""
    sites = space.sites(example_input)
    entries = {
        key: EntrySource(part.name, part.module, part.inputs)
        for key, part in distinct_parts(space, sites).items()
    }
    chosen = spread_architectures(space, example_input, subnets, seed)
    return entries, [subnet_source(space, sites, architecture, example_input) for architecture in chosen]


def subnet_source(
    space: ModelSpace, sites: Sequence[Site], architecture: Architecture, example_input: Tensor
) -> SubnetSource:
    """A whole network to measure, with the keys of its parts."""
    parts = [part for site in sites if (part := site.part(architecture)) is not None and not part.is_free]
    module = Freezer(space.canonical(architecture))(on_meta(space.network))
    name = ", ".join(f"{label}={option}" for label, option in architecture.items())
    inputs = (torch.empty_like(example_input, device="meta"),)
    return SubnetSource(name, module, inputs, tuple(part.key for part in parts))


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
