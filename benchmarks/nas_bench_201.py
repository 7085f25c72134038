"""Multi-trial search where the optimum is known: NAS-Bench-201 under latency limits of five devices.

For each device and each limit, the latency's 10, 25 and 50 % quantile over all cells, every method searches
the cells within the limit for the best validation accuracy. Prints the regret: the accuracy of the best cell
that there is, less that of the best cell that was tried; means over seeds with their standard errors. Draws
how it falls trial by trial.

    python benchmarks/nas_bench_201.py [--data ../shared/data/nas_bench_201_latency.parquet]
        [--accuracy cifar10] [--trials 200] [--seeds 20] [--processes 2] [--plot regret.png]
        [--devices fpga pixel2] [--quantiles 0.25] [--methods "random search" NSGA-II]
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import torch
from torch import nn

from hwnas import LayerChoice, ModelSpace
from hwnas.trials import NSGA2, TPE, Method, PolicySearch, RandomSearch, RegularizedEvolution, search
from lookup_tables import fingerprint
from profilers import Cost, CostTable, Profiler, RangeProfilerFilter

Floats = npt.NDArray[np.float64]

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ("0-1", "0-2", "1-2", "0-3", "1-3", "2-3")  # from node to node, in the order of the benchmark's names
DEVICES = ("gold_6226", "pixel2", "raspi4", "1080ti_1", "fpga")
QUANTILES = (0.10, 0.25, 0.50)
METHODS: Mapping[str, Method] = {
    "random search": RandomSearch(),
    "evolution": RegularizedEvolution(population_size=20, sample_size=10),
    "evolution, crossover 0.5": RegularizedEvolution(population_size=20, sample_size=10, crossover=0.5),
    "policy": PolicySearch(),
    "NSGA-II": NSGA2(population_size=20),
    "NSGA-II, population 10": NSGA2(population_size=10),
    "TPE": TPE(),
}


def per_cell(rows: Mapping[str, list[float]], cells: list[str], name: str) -> Floats:
    """One column of the benchmark, with an axis of the five operations for each edge."""
    values = np.empty((len(OPERATIONS),) * len(EDGES))
    for cell, value in zip(cells, rows[name], strict=True):
        # |op~0|+|op~0|op~1|+|op~0|op~1|op~2|: the operations on the edges into nodes 1, 2 and 3.
        names = [edge.split("~")[0] for node in cell.split("+") for edge in node.strip("|").split("|")]
        values[tuple(OPERATIONS.index(operation) for operation in names)] = value
    return values


def regrets(device: str, quantile: float) -> tuple[str, dict[str, Floats]]:
    """The limit in words, and for each method the regret after each trial, ``(seeds, trials)``."""
    latency = per_cell(rows, rows["cellstr"], f"latency_ms_{device}")
    limit = float(np.quantile(latency, quantile))
    optimum = float(accuracy[latency <= limit].max())
    profiler = Profiler(Cost(space.options, 0.0, [CostTable(tuple(space.options), latency)], unit="ms"))
    within = [RangeProfilerFilter(profiler, max=limit)]

    def evaluate(cell: Mapping[str, str]) -> dict[str, float]:
        at = tuple(OPERATIONS.index(operation) for operation in cell.values())
        assert latency[at] <= limit
        return {"accuracy": float(accuracy[at])}

    found = {}
    for name in arguments.methods:
        method, curves = METHODS[name], []
        for seed in range(arguments.seeds):
            result = search(
                space,
                evaluate,
                method,
                {"accuracy": "max"},
                trials=arguments.trials,
                filters=within,
                seed=seed,
            )
            accuracies = [trial.metrics["accuracy"] for trial in result.trials]
            curves.append(optimum - np.maximum.accumulate(accuracies))
        found[name] = np.array(curves)
    return f"| {device} | {quantile:.0%}, {limit:.2f} ms | {(latency <= limit).sum()} |", found


def draw(curves: Mapping[float, Mapping[str, Floats]], path: Path) -> None:
    """One panel a limit: the mean regret over devices and seeds after each trial."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(curves), figsize=(4 * len(curves), 4), sharey=True, layout="constrained", squeeze=False
    )
    panels = grid[0]
    for panel, quantile in zip(panels, curves, strict=True):
        for name, found in curves[quantile].items():
            trials = np.arange(1, found.shape[1] + 1)
            mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / np.sqrt(len(found))
            (line,) = panel.plot(trials, mean, label=name, color="black" if name == "random search" else None)
            panel.fill_between(trials, mean - error, mean + error, color=line.get_color(), alpha=0.15, lw=0)
        panel.set(title=f"limit: {quantile:.0%} quantile", xlabel="trials", yscale="log", xlim=(1, None))
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("mean regret, % of validation accuracy")
    panels[-1].legend()
    figure.suptitle(
        f"NAS-Bench-201, {arguments.accuracy}: mean over {len(arguments.devices)} devices and "
        f"{arguments.seeds} seeds"
    )
    figure.savefig(path, dpi=110)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path("../shared/data/nas_bench_201_latency.parquet"))
parser.add_argument("--accuracy", choices=("cifar10", "cifar100"), default="cifar10")
parser.add_argument("--trials", type=int, default=200)
parser.add_argument("--seeds", type=int, default=20)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--plot", type=Path)
parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
parser.add_argument("--quantiles", nargs="+", type=float, default=QUANTILES)
parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
arguments = parser.parse_args()
torch.set_num_threads(1)

rows = pyarrow.parquet.read_table(arguments.data).to_pydict()
operations = {name: nn.Identity() for name in OPERATIONS}
space = ModelSpace(nn.Sequential(*(LayerChoice(operations, label=edge) for edge in EDGES)))
accuracy = per_cell(rows, rows["cellstr"], f"epoch12_{arguments.accuracy}_val")

print(f"{fingerprint().cpu}, Python {platform.python_version()}, optuna {version('optuna')}")
print(f"{arguments.accuracy}, {arguments.trials} trials, {arguments.seeds} seeds\n")
print("| device | limit | cells | " + " | ".join(arguments.methods) + " |")
print("|---|---|---|" + "---|" * len(arguments.methods))
together: dict[float, dict[str, Floats]] = {quantile: {} for quantile in arguments.quantiles}
cases = [(device, quantile) for device in arguments.devices for quantile in arguments.quantiles]
with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("fork")) as pool:
    for (_, quantile), future in [(case, pool.submit(regrets, *case)) for case in cases]:
        limit, curves = future.result()
        texts = []
        for name, found in curves.items():
            known = together[quantile].get(name, np.empty((0, arguments.trials)))
            together[quantile][name] = np.concatenate([known, found])
            last = found[:, -1]
            texts.append(f"{last.mean():.2f} ± {last.std(ddof=1) / np.sqrt(len(last)):.2f}")
        print(f"{limit} {' | '.join(texts)} |", flush=True)
for quantile, of in together.items():
    print(f"| all | {quantile:.0%} | | {' | '.join(f'{found[:, -1].mean():.3f}' for found in of.values())} |")
means = [np.mean([of[name][:, -1].mean() for of in together.values()]) for name in arguments.methods]
print(f"| all | all | | {' | '.join(f'{mean:.3f}' for mean in means)} |")
if arguments.plot is not None:
    draw(together, arguments.plot)
