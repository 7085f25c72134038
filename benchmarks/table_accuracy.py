"""Is the table right: predicted against measured on networks that it has not seen, beside multiply-adds.

Builds a table of the default space at one thread, for ONNX Runtime's full optimisation and for EXTENDED
(which behaves like another device), then measures 60 other networks: 30 uniform draws and 30 spread from the
cheapest to the dearest. The competitor is a line through the same calibration networks over multiply-adds.
A noise floor above 3 % makes a level's result invalid; it is then measured again.

    python benchmarks/table_accuracy.py [--networks 60] [--out runs/table_accuracy]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import onnxruntime
import torch

from hwnas import ModelSpace
from hwnas.latency_table import build_latency_table, spread_architectures, subnet_source
from hwnas.spaces import SmallMobileNet
from lookup_tables import SessionSettings, fingerprint, measure, to_onnx
from lookup_tables.calibrate import accuracy_of, calibrate
from profilers import FlopsProfiler, LatencyProfiler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--networks", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path("runs/table_accuracy"))
arguments = parser.parse_args()
torch.set_num_threads(1)

space = ModelSpace(SmallMobileNet())
example = torch.zeros(1, 1, 28, 28)
macs = FlopsProfiler(space, example).cost
sites = space.sites(example)
calibrating = spread_architectures(space, example, 32, seed=0)
held_out = [
    a for a in spread_architectures(space, example, arguments.networks + 32, seed=1) if a not in calibrating
]
held_out = held_out[: arguments.networks]
sources = {str(n): subnet_source(space, sites, a, example) for n, a in enumerate(held_out)}

print(
    f"Device: {fingerprint().cpu}, {fingerprint().cores} cores; ONNX Runtime {onnxruntime.__version__}, "
    "1 thread,"
)
print(
    f"clock thread_cpu; {len(held_out)} held-out networks, {macs.bounds()[0] / 1e6:.1f} to "
    f"{macs.bounds()[1] / 1e6:.1f} M multiply-adds\n"
)
print("| level | predictor | MAPE | within 5 % | within 10 % | Spearman | noise floor | build s |")
print("|---|---|---|---|---|---|---|---|")
models = to_onnx({name: (source.module, source.inputs) for name, source in sources.items()})
for level in ("all", "extended"):
    settings = SessionSettings(threads=1, optimisation=level)
    path = arguments.out / f"{level}.json"
    begun = time.monotonic()
    is_new = not path.exists()
    table = build_latency_table(space, example, path, name="small-mobilenet", settings=settings)
    seconds = f"{time.monotonic() - begun:.0f}" if is_new else "-"
    latency = LatencyProfiler(space, example, table)
    for attempt in range(3):
        first, second = (
            [found[name].median_us for name in sources]
            for found in (
                measure(models, settings, seed=2 * attempt),
                measure(models, settings, seed=2 * attempt + 1),
            )
        )
        by_table = accuracy_of([1e3 * latency.profile(a) for a in held_out], first, second)
        if by_table.noise_floor_percent <= 3.0:
            break
        print(f"| {level} | invalid: noise floor {by_table.noise_floor_percent:.2f} % | | | | | | |")
    fitted = calibrate(
        [macs.of(a) for a in calibrating],
        [1] * len(calibrating),
        [1e3 * (net.median_us + net.repeat_us) / 2e3 for net in table.subnets],
    )
    by_macs = accuracy_of([fitted.predict_us(macs.of(a), 1) for a in held_out], first, second)
    for name, found in (("lookup table", by_table), ("a line over MACs", by_macs)):
        print(
            f"| {level} | {name} | {found.mape_percent:.2f} % | {found.within_5_percent:.0f} % "
            f"| {found.within_10_percent:.0f} % | {found.spearman:.3f} | {found.noise_floor_percent:.2f} % "
            f"| {seconds} |",
            flush=True,
        )
