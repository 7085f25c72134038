"""What the cost of each ready-made space takes at its published size: CPU time of one thread.

Builds the FLOPs cost, evaluates an `ExpectationProfilerPenalty` (its expectation and its backward pass), and
solves for the cheapest and the dearest architecture. Every round is a fresh process; medians of rounds.

    python benchmarks/space_costs.py [--rounds 5] [--spaces NAME ...]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

from hwnas import ModelSpace
from hwnas.spaces import (
    PFLD,
    AutoFormer,
    DARTSCells,
    ENASMacro,
    ENASMicro,
    FBNet,
    MobileNetV3,
    NASBench201,
    ProxylessNAS,
    ShuffleNetV2,
    SmallMobileNet,
)
from lookup_tables import fingerprint
from profilers import ExpectationProfilerPenalty, FlopsProfiler, distinct_parts

Shape = tuple[int, int, int]
SPACES: Mapping[str, tuple[Callable[[], nn.Module], Shape]] = {
    "SmallMobileNet": (SmallMobileNet, (1, 28, 28)),
    "ProxylessNAS": (ProxylessNAS, (3, 224, 224)),
    "FBNet": (FBNet, (3, 224, 224)),
    "MobileNetV3": (MobileNetV3, (3, 224, 224)),
    "MobileNetV3, 4 resolutions": (lambda: MobileNetV3(resolutions=(128, 160, 192, 224)), (3, 224, 224)),
    "ShuffleNetV2 (SPOS)": (ShuffleNetV2, (3, 224, 224)),
    "AutoFormer-T": (AutoFormer, (3, 224, 224)),
    "AutoFormer-B": (lambda: AutoFormer(**AutoFormer.published["b"].arguments), (3, 224, 224)),
    "DARTSCells, CIFAR, 8 cells": (DARTSCells, (3, 32, 32)),
    "DARTSCells, CIFAR, 20 cells": (lambda: DARTSCells(channels=36, cells=20), (3, 32, 32)),
    "DARTSCells, ImageNet, 14 cells": (
        lambda: DARTSCells(1000, channels=48, cells=14, stem="imagenet"),
        (3, 224, 224),
    ),
    "ENASMacro, 12 layers": (ENASMacro, (3, 32, 32)),
    "ENASMicro, 5 nodes": (ENASMicro, (3, 32, 32)),
    "NASBench201": (NASBench201, (3, 32, 32)),
    "PFLD": (PFLD, (3, 112, 112)),
}
EVALUATIONS = 100


def milliseconds(work: Callable[[], object], times: int) -> float:
    begun = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - begun) / times * 1e3


def measured(name: str) -> dict[str, float]:
    """One round: a space in this process."""
    torch.set_num_threads(1)
    make, shape = SPACES[name]
    space, example = ModelSpace(make()), torch.zeros(1, *shape)
    begun = time.process_time()
    profiler = FlopsProfiler(space, example)
    build_s = time.process_time() - begun
    bounds_ms = milliseconds(profiler.cost.bounds, 1)
    low, high = profiler.cost.bounds()
    penalty = ExpectationProfilerPenalty(profiler, baseline=(low + high) / 2)
    logits = {label: torch.zeros(len(found), requires_grad=True) for label, found in space.options.items()}
    probabilities = {label: row.softmax(0) for label, row in logits.items()}
    leaves = {label: row.detach().requires_grad_() for label, row in probabilities.items()}

    def evaluate() -> None:
        torch.autograd.grad(penalty(torch.zeros(()), leaves), [*leaves.values()], allow_unused=True)

    evaluate()
    return {
        "parts": len(distinct_parts(space, space.sites(example))),
        "build_s": build_s,
        "penalty_ms": milliseconds(evaluate, EVALUATIONS),
        "bounds_ms": bounds_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=list(SPACES), metavar="NAME")
    parser.add_argument("--one", choices=SPACES, help=argparse.SUPPRESS)  # a round, in a process of its own
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if arguments.one:
        print(json.dumps(measured(arguments.one)))
        return
    print(
        f"{fingerprint().cpu}, {fingerprint().cores} cores, one thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}; CPU time, medians of {arguments.rounds} fresh processes, their range:\n"
        f"python benchmarks/space_costs.py --rounds {arguments.rounds}\n"
    )
    print("| space | input | distinct parts | build the FLOPs cost, s | penalty, ms | bounds, ms |")
    print("|---|---|---|---|---|---|")
    print("| aim | | | < 3 (SmallMobileNet < 2) | < 1 | |")
    for name in arguments.spaces:
        command = [sys.executable, __file__, "--one", name]
        rounds = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(arguments.rounds)
        ]
        cells = [
            ", ".join(["x".join(map(str, SPACES[name][1])), str(rounds[0]["parts"])]).replace(", ", " | ")
        ]
        for key in ("build_s", "penalty_ms", "bounds_ms"):
            found = sorted(row[key] for row in rounds)
            cells.append(f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
