"""What both sides of `beside_nni` share: the network in plain ``torch.nn``, the user's steps, the meters.

Imports torch and Lightning alone, so that either side's environment can load it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BATCH, SIZE, CLASSES = 32, 32, 10
STEM, FIRST, HEAD = 16, 8, 1280
# Width, layers and stride of the first layer: ProxylessNAS at width 0.5, 21 layers.
STAGES = ((16, 4, 2), (24, 4, 2), (40, 4, 2), (48, 4, 1), (96, 4, 2), (160, 1, 1))

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


# ---- the network


class ConvNormAct(nn.Sequential):
    """A convolution that keeps the size but for its stride, BatchNorm and ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; with a shortcut where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            ConvNormAct(inputs, hidden, 1),
            ConvNormAct(hidden, hidden, kernel, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.body(features)
        return features + found if self.has_shortcut else found


def layers(layer_choice: Callable[..., nn.Module]) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """Stem, the layers that are searched, and the head.

    Args:
        layer_choice: called with a dictionary of candidates and ``label=…``.
    """
    found: list[nn.Module] = []
    inputs = FIRST
    for outputs, count, first_stride in STAGES:
        for index in range(count):
            stride = first_stride if index == 0 else 1
            candidates: dict[str, nn.Module] = {
                f"k{kernel}_e{expansion}": InvertedResidual(inputs, outputs, kernel, expansion, stride)
                for kernel in (3, 5, 7)
                for expansion in (3, 6)
            }
            if stride == 1 and inputs == outputs:
                candidates["skip"] = nn.Identity()
            found.append(layer_choice(candidates, label=f"layer{len(found)}"))
            inputs = outputs
    stem = nn.Sequential(
        ConvNormAct(3, STEM, 3, 2),
        ConvNormAct(STEM, STEM, 3, groups=STEM),
        nn.Conv2d(STEM, FIRST, 1, bias=False),
        nn.BatchNorm2d(FIRST),
    )
    head = nn.Sequential(
        ConvNormAct(inputs, HEAD, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(HEAD, CLASSES)
    )
    return stem, nn.Sequential(*found), head


# ---- the user's module and data


class Steps:
    """The user's steps, for either side's ``LightningModule``; the network is ``self.model``."""

    model: nn.Module
    log: Callable[..., None]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", right, on_step=True, on_epoch=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.model)


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def images(batches: int) -> TensorDataset:
    return TensorDataset(
        torch.randn(batches * BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (batches * BATCH,))
    )


# ---- meters


class Meter(pl.Callback):
    """Times whole steps of a fit: from batch end to batch end, all callbacks and loops included.

    The first epoch warms up, the last counts what is saved for the backward passes, those between are timed.
    Give it to the trainer as the last callback.

    Args:
        steps: search steps an epoch; NNI's ENAS runs two batches for one.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.result: dict[str, float] = {}
        self._seconds: list[float] = []
        self._mark = 0.0
        self._saved: Saved | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.result["before_mb"] = resident_mb()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1:  # type: ignore[operator]  # it was given
            self.result["peak_mb"] = peak_mb()
            self._saved = Saved(pl_module)
            self._saved.__enter__()
        self._mark = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.process_time()
        if 0 < trainer.current_epoch < trainer.max_epochs - 1:  # type: ignore[operator]
            self._seconds.append(now - self._mark)
        self._mark = time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._saved is not None
        assert trainer.max_epochs is not None
        self._saved.__exit__()
        self.result["saved_mb"] = self._saved.peak / 1e6
        self.result["ms"] = 1e3 * sum(self._seconds) / (self.steps * (trainer.max_epochs - 2))


class Saved:
    """The most bytes that autograd holds at a time for backward passes, without parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        held = (*module.parameters(), *module.buffers())
        self._own = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._counts: dict[int, int] = {}
        self._now = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self) -> None:
        self._hooks.__exit__(None, None, None)

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor.detach())

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._own:
            return
        before = self._counts.get(place, 0)
        self._counts[place] = before + change
        if before == 0 or before + change == 0:
            self._now += change * storage.nbytes()
            self.peak = max(self.peak, self._now)


class _Held:
    """A saved tensor that is counted as long as the graph holds it."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.tensor = tensor
        self._saved = saved
        saved.count(tensor, 1)

    def __del__(self) -> None:
        self._saved.count(self.tensor, -1)


def between(marks: list[float], dropped: int) -> float:
    """Mean milliseconds from mark to mark, without the first ones."""
    kept = marks[dropped:]
    return 1e3 * (kept[-1] - kept[0]) / (len(kept) - 1)


def timed(work: Callable[[], object], times: int) -> float:
    """Mean CPU milliseconds of a call, after one that warms up."""
    work()
    begun = time.process_time()
    for _ in range(times):
        work()
    return 1e3 * (time.process_time() - begun) / times


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


# ---- a worker


def run(measures: Mapping[str, Callable[[int, int, int], Mapping[str, float]]]) -> None:
    """Runs the measures that the command line names and prints their numbers as the last line, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("measures", nargs="+", choices=measures)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True, help="timed ones")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in arguments.measures:
        pl.seed_everything(arguments.seed, verbose=False)
        found[name] = {**measures[name](arguments.steps, arguments.epochs, arguments.seed)}
    print("\n" + json.dumps(found))
