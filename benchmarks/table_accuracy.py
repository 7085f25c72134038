"""Are tables right: predicted against measured on networks that they have not seen, beside multiply-adds.

Builds a table by each method, for each space, at ONNX Runtime's full optimisation and at EXTENDED (which
behaves like another device), then measures other networks of the space, half of them uniform draws and half
spread from the cheapest to the dearest, and holds all methods to the same measurements. The calibration
networks are measured again beside them: "refitted" is a table whose calibration is fitted to these, which is
what its entries are worth when the machine's pace has not changed since it was built. The competitor is a
line through the same networks over multiply-adds. Measurements with a noise floor above 3 %
(5 % at two threads) are invalid and repeated.

    python benchmarks/table_accuracy.py [--spaces mobile cells] [--levels all extended]
        [--methods isolated slope profiled] [--threads 1] [--precision fp32] [--networks 60]
        [--out runs/table_accuracy]

A run that was stopped goes on where it was; rows that are there are printed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from hwnas import ModelSpace
from hwnas.latency_table import build_latency_table, spread_architectures, subnet_source
from hwnas.spaces import NASBench201, SmallMobileNet
from lookup_tables import LookupTable, SessionSettings, SubnetSource, executed_graph, fingerprint, measure
from lookup_tables.calibrate import accuracy_of, calibrate
from lookup_tables.measure import LARGEST_FLOOR_PERCENT
from lookup_tables.sources import TURNS, by_key, export_models, to_measure
from profilers import FlopsProfiler
from profilers.space import Architecture

SPACES = {
    "mobile": (lambda: SmallMobileNet(), torch.zeros(1, 1, 28, 28)),
    "cells": (lambda: NASBench201.small(in_channels=1), torch.zeros(1, 1, 28, 28)),
}
CALIBRATING = 32
ATTEMPTS = 5

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=SPACES)
parser.add_argument("--levels", nargs="+", default=["all", "extended"], choices=("all", "extended"))
parser.add_argument("--methods", nargs="+", default=["isolated", "slope", "profiled"])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--precision", default="fp32", choices=("fp32", "int8"))
parser.add_argument("--networks", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path("runs/table_accuracy"))
arguments = parser.parse_args()
torch.set_num_threads(1)


def networks(space: ModelSpace, example: torch.Tensor) -> tuple[list[SubnetSource], dict[str, Architecture]]:
    """The calibration networks, then others that no table knows, each once; their architectures by key."""
    sites = space.sites(example)
    calibrating = spread_architectures(space, example, CALIBRATING, seed=0)
    others = spread_architectures(space, example, arguments.networks + CALIBRATING, seed=1)
    architectures, sources = {}, []
    for index, architecture in enumerate([*calibrating, *others]):
        source = subnet_source(space, sites, architecture, example)
        key = executed_graph(source.module, source.inputs).key
        if key not in architectures:
            architectures[key] = architecture
            sources.append(source)
        if index >= len(calibrating) and len(sources) == len(calibrating) + arguments.networks:
            break
    return sources, architectures


def built(name: str, space: ModelSpace, example: torch.Tensor, method: str, settings: SessionSettings) -> Any:
    """The table, and how many seconds its building took; those of a build that was stopped add up."""
    stem = f"{name}-{settings.optimisation}-{settings.threads}-{settings.precision}-{method}"
    path, clock = arguments.out / f"{stem}.json", arguments.out / f"{stem}.seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0
    if path.exists():
        return LookupTable.load(path), before
    begun = time.monotonic()
    try:
        table = build_latency_table(
            space, example, path, name=name, settings=settings, method=method, subnets=CALIBRATING
        )
    finally:
        seconds = before + time.monotonic() - begun
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.write_text(str(seconds))
    return table, seconds


def measured(
    nets: dict[str, SubnetSource], settings: SessionSettings, path: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of each network, twice, in one run."""
    if path.exists():
        once, again = json.loads(path.read_text())
        return once, again
    wanted = to_measure((), nets, seed=7)
    models, reference = export_models(wanted, {}, nets, settings, lambda *_: None)
    named = {f"{kind} {key}": models[kind, key] for kind, key in wanted}
    for attempt in range(ATTEMPTS):
        found = measure(named, settings, reference=reference, seed=7 + attempt)
        once, again = ({key: found[f"{turn} {key}"].p10_us for key in nets} for turn in TURNS)
        floor = accuracy_of(*map(list, (once.values(), once.values(), again.values()))).noise_floor_percent
        if floor <= LARGEST_FLOOR_PERCENT[settings.clock]:
            path.write_text(json.dumps([once, again]))
            return once, again
        print(f"| {settings.optimisation} | invalid: noise floor {floor:.2f} %, measured again |", flush=True)
    print(f"still invalid after {ATTEMPTS} attempts: the rows that follow say nothing", flush=True)
    return once, again


def refitted(table: LookupTable, nets: dict[str, SubnetSource], us: dict[str, float]) -> LookupTable:
    """The table with a calibration to these networks, as they were measured here."""
    least = min(entry.p10_us for entry in table.entries.values())
    keys = [net.keys for net in nets.values()]
    fit = calibrate([table.sum_us(k) for k in keys], [len(k) for k in keys], [us[key] for key in nets], least)
    return table.with_calibration(fit)


def group(name: str, level: str) -> list[dict[str, Any]]:
    """Rows for each method and one for multiply-adds, all on the same measurements."""
    make, example = SPACES[name]
    space = ModelSpace(make())
    settings = SessionSettings(arguments.threads, level, precision=arguments.precision)
    tables = {method: built(name, space, example, method, settings) for method in arguments.methods}
    sources, architectures = networks(space, example)
    nets = by_key(sources)
    stem = f"measured-{name}-{level}-{arguments.threads}-{arguments.precision}.json"
    once, again = measured(nets, settings, arguments.out / stem)
    known = dict(list(nets.items())[:CALIBRATING])
    means = {key: (once[key] + again[key]) / 2 for key in known}
    others = {key: net for key, net in nets.items() if key not in known}
    cost = FlopsProfiler(space, example).cost
    macs = {key: cost.of(architectures[key]) for key in nets}
    line = calibrate([macs[key] for key in known], [1] * len(known), list(means.values()))
    predictions = {"a line over MACs": [line.predict_us(macs[key], 1) for key in others]}
    for method, (table, _) in tables.items():
        for which, of in ((method, table), (f"{method}, refitted", refitted(table, known, means))):
            predictions[which] = [of.predict_us(net.keys) for net in others.values()]
    rows = []
    for which, predicted in sorted(predictions.items()):
        accuracy = accuracy_of(predicted, [once[key] for key in others], [again[key] for key in others])
        bias = statistics.median(us / once[key] - 1 for us, key in zip(predicted, others, strict=True))
        row = {
            "space": name,
            "level": level,
            "method": which,
            "MAPE": f"{accuracy.mape_percent:.2f} %",
            "bias": f"{100 * bias:+.1f} %",
            "within 5 %": f"{accuracy.within_5_percent:.0f} %",
            "within 10 %": f"{accuracy.within_10_percent:.0f} %",
            "Spearman": f"{accuracy.spearman:.4f}",
            "noise floor": f"{accuracy.noise_floor_percent:.2f} %",
            "in the interval": "-",
            "build s": "-",
        }
        if which in tables:
            table, seconds = tables[which]
            bounds = [table.interval_us(us) for us in predicted]
            inside = statistics.mean(
                low <= once[key] <= high for key, (low, high) in zip(others, bounds, strict=True)
            )
            row["in the interval"] = f"{100 * inside:.0f} % (claims {100 * table.accuracy.coverage:.0f} %)"
            row["build s"] = f"{seconds:.0f}"
        rows.append(row)
    return rows


print(
    f"{fingerprint().cpu}, {fingerprint().cores} cores; ONNX Runtime {onnxruntime.__version__}, "
    f"{arguments.threads} thread(s), {arguments.precision}; {arguments.networks} held-out networks a space\n"
)
header_is_printed = False
for name in arguments.spaces:
    for level in arguments.levels:
        kept = arguments.out / f"rows-{name}-{level}-{arguments.threads}-{arguments.precision}.json"
        if kept.exists():
            rows = json.loads(kept.read_text())
        else:
            rows = group(name, level)
            kept.write_text(json.dumps(rows))
        if not header_is_printed:
            print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
            header_is_printed = True
        for row in rows:
            print("| " + " | ".join(row.values()) + " |", flush=True)
