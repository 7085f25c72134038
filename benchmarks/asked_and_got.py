"""Asked and got: the measured latency of what a search exports, against the budget that was asked.

Five budgets, two strategies, two seeds, one table; each run is a whole search with certificate in a folder of
its own, so a benchmark that was stopped goes on with the same command. The short schedule searches for one
epoch and trains for one, on digits: latency does not depend on accuracy. ``--full`` takes the schedule and
the data of ``hwnas search``.

    python benchmarks/asked_and_got.py [--full] [--out runs/asked_and_got]
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
from pathlib import Path

import onnxruntime
import torch

from hwnas.certificate import Certificate
from hwnas.latency_table import build_latency_table
from hwnas.loading import load_space
from hwnas.search import Search, SearchFailedError, SearchSettings
from lookup_tables import SessionSettings, fingerprint

BUDGETS = (20.0, 35.0, 50.0, 65.0, 80.0)
STRATEGIES = ("proxyless", "darts")
SEEDS = (0, 1)
SHORT = {
    "data": "digits",
    "batch_size": 16,
    "epochs": 1,
    "train_epochs": 1,
    "warmup_epochs": 0,
    "arc_learning_rate": 0.05,
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--full", action="store_true", help="the default schedule, on Fashion-MNIST")
parser.add_argument("--out", type=Path, default=Path("runs/asked_and_got"))
arguments = parser.parse_args()
torch.set_num_threads(1)

table_path = arguments.out / "latency_table.json"
space = load_space("small-mobilenet", num_classes=10, in_channels=1)
table = build_latency_table(
    space, torch.zeros(1, 1, 28, 28), table_path, name="small-mobilenet", settings=SessionSettings()
)

rows: list[tuple[float, str, int, Certificate | None]] = []
for strategy, seed, budget in itertools.product(STRATEGIES, SEEDS, BUDGETS):
    settings = SearchSettings(
        strategy=strategy,
        seed=seed,
        budget_percent=budget,
        device_table=str(table_path),
        accelerator="cpu",
        **({} if arguments.full else SHORT),
    )
    out = arguments.out / f"{'full' if arguments.full else 'short'}-{strategy}-{budget:g}-{seed}"
    try:
        certificate = Search(settings, out, report=lambda *_: None, say=lambda line: print("  ", line)).run()
    except SearchFailedError as error:
        print(error)
        rows.append((budget, strategy, seed, None))
        continue
    rows.append((budget, strategy, seed, certificate))
    print(f"{strategy} {budget:g} % seed {seed}: {certificate.reason}", flush=True)

print(f"\nDevice: {fingerprint().cpu}, {fingerprint().cores} cores, {platform.system()}")
print(f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, clock thread_cpu, 1 thread")
print(f"Schedule: {'default' if arguments.full else SHORT}; table of {table.date}, {table.accuracy}\n")
print(
    "| budget | strategy | seed | budget ms | predicted ms | measured ms | use | floor | accuracy | passed |"
)
print("|---|---|---|---|---|---|---|---|---|---|")
for budget, strategy, seed, row in sorted(rows, key=lambda row: (row[1], row[0], row[2])):
    if row is None:
        print(f"| {budget:g} % | {strategy} | {seed} | | | | | | | failed |")
        continue
    print(
        f"| {budget:g} % | {strategy} | {seed} | {row.budget_ms:.4f} | {row.predicted_ms:.4f} "
        f"| {row.measured_ms:.4f} | {100 * row.measured_ms / row.budget_ms:.1f} % "
        f"| {row.noise_floor_percent:.2f} % | {100 * (row.test_accuracy or 0):.1f} % "
        f"| {'yes' if row.passed else 'no: ' + row.reason} |"
    )
got = [row for *_, row in rows if row is not None]
uses = [100 * row.measured_ms / row.budget_ms for row in got]
print(
    f"\npassed: {sum(row.passed for row in got)} of {len(rows)}; median use {statistics.median(uses):.1f} %"
)
