"""The landmark network that FBNet's search finds beside random networks of the same budget.

    python benchmarks/fbnet_pfld.py --out runs/fbnet_pfld_benchmark

Runs examples/fbnet_pfld: a table of this machine, the search, and then the same training (from the supernet's
weights) and export for the network that was found and for random ones that use 94 to 100 % of the budget.
SYNTHETIC faces are drawn where ``--data`` has none. Prints a table with its conditions, in Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hwnas import ModelSpace
from hwnas.certificate import Certificate
from hwnas.export import read_metadata
from hwnas.run_folder import write_json
from hwnas.sampling import Sampler
from hwnas.spaces import PFLD
from lookup_tables import LookupTable, fingerprint
from profilers import LatencyProfiler, RangeProfilerFilter

SCRIPTS = Path(__file__).parents[1] / "examples" / "fbnet_pfld"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path("data/synthetic_faces"))
parser.add_argument("--out", type=Path, default=Path("runs/fbnet_pfld_benchmark"))
parser.add_argument("--synthetic", type=int, default=2000)
parser.add_argument("--search-epochs", type=int, default=8)
parser.add_argument("--train-epochs", type=int, default=8)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--random", type=int, default=3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

spent: dict[str, float] = {}
folders = ("--data", str(args.data), "--out", str(args.out))


def run(script: str, *arguments: str) -> None:
    before = os.times()
    start = time.monotonic()
    subprocess.run([sys.executable, str(SCRIPTS / script), *folders, *arguments], check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    spent[script] = spent.get(script, 0.0) + used
    print(f"{script}: {used:.0f} CPU s, {time.monotonic() - start:.0f} s, load {os.getloadavg()}", flush=True)


batch = ("--batch-size", str(args.batch_size))
if not (args.out / "architecture.json").exists():
    epochs = ("--epochs", str(args.search_epochs), "--synthetic", str(args.synthetic))
    run("search.py", *epochs, *batch, "--seed", str(args.seed))

space = ModelSpace(PFLD(pose=True))
table = LookupTable.load(args.out / "latency_table.json")
latency = LatencyProfiler(space, torch.zeros(1, 3, 112, 112), table)
budget_ms = json.loads((args.out / "search.json").read_text())["budget_ms"]
sampler = Sampler(space, [RangeProfilerFilter(latency, min=0.94 * budget_ms, max=budget_ms)])
generator = torch.Generator().manual_seed(args.seed)
networks = {"searched": json.loads((args.out / "architecture.json").read_text())}
networks |= {f"random {n + 1}": sampler.draw(generator) for n in range(args.random)}

rows = {}
for name, architecture in networks.items():
    into = args.out / name.replace(" ", "_")
    into.mkdir(parents=True, exist_ok=True)
    write_json(into / "architecture.json", architecture)
    if not (into / "retrain.json").exists():
        chosen = ("--architecture", str(into / "architecture.json"), "--into", str(into))
        run("retrain.py", *chosen, *batch, "--epochs", str(args.train_epochs))
    if not (into / "certificate.json").exists():
        run("export.py", "--into", str(into))
    file = into / "subnet.onnx"
    rows[name] = (Certificate.load(file), read_metadata(file)["test_nme"], file.stat().st_size)

print(f"\n{datetime.date.today()}, {fingerprint().cpu}, load average at the end {os.getloadavg()[0]:.1f}")
print("CPU seconds: " + ", ".join(f"{script} {seconds:.0f}" for script, seconds in spent.items()))
print(f"table: {table.accuracy}")
print(f"budget {budget_ms:.4f} ms; the space spans {latency.cost.bounds()}\n")
print("| network | NME % | predicted ms | measured ms | noise floor % | passed | size KB | M MACs | blocks |")
print("|---|---|---|---|---|---|---|---|---|")
for name, (certificate, nme, size) in rows.items():
    blocks = ", ".join(map(str, certificate.architecture.values()))
    print(
        f"| {name} | {100 * nme:.2f} | {certificate.predicted_ms:.4f} | {certificate.measured_ms:.4f} "
        f"| {certificate.noise_floor_percent:.1f} | {'yes' if certificate.passed else 'no'} "
        f"| {size / 1000:.0f} | {certificate.macs / 1e6:.1f} | {blocks} |"
    )
errors = [100 * nme for name, (_, nme, _) in rows.items() if name != "searched"]
print(f"\nrandom: mean {np.mean(errors):.2f} %, best {min(errors):.2f} %")
