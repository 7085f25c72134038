"""One supernet, several devices: a winner for each, and what every device loses with the winner of another.

    python examples/multi_device.py --out runs/multi_device        # Fashion-MNIST; half an hour on two cores

The devices here are one machine under three settings of ONNX Runtime, whose blocks differ in what they cost:
one thread, one thread without the layouts of the highest optimisation, and two threads. Tables of other
machines serve as well (`LatencyProfiler(..., allow_other_device=True)`). The supernet is trained once, for no
device; then each device has an evolution of its own among the networks that use 94 to 100 % of its budget, on
that supernet's weights. Prints the winners and the matrices, and draws them (matplotlib) in `regret.png`.
What was finished when it is killed is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib import pyplot as plt
from torchmetrics.classification import MulticlassAccuracy

from hwnas import ModelSpace
from hwnas.classification import Classification
from hwnas.data import load_data, retrain_dataloader
from hwnas.devices import compare_devices
from hwnas.latency_table import build_latency_table
from hwnas.run_folder import write_json
from hwnas.spaces import SmallMobileNet
from hwnas.strategies import RandomOneShot
from hwnas.trials import RegularizedEvolution, SupernetEvaluator, search
from lookup_tables import SessionSettings
from profilers import LatencyProfiler, Profiler, RangeProfilerFilter
from profilers.space import Architecture

DEVICES = {
    "all-1": SessionSettings(threads=1, optimisation="all"),
    "extended-1": SessionSettings(threads=1, optimisation="extended"),
    "all-2": SessionSettings(threads=2, optimisation="all"),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/multi_device"))
parser.add_argument("--budget", type=float, default=0.4, help="0: the cheapest network, 1: the dearest")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--trials", type=int, default=40, help="for each device")
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="small digits, few blocks, one epoch: does it run?")
args = parser.parse_args()
if not 0 <= args.budget <= 1:
    parser.error(f"--budget must be from 0 to 1; got {args.budget:g}")

plt.switch_backend("Agg")  # draws files, needs no screen
pl.seed_everything(args.seed, verbose=False)
data = load_data("digits" if args.smoke else "fashion-mnist", seed=args.seed)
data.prepare_data()
data.setup()
small = {"widths": ((8, 16),), "depths": (1,)}
space = ModelSpace(SmallMobileNet(10, 1, **(small if args.smoke else {})))
example = torch.zeros(1, 1, 28, 28)

latencies = {}
for name, settings in DEVICES.items():
    path = args.out / f"{name}.json"
    count = 2 if args.smoke else 32
    table = build_latency_table(space, example, path, name="devices", settings=settings, subnets=count)
    latencies[name] = LatencyProfiler(space, example, table)
    print(f"{name}: {', '.join(f'{ms:.4f}' for ms in latencies[name].cost.bounds())} ms at least and at most")

run = f"{1 if args.smoke else args.epochs}-{args.seed}"
trained = args.out / f"supernet-{run}.pt"
if not trained.exists():
    trainer = pl.Trainer(
        max_epochs=1 if args.smoke else args.epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="auto" if args.devices == "1" else "ddp_find_unused_parameters_true",
        callbacks=[RandomOneShot(seed=args.seed)],
        default_root_dir=args.out,
        enable_checkpointing=False,
    )
    trainer.fit(Classification(space, 10), datamodule=data)
    if not trainer.is_global_zero:
        raise SystemExit  # one process goes on
    torch.save(space.cpu().state_dict(), trained.with_suffix(".part"))
    trained.with_suffix(".part").replace(trained)
space.load_state_dict(torch.load(trained, weights_only=True))

evaluate = SupernetEvaluator(
    space,
    list(islice(retrain_dataloader(data), 20)),
    data.val_dataloader(),
    {"accuracy": MulticlassAccuracy(10, average="micro")},
)


def evolve(budget: Mapping[Profiler, float]) -> Architecture:
    limits = [RangeProfilerFilter(latency, 0.94 * most, most) for latency, most in budget.items()]
    name = next(name for name, latency in latencies.items() if latency in budget)
    print(f"{name}: {limits[0]}")
    tried = search(
        space,
        evaluate,
        RegularizedEvolution(population_size=4 if args.smoke else 15, sample_size=2 if args.smoke else 5),
        {"accuracy": "max"},
        trials=4 if args.smoke else args.trials,
        filters=limits,
        seed=args.seed,
        journal=args.out / f"trials-{name}-{run}-{args.budget:g}.jsonl",
    )
    return tried.best.architecture


found = compare_devices(latencies, args.budget, evolve, score=lambda chosen: evaluate(chosen)["accuracy"])
names = list(latencies)
cost = np.array([[100 * found.costs[a][b] / found.budgets[b] for b in names] for a in names])
regret = np.array([[100 * found.regret(a, on=b) for b in names] for a in names])
for name in names:
    print(f"{name}: {found.budgets[name]:.4f} ms, accuracy {found.scores[name]:.4f}: {found.winners[name]}")
print("cost of a row's winner on a column's device, % of its budget:", np.round(cost, 1), sep="\n")
print("points of accuracy lost by it there; inf: over the budget:", np.round(regret, 2), sep="\n")
facts = {"budgets_ms": found.budgets, "costs_ms": found.costs, "winners": found.winners}
write_json(args.out / "devices.json", {**facts, "accuracies": found.scores})

figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
for axis, title, shown, low, high in (
    (axes[0], "cost, % of the device's budget", cost, 50, 150),
    (axes[1], "points of accuracy lost", regret, -5, 5),
):
    axis.imshow(shown.clip(low, high), cmap="RdYlGn_r", vmin=low, vmax=high, alpha=0.7)
    axis.set(title=title, xlabel="runs on", ylabel="winner of")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    for (row, column), number in np.ndenumerate(shown):
        text = f"{number:.1f}" if np.isfinite(number) else "too slow"
        axis.text(column, row, text, ha="center", va="center")
figure.savefig(args.out / "regret.png", dpi=120)
