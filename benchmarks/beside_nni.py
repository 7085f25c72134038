"""Side by side with NNI 3.0 on the same blocks, in one run: CPU time and peak memory.

A space like ProxylessNAS's: 21 layers, width 0.5, inverted residuals with kernels of 3, 5 and 7 and
expansions of 3 and 6, and a skip where the shape is kept; batches of 32 random images of 32x32. Each
measure runs in a fresh process of one thread, ours and NNI's in turn, round by round, so that load hits
both; Ctrl-C ends with the rounds that are done. A search step is an architecture step and a weight step
(ENAS: a weight step, an episode, and a 25th of an update of the controller), through ``Trainer.fit`` here
and through NNI's ``NasExperiment`` there: CPU time from batch end to batch end, loaders, callbacks and
optimisers included, after an epoch that warms up. What is saved for backward passes is read off in a last
epoch that is not timed.

NNI is no dependency: ``--nni-python`` names the interpreter of an environment that holds it. One that works:

    python -m venv nni-env
    nni-env/bin/pip install nni==3.0 torch==2.13.0 pytorch-lightning==2.6.6 "setuptools<82"
    nni-env/bin/pip install tensorboard numba h5py gymnasium gym-notices
    nni-env/bin/pip install --no-deps tianshou==0.4.11 gym==0.26.2

    python benchmarks/beside_nni.py --nni-python nni-env/bin/python [--rounds 5] [--scale 1]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# This process stays small: a child's peak memory is never told as less than its parent's at the fork.

STEPS = {  # search steps an epoch
    "darts": 4,
    "proxyless": 6,
    "proxyless_full": 6,
    "random_one_shot": 16,
    "enas": 25,
    "beside_plain": 12,
    "quick": 25,
}
QUICK = {
    "ours": ("freeze", "random_search", "evolution", "evolution_with_networks"),
    "nni": ("freeze", "random_search", "evolution", "evolution_raw"),
}
ONLY_OURS = ("proxyless_full", "beside_plain")

Found = dict[str, list[dict[str, float]]]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--nni-python", required=True, help="interpreter of an environment with NNI 3.0")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--scale", type=int, default=1, help="times as many timed epochs")
arguments = parser.parse_args()
here = Path(__file__).parent
workers = {
    "ours": (sys.executable, str(here / "beside_nni_ours.py")),
    "nni": (arguments.nni_python, str(here / "beside_nni_worker.py")),
}


def measured(side: str, measure: str, seed: int) -> dict[str, dict[str, float]]:
    names = QUICK[side] if measure == "quick" else (measure,)
    numbers = ("--steps", STEPS[measure], "--epochs", arguments.scale, "--seed", seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if side == "nni":
        environment.pop("PYTHONPATH", None)
    command = [*workers[side], *names, *map(str, numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def told(numbers: list[float], digits: int = 0) -> str:
    """The median with the range."""
    low, high = min(numbers), max(numbers)
    return f"{statistics.median(numbers):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def column(rows: list[dict[str, float]], key: str) -> list[float]:
    return [row[key] for row in rows]


begun_load = os.getloadavg()[0]
ours: Found = {}
nni: Found = {}
rounds = 0
try:
    for number in range(arguments.rounds):
        found: list[tuple[Found, str, dict[str, float]]] = []
        for measure in STEPS:
            sides = ["ours"] if measure in ONLY_OURS else ["ours", "nni"]
            for side in sides if number % 2 == 0 else reversed(sides):
                for name, row in measured(side, measure, number).items():
                    found.append((ours if side == "ours" else nni, name, row))
        for rows, name, row in found:
            rows.setdefault(name, []).append(row)
        rounds += 1
        print(f"round {rounds} of {arguments.rounds}", file=sys.stderr, flush=True)
except KeyboardInterrupt:
    if not rounds:
        raise SystemExit("interrupted in the first round: there is nothing to tell") from None

described = Path("/proc/cpuinfo").read_text().splitlines()
cpu = next((line.split(": ")[1] for line in described if line.startswith("model name")), platform.processor())
print(f"{cpu}, {os.cpu_count()} cores, load {begun_load:.1f} to {os.getloadavg()[0]:.1f}, one thread each;")
print(
    f"Python {platform.python_version()}, torch {version('torch')}, Lightning {version('pytorch-lightning')};"
)
print(f"medians of {rounds} rounds with their range:")
print(f"python benchmarks/beside_nni.py --rounds {arguments.rounds} --scale {arguments.scale}\n")

print("| CPU time | hwnas, ms | NNI 3.0, ms | hwnas / NNI | aim |\n|---|---|---|---|---|")
for name, mine, theirs, digits, aim in (
    ("step of DARTS", "darts", "darts", 0, "<= 0.7"),
    ("step of Proxyless, the defaults: two paths here, all there", "proxyless", "proxyless", 0, "<= 0.5"),
    ("step of Proxyless, all paths", "proxyless_full", "proxyless", 0, ""),
    ("step of RandomOneShot", "random_one_shot", "random_one_shot", 0, ""),
    ("step of ENAS", "enas", "enas", 0, ""),
    ("freeze, with weights", "freeze", "freeze", 1, "<= 50 ms"),
    ("a trial of RandomSearch", "random_search", "random_search", 2, "<= 2 ms"),
    ("a trial of RegularizedEvolution", "evolution", "evolution", 2, "<= 2 ms"),
    ("the same, and its network with weights", "evolution_with_networks", "evolution_raw", 1, ""),
):
    left, right = column(ours[mine], "ms"), column(nni[theirs], "ms")
    ratios = [a / b for a, b in zip(left, right, strict=True)]
    print(f"| {name} | {told(left, digits)} | {told(right, digits)} | {told(ratios, 3)} | {aim} |")
left, right = column(ours["beside_plain"], "ms"), column(ours["beside_plain"], "plain_ms")
ratios = [a / b for a, b in zip(left, right, strict=True)]
print("\n| CPU time | supernet, ms | plain subnets, ms | supernet / plain | aim |\n|---|---|---|---|---|")
print(
    f"| step of RandomOneShot, the same paths | {told(left)} | {told(right)} | {told(ratios, 3)} | <= 1.05 |"
)

print("\n| memory, MB | hwnas: peak | grown in the search | saved for backward | NNI: peak | grown | saved |")
print("|---|---|---|---|---|---|---|")
for name, mine, theirs in (
    ("DARTS", "darts", "darts"),
    ("Proxyless, the defaults", "proxyless", "proxyless"),
    ("Proxyless, all paths", "proxyless_full", "proxyless"),
    ("RandomOneShot", "random_one_shot", "random_one_shot"),
    ("ENAS", "enas", "enas"),
):
    cells = []
    for rows in (ours[mine], nni[theirs]):
        grown = [row["peak_mb"] - row["before_mb"] for row in rows]
        cells += [told(column(rows, "peak_mb")), told(grown), told(column(rows, "saved_mb"))]
    print(f"| {name} | {' | '.join(cells)} |")
