"""What a trial costs besides its evaluation: CPU time of one thread on a space of 21 layers with 7 options.

The limit lies at a third of the way from the cheapest to the dearest architecture, by a cost that couples
neighbouring layers. Medians of rounds.

    python benchmarks/trial_overhead.py [--rounds 5] [--trials 500]
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hwnas import LayerChoice, ModelSpace
from hwnas.trials import NSGA2, TPE, Method, RandomSearch, RegularizedEvolution, search
from lookup_tables import fingerprint
from profilers import Cost, CostTable, Profiler, RangeProfilerFilter
from profilers.space import Architecture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--trials", type=int, default=500)
arguments = parser.parse_args()
torch.set_num_threads(1)

operations = [nn.Identity() for _ in range(7)]
space = ModelSpace(nn.Sequential(*(LayerChoice(operations, label=f"layer{i}") for i in range(21))))
labels = list(space.options)
random = np.random.default_rng(0)
pairs = [CostTable(pair, random.random((7, 7))) for pair in itertools.pairwise(labels)]
profiler = Profiler(Cost(space.options, 1.0, pairs, unit="ms"))
low, high = profiler.cost.bounds()
limit = [RangeProfilerFilter(profiler, max=low + (high - low) / 3)]


def evaluate(architecture: Architecture) -> dict[str, float]:
    return {"accuracy": float(sum(architecture.values()))}


def measured(method: Method, filters: Sequence[RangeProfilerFilter], journal: Path | None) -> list[float]:
    """CPU milliseconds a trial, and wall milliseconds."""

    def run(trials: int) -> tuple[float, float]:
        if journal is not None:
            journal.unlink(missing_ok=True)
        cpu, wall = time.thread_time(), time.perf_counter()
        search(space, evaluate, method, {"accuracy": "max"}, trials=trials, filters=filters, journal=journal)
        return time.thread_time() - cpu, time.perf_counter() - wall

    start, whole = run(1), run(1 + arguments.trials)
    return [1000 * (b - a) / arguments.trials for a, b in zip(start, whole, strict=True)]


methods: dict[str, Method] = {
    "random search": RandomSearch(),
    "evolution": RegularizedEvolution(),
    "evolution, crossover 0.5": RegularizedEvolution(crossover=0.5),
    "NSGA-II": NSGA2(),
    "TPE": TPE(),
}
print(f"{fingerprint().cpu}, one thread; Python {platform.python_version()}, torch {torch.__version__}")
print(f"{arguments.trials} trials, medians of {arguments.rounds} rounds with their range\n")
print("| method | CPU ms a trial | within a limit | within a limit, with a journal | wall, with a journal |")
print("|---|---|---|---|---|")
with tempfile.TemporaryDirectory() as folder:
    for name, method in methods.items():
        rounds = []
        for _ in range(arguments.rounds):
            kept = measured(method, limit, Path(folder) / "trials.jsonl")
            rounds.append((measured(method, [], None)[0], measured(method, limit, None)[0], *kept))
        texts = [
            f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in zip(*rounds, strict=True)
        ]
        print(f"| {name} | {' | '.join(texts)} |", flush=True)
