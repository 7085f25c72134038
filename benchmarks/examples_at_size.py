"""The network that an example's search finds, beside random networks of its budget that are trained alike.

    python benchmarks/examples_at_size.py proxyless [--seeds 0 1] [--random 5] [--out runs/examples_at_size]

For each seed: the example's own search on Fashion-MNIST, within half-way between the cheapest and the dearest
network of its space by a latency table of this machine; the example's own training from scratch of what was
found, and of random architectures that use 94 to 100 % of that budget; a certificate for each exported file.
ENAS and SPOS search among such networks, too. Prints tables with their conditions, in Markdown. A run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hwnas import ModelSpace
from hwnas.certificate import Certificate, certify
from hwnas.data import load_data
from hwnas.latency_table import build_latency_table
from hwnas.run_folder import read_json, write_json
from hwnas.sampling import Sampler
from hwnas.spaces import DARTSCells, ENASMacro, ENASMicro, ProxylessNAS, ShuffleNetV2
from lookup_tables import LookupTable, SessionSettings, fingerprint
from lookup_tables.build import Method
from profilers import LatencyProfiler, RangeProfilerFilter
from profilers.space import Architecture


@dataclass(frozen=True)
class Example:
    """What is run of an example.

    Attributes:
        make: the network with choices that its scripts search and train.
        method: of measuring its latency table.
        search: commands, to which ``--out`` is added.
        train: a command, to which ``--out``, ``--architecture`` and ``--into`` are added.
        report: the file that it writes.
        derives: whether the search could return an architecture.
    """

    make: Callable[[], torch.nn.Module]
    method: Method
    search: tuple[str, ...]
    train: str
    report: str = "retrain.json"
    derives: Callable[[Architecture], bool] = lambda architecture: True


def has_no_dead_edge(architecture: Architecture) -> bool:
    """DARTS derives no cell with the operation ``none``."""
    cells = DARTSCells.genotype_of(architecture).values()
    return all(operation != "none" for edges in cells for operation, _ in edges)


NEAR = "--min-latency {least}"
WITHIN = "--seed {seed} --latency-filter {table} --max-latency {budget}"
AT_SIZE = {
    "proxyless": Example(
        ProxylessNAS.small,
        "isolated",
        (
            "proxyless/search.py --seed {seed} --device {table} --ref-latency {budget} "
            "--epochs 4 --warmup-epochs 1 --batch-size 64 --batches 100 --arch-lr 0.03",
        ),
        "proxyless/retrain.py --epochs 2 --batch-size 64 --batches 125",
    ),
    "spos": Example(
        lambda: ShuffleNetV2.small(10, 1),
        "profiled",
        (
            "spos/supernet.py --seed {seed} --epochs 10 --batch-size 64 --batches 421",
            f"spos/search.py --latency-filter {{table}} --max-latency {{budget}} {NEAR} "
            "--trials 60 --population 15 --calibration-batches 10",
        ),
        "spos/evaluation.py --epochs 2 --batch-size 64 --batches 300",
        report="evaluation.json",
    ),
    "darts": Example(
        lambda: DARTSCells(10, 1, channels=8, cells=3, pooling_norm=False),
        "profiled",
        (f"darts/search.py {WITHIN} --epochs 2 --batch-size 32 --batches 70 --arch-lr 0.03",),
        "darts/retrain.py --channels 8 --cells 3 --drop-path 0 --epochs 2 --batch-size 48 --batches 110",
        derives=has_no_dead_edge,
    ),
    "enas-macro": Example(
        lambda: ENASMacro.small(10, 1),
        "profiled",
        (
            f"enas/search.py --space macro {WITHIN} {NEAR} "
            "--epochs 8 --batch-size 64 --batches 330 --updates 50 --arch-lr 0.03",
        ),
        "enas/retrain.py --searched-form --epochs 2 --batch-size 64 --batches 125",
    ),
    "enas-micro": Example(
        lambda: ENASMicro.small(10, 1),
        "profiled",
        (
            f"enas/search.py --space micro {WITHIN} {NEAR} "
            "--epochs 3 --batch-size 64 --batches 180 --updates 50 --arch-lr 0.03",
        ),
        "enas/retrain.py --searched-form --drop-path 0 --epochs 2 --batch-size 64 --batches 110",
    ),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("example", choices=AT_SIZE)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
parser.add_argument("--random", type=int, default=5)
parser.add_argument("--out", type=Path, default=Path("runs/examples_at_size"))
args = parser.parse_args()
torch.set_num_threads(1)

example, home = AT_SIZE[args.example], args.out.resolve() / args.example
image = torch.zeros(1, 1, 28, 28)
space = ModelSpace(example.make())
table_path, journal = home / "latency_table.json", home / "steps.jsonl"


def step(name: str, task: Callable[..., None], *arguments: object, **facts: object) -> None:
    """Does it once, in a process of its own: forked, for importing torch takes seven seconds."""
    if journal.exists() and any(json.loads(line)["step"] == name for line in journal.open()):
        return
    before, start = os.times(), time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=task, args=arguments, kwargs=facts)
    sys.stdout.flush()
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{name}: exit code {child.exitcode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    done = {"step": name, "cpu_s": cpu, "wall_s": time.monotonic() - start, "load": os.getloadavg()[0]}
    with journal.open("a") as file:
        file.write(json.dumps(done) + "\n")
    print(f"{name}: {cpu:.0f} CPU s, {done['wall_s']:.0f} s, load {done['load']:.1f}", flush=True)


def build_table() -> None:
    settings, method = SessionSettings(), example.method
    build_latency_table(space, image, table_path, name=args.example, settings=settings, method=method)


def run_script(command: str, **facts: object) -> None:
    """Runs a script of an example as its user does."""
    name, *words = command.split()
    script = Path(__file__).parents[1] / "examples" / name
    sys.argv = [str(script), *(word.format(**facts) for word in words)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def measure(into: Path, budget_ms: float, seed: int) -> None:
    """Writes the certificate of an exported network."""
    report = read_json(into / example.report, "report")
    architecture = space.validate(report["architecture"])
    subnet = space.freeze(architecture)
    subnet.load_state_dict(torch.load(into / "subnet.pt", weights_only=True))
    data = load_data("fashion-mnist")
    data.setup("test")
    certify(
        into / "subnet.onnx",
        subnet.eval(),
        LatencyProfiler(space, image, LookupTable.load(table_path)),
        architecture,
        budget_ms,
        inputs=[next(iter(data.test_dataloader()))[0]],
        test_accuracy=report["test_accuracy"],
        space=args.example,
        data="fashion-mnist",
        seed=seed,
        say=print,
    )


home.mkdir(parents=True, exist_ok=True)
step("table", build_table)
table = LookupTable.load(table_path)
latency = LatencyProfiler(space, image, table)
low, high = latency.cost.bounds()
budget_ms = (low + high) / 2
least_ms = 0.94 * budget_ms
within = Sampler(space, [RangeProfilerFilter(latency, least_ms, budget_ms)])

found: dict[int, dict[str, Certificate]] = {}
for seed in args.seeds:
    out = home / f"seed_{seed}"
    facts = {"out": out, "table": table_path, "budget": budget_ms, "least": least_ms, "seed": seed}
    for command in example.search:
        step(f"seed {seed}, {command.split()[0]}", run_script, f"{command} --out {{out}}", **facts)
    generator = torch.Generator().manual_seed(seed)
    drawn = (architecture for architecture in within.draw_many(100 * args.random, generator))
    networks = {"searched": read_json(out / "architecture.json", "architecture")}
    networks |= {f"random {n}": next(filter(example.derives, drawn)) for n in range(1, args.random + 1)}
    found[seed] = {}
    for name, architecture in networks.items():
        into = out / name.replace(" ", "_")
        into.mkdir(exist_ok=True)
        write_json(into / "architecture.json", architecture)
        command = f"{example.train} --out {{out}} --architecture {{into}}/architecture.json --into {{into}}"
        step(f"seed {seed}, training of {name}", run_script, command, **facts, into=into)
        if not (into / "certificate.json").exists():
            step(f"seed {seed}, measuring of {name}", measure, into, budget_ms, seed)
        found[seed][name] = Certificate.load(into / "certificate.json")

spent = [json.loads(line) for line in journal.open()]
loads = [each["load"] for each in spent]
print(
    f"\n{datetime.date.today()}, {fingerprint().cpu}, one thread; load average {min(loads):.1f} to "
    f"{max(loads):.1f}; {sum(each['cpu_s'] for each in spent):.0f} CPU seconds"
)
print(f"commands: {'; '.join([*example.search, example.train])}")
accuracy = table.accuracy
print(
    f"table: {accuracy.within_10_percent:.0f} % of {accuracy.subnets} networks held out in turn within 10 %, "
    f"MAPE {accuracy.mape_percent:.1f} %, noise floor {accuracy.noise_floor_percent:.1f} %"
)
print(f"budget {budget_ms:.4f} ms; the space spans {low:.4f} to {high:.4f} ms; {within.size:.2g} in range\n")
print("| seed | network | test accuracy % | predicted ms | measured ms | noise floor % | passed | M MACs |")
print("|---|---|---|---|---|---|---|---|")
for seed, rows in found.items():
    for name, row in rows.items():
        passed = "yes" if row.passed else "no" if row.valid else "invalid"
        print(
            f"| {seed} | {name} | {100 * row.test_accuracy:.2f} | {row.predicted_ms:.4f} "
            f"| {row.measured_ms:.4f} | {row.noise_floor_percent:.1f} | {passed} | {row.macs / 1e6:.2f} |"
        )
print("\n| seed | searched % | random: mean % | best % | searched ms | random: mean ms |")
print("|---|---|---|---|---|---|")
for seed, rows in found.items():
    searched, *others = rows.values()
    right = [100 * row.test_accuracy for row in others]
    mean_ms = np.mean([row.measured_ms for row in others])
    print(
        f"| {seed} | {100 * searched.test_accuracy:.2f} | {np.mean(right):.2f} ± {np.std(right, ddof=1):.2f} "
        f"| {max(right):.2f} | {searched.measured_ms:.4f} | {mean_ms:.4f} |"
    )
