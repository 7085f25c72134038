"""SPOS, step 2 of 3: evolution on the trained supernet, with recalibrated BatchNorm, within hard limits.

    python examples/spos/search.py --out runs/spos --max-macs 1.2e6
    python examples/spos/search.py --out runs/spos --latency-filter laptop.json --max-latency 0.2

--latency-filter is a device's lookup table, as `hwnas table build` and `hwnas table import` write it; a file
that is absent is measured on this machine first. --max-latency is in milliseconds; --min-latency keeps the
search near it, for a supernet that was trained for minutes, not hours, ranks small networks first. All limits
may be given; nothing outside of them is ever evaluated. Every network gets the supernet's weights, BatchNorm
statistics of its own from training images, and is judged on the selection images. A search that was killed
goes on from its journal.

The authors' search (paper, section 3.3) has a population of 50 over 20 generations, 1,000 networks, and half
of them by mutation, half by crossover: give --trials 1000 --population 50. Departure: the oldest of the
population dies, not the worst (regularised evolution, arXiv 1802.01548).
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch
from spos_space import make_space
from torchmetrics.classification import MulticlassAccuracy

from hwnas.data import describe, load_data, retrain_dataloader
from hwnas.latency_table import build_latency_table
from hwnas.run_folder import read_json, write_json
from hwnas.trials import RegularizedEvolution, SupernetEvaluator, search
from lookup_tables import LookupTable, SessionSettings
from profilers import FlopsProfiler, LatencyProfiler, RangeProfilerFilter

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/spos"), help="where supernet.py wrote")
parser.add_argument("--max-macs", type=float, help="the most multiply-adds")
parser.add_argument("--latency-filter", type=Path, metavar="TABLE.json", help="of the device")
parser.add_argument("--max-latency", type=float, help="in ms by that table; default: amid the extremes")
parser.add_argument("--min-latency", type=float, help="in ms: see above")
parser.add_argument("--trials", type=int, default=200)
parser.add_argument("--population", type=int, default=30)
parser.add_argument("--calibration-batches", type=int, default=20)
parser.add_argument("--smoke", action="store_true", help="eight networks: does it run?")
args = parser.parse_args()
if args.latency_filter is None and (args.max_latency, args.min_latency) != (None, None):
    parser.error("--max-latency and --min-latency are by a device's table: give --latency-filter, too")
if args.smoke:
    args.trials, args.population, args.calibration_batches = 8, 4, 2

trained = read_json(args.out / "supernet.json", "supernet")
data = load_data(trained["data"], folder=trained["data_folder"], seed=trained["seed"])
data.prepare_data()
data.setup("fit")
facts = describe(data)
space = make_space(facts, trained["search"], trained["smoke"])
space.load_state_dict(torch.load(args.out / "supernet.pt", weights_only=True))
example = torch.zeros(1, *facts.input_shape)

macs = FlopsProfiler(space, example)
limits = [] if args.max_macs is None else [RangeProfilerFilter(macs, max=args.max_macs)]
costs = {"macs": macs}
if args.latency_filter is not None:
    if not args.latency_filter.exists():
        settings, count = SessionSettings(), 3 if args.smoke else 32
        build_latency_table(
            space, example, args.latency_filter, name="shufflenet-v2", settings=settings, subnets=count
        )
    table = LookupTable.load(args.latency_filter)
    latency = LatencyProfiler(space, example, table, allow_other_device=True)
    most = sum(latency.cost.bounds()) / 2 if args.max_latency is None else args.max_latency
    limits.append(RangeProfilerFilter(latency, args.min_latency, most))
    costs["latency_ms"] = latency
print("; ".join(map(str, limits)) or "no limit")

evaluate = SupernetEvaluator(
    space,
    list(islice(retrain_dataloader(data), args.calibration_batches)),
    data.val_dataloader(),
    {"accuracy": MulticlassAccuracy(facts.num_classes, average="micro")},
)


def told(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())


asked = hashlib.sha256(";".join(map(str, limits)).encode()).hexdigest()[:8]  # other limits, another search
found = search(
    space,
    evaluate,
    RegularizedEvolution(args.population, sample_size=max(1, args.population // 3), crossover=0.5),
    {"accuracy": "max"},
    trials=args.trials,
    filters=limits,
    costs=costs,
    seed=trained["seed"],
    journal=args.out / f"trials-{asked}.jsonl",
    report=lambda trial: print(f"{trial.number:>5} {told(trial.metrics)}"),
)
print(f"best: {told(found.best.metrics)}: {found.best.architecture}")
write_json(args.out / "architecture.json", found.best.architecture)
kept = {"limits": list(map(str, limits)), "latency_table": None, "max_latency_ms": None}
if args.latency_filter is not None:
    kept |= {"latency_table": str(args.latency_filter.resolve()), "max_latency_ms": most}
write_json(args.out / "search.json", {**kept, **found.best.metrics})
