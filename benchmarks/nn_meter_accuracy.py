"""Is an nn-Meter of this machine right: predicted against measured, beside a lookup table and multiply-adds.

Builds kernel predictors (`hwnas nnmeter build`), which know nothing of the two families that follow, and a
lookup table of each. Measures 20 other networks of each family, half uniform draws and half spread from the
cheapest to the dearest: mobile inverted residuals, and residual blocks of dense convolutions. The
competitor is a line through the table's calibration networks over multiply-adds. nn-Meter is shown twice:
asked for whole networks, and as `NnMeterProfiler` sums it over sites; the difference is what the runtime
fuses across their borders. A noise floor above 3 % makes a family's result invalid; it is measured again.

    python benchmarks/nn_meter_accuracy.py [--families mobile residual] [--networks 20]
        [--out runs/nn_meter_accuracy]

What was measured is kept in ``--out``: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace
from hwnas.latency_table import build_latency_table, spread_architectures, subnet_source
from hwnas.spaces import SmallMobileNet
from lookup_tables import LookupTable, SessionSettings, fingerprint, measure, to_onnx
from lookup_tables.calibrate import accuracy_of, calibrate
from lookup_tables.whole_file import write_whole
from profilers import FlopsProfiler, LatencyProfiler
from profilers.nn_meter import NnMeterPredictor, NnMeterProfiler
from profilers.nn_meter.build import build_predictor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--families", nargs="+", default=["mobile", "residual"], choices=["mobile", "residual"])
parser.add_argument("--networks", type=int, default=20, help="of each family")
parser.add_argument("--out", type=Path, default=Path("runs/nn_meter_accuracy"))
arguments = parser.parse_args()
torch.set_num_threads(1)
settings = SessionSettings()


def convolution(narrow: int, wide: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(narrow, wide, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(wide))


class Residual(nn.Module):
    """Two convolutions and a sum (ResNet, arXiv 1512.03385), without the ReLU that follows."""

    def __init__(self, width: int, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.body = nn.Sequential(
            convolution(width, hidden, kernel), nn.ReLU(), convolution(hidden, width, 3)
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class ResidualNet(nn.Module):
    """Three stages of three blocks at 32x32, 16x16 and 8x8; kernels, expansions and depth are searched.

    The ReLU after a block runs outside of it, as a site of its own: a runtime fuses it all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 16, 3), nn.ReLU())
        self.halvings = nn.ModuleList(
            nn.Sequential(convolution(width, 2 * width, 3, 2), nn.ReLU()) for width in (16, 32)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(self.block(width, f"stage{stage}.block{index}") for index in range(3))
            for stage, width in enumerate((16, 32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def block(self, width: int, label: str) -> LayerChoice:
        candidates: dict[str, nn.Module] = {"skip": nn.Identity()}
        for kernel, expansion in ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1)):
            candidates[f"k{kernel}_e{expansion}"] = Residual(width, kernel, expansion)
        return LayerChoice(candidates, label=label)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for stage, blocks in enumerate(self.stages):
            if stage:
                features = self.halvings[stage - 1](features)
            for block in blocks:
                features = block(features).relu()
        return self.linear(features.mean((2, 3)))


@dataclass
class Family:
    """A space, and how many networks calibrate its lookup table."""

    name: str
    network: nn.Module
    example: Tensor
    subnets: int

    def __post_init__(self) -> None:
        self.space = ModelSpace(self.network)
        self.folder = arguments.out / self.name
        self.calibrating = spread_architectures(self.space, self.example, self.subnets, seed=0)
        others = spread_architectures(self.space, self.example, arguments.networks + self.subnets, seed=1)
        self.held_out = [a for a in others if a not in self.calibrating][: arguments.networks]

    def table(self) -> tuple[LookupTable, str]:
        """And the seconds that it took, if it was not there."""
        path, begun = self.folder / "table.json", time.monotonic()
        is_new = not path.exists()
        table = build_latency_table(
            self.space, self.example, path, name=self.name, settings=settings, subnets=self.subnets
        )
        return table, f"{time.monotonic() - begun:.0f}" if is_new else "-"

    def models(self) -> dict[str, bytes]:
        """The networks that are held out."""
        paths = {str(n): self.folder / f"{n}.onnx" for n in range(len(self.held_out))}
        if not all(path.exists() for path in paths.values()):
            sites = self.space.sites(self.example)
            sources = [subnet_source(self.space, sites, a, self.example) for a in self.held_out]
            made = to_onnx({str(n): (s.module, s.inputs) for n, s in enumerate(sources)})
            for name, model in made.items():
                write_whole(paths[name], model)
        return {name: path.read_bytes() for name, path in paths.items()}

    def measured(self, models: dict[str, bytes]) -> tuple[list[float], list[float]]:
        """Twice; a pair of measurements whose noise floor is too high is repeated, up to twice."""
        path = self.folder / "measured.json"
        if not path.exists():
            for attempt in range(3):
                pair = [measure(models, settings, seed=2 * attempt + turn) for turn in range(2)]
                first, second = ([found[name].p10_us for name in models] for found in pair)
                floor = accuracy_of(first, first, second).noise_floor_percent
                print(f"{self.name}: noise floor {floor:.2f} %, load average {os.getloadavg()[0]:.1f}")
                if floor <= 3.0:
                    break
            write_whole(path, json.dumps([first, second]))
        first, second = json.loads(path.read_text())
        return first, second


def timed_predictor() -> tuple[NnMeterPredictor, str]:
    folder = arguments.out / "nn-meter"
    begun = time.monotonic()
    if (folder / "predictors" / "here" / "predictor.json").exists():
        return NnMeterPredictor.load("here", folder), "-"
    found = build_predictor("here", settings, folder=folder)
    return found, f"{time.monotonic() - begun:.0f}"


def show(
    family: str,
    predictor: str,
    predicted: list[float],
    first: list[float],
    second: list[float],
    seconds: str,
) -> None:
    found = accuracy_of(predicted, first, second)
    rmspe = 100 * float(np.sqrt(np.mean((np.array(predicted) / np.array(first) - 1) ** 2)))
    print(
        f"| {family} | {predictor} | {rmspe:.2f} % | {found.mape_percent:.2f} % "
        f"| {found.within_5_percent:.0f} % | {found.within_10_percent:.0f} % | {found.spearman:.3f} "
        f"| {found.noise_floor_percent:.2f} % | {seconds} |",
        flush=True,
    )


print(
    f"Device: {fingerprint().cpu}, {fingerprint().cores} cores; ONNX Runtime {onnxruntime.__version__}, "
    "1 thread,"
)
print(f"optimisation all, clock thread_cpu; load average at the start {os.getloadavg()[0]:.1f}\n", flush=True)
both = {
    "mobile": Family("mobile", SmallMobileNet(), torch.zeros(1, 1, 28, 28), subnets=24),
    "residual": Family("residual", ResidualNet(), torch.zeros(1, 3, 32, 32), subnets=12),
}
families = [both[name] for name in arguments.families]
measured = []
for family in families:
    table, seconds = family.table()
    models = family.models()
    measured.append((family, table, seconds, models, *family.measured(models)))
predictor, built = timed_predictor()
print("\n| family | predictor | RMSPE | MAPE | within 5 % | within 10 % | Spearman | noise floor | build s |")
print("|---|---|---|---|---|---|---|---|---|", flush=True)
everything: dict[str, tuple[list[float], list[float], list[float]]] = {}
borders: list[str] = []
notes: list[str] = []
for family, table, seconds, models, first, second in measured:
    space, example = family.space, family.example
    macs, latency = FlopsProfiler(space, example).cost, LatencyProfiler(space, example, table)
    line = calibrate(
        [macs.of(a) for a in family.calibrating],
        [1] * len(family.calibrating),
        [(net.p10_us + net.repeat_us) / 2 for net in table.subnets],
    )
    readings = predictor.read(models)
    left_out = {f"{gap.layer} {gap.reason}" for reading in readings.values() for gap in reading.gaps}
    whole = [1e3 * (reading.ms + predictor.constant_ms) for reading in readings.values()]
    profiler = NnMeterProfiler(space, example, predictor, allow_partial=True)
    summed = [1e3 * profiler.profile(a) for a in family.held_out]
    for name, predicted, took in (
        ("nn-Meter, whole networks", whole, built),
        ("nn-Meter, sum over sites", summed, built),
        ("lookup table", [1e3 * latency.profile(a) for a in family.held_out], seconds),
        ("a line over MACs", [line.predict_us(macs.of(a), 1) for a in family.held_out], "-"),
    ):
        show(family.name, name, predicted, first, second, took)
        kept = everything.setdefault(name, ([], [], []))
        for all_of, these in zip(kept, (predicted, first, second), strict=True):
            all_of.extend(these)
    error = np.array(summed) / np.array(whole) - 1
    borders.append(
        f"{family.name}: {100 * np.median(error):.1f} % in the middle, {100 * error.min():.1f} to "
        f"{100 * error.max():.1f} %"
    )
    notes.append(f"{family.name}: left out: {'; '.join(left_out) or 'nothing'}")
for name, (predicted, first, second) in everything.items():
    show("together", name, predicted, first, second, "")
print(f"\nSum over sites against whole networks: {'; '.join(borders)}.")
print(*notes, sep="\n")
print(f"Load average at the end: {os.getloadavg()[0]:.1f}")
