"""The smallest search that has everything: branches, a depth, a coupled width, BatchNorm and dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hwnas import LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.classification import Classification
from hwnas.nn import BatchNorm2d, Conv2d, Linear
from hwnas.strategies import (
    DARTS,
    ENAS,
    FairNAS,
    GumbelDARTS,
    Proxyless,
    RandomOneShot,
    SampledStrategy,
    Sandwich,
)
from profilers.cost import Cost, CostTable
from profilers.penalty import SampleProfilerPenalty
from profilers.profile import Profiler

CLASSES = 3


class TinyNet(nn.Module):
    """8x8 images; two `LayerChoice`s, depth 0 to 2, and a width shared by all layers."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([2, 4], label="width")
        self.stem = nn.Sequential(
            Conv2d(1, width, 3, stride=2, padding=1, bias=False), BatchNorm2d(width), nn.ReLU()
        )
        self.op = LayerChoice(
            {
                "skip": nn.Identity(),
                "conv": nn.Sequential(Conv2d(width, width, 3, padding=1), BatchNorm2d(width)),
                "point": Conv2d(width, width, 1),
            },
            label="op",
        )
        self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        self.deep = Repeat(lambda _: nn.Sequential(Conv2d(width, width, 1), nn.Tanh()), (0, 2), label="depth")
        self.head = nn.Sequential(nn.Flatten(2), Mean(), nn.Dropout(0.3), Linear(width, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.deep(self.act(self.op(self.stem(images)))))
        return scores


class Mean(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=-1)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Random images, each time with other noise: an augmentation that draws global random numbers."""

    def __init__(self, size: int, seed: int, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (size,), generator=generator)
        self.images = torch.randn(size, 1, 8, 8, generator=generator) + self.labels[:, None, None, None]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = self.noise * (torch.randn(1, 8, 8) + float(np.random.rand()))
        return self.images[index] + noise, self.labels[index]


class TableProfiler(Profiler):
    """Costs written down by hand: conv is dear, depth and width add up, and everything costs something."""

    def __init__(self, space: ModelSpace) -> None:
        tables = [
            CostTable(("op", "width"), np.array([[0.0, 0.0], [5.0, 20.0], [2.0, 5.0]])),
            CostTable(("depth", "width"), np.array([[0.0, 0.0], [1.0, 3.0], [2.0, 6.0]])),
            CostTable(("act",), np.array([0.5, 1.0])),
        ]
        super().__init__(Cost(space.options, 1.0, tables, unit="ms"))


STRATEGIES: Mapping[str, Any] = {
    "darts": DARTS,
    "proxyless-two": lambda **options: Proxyless("two", **options),
    "proxyless-full": lambda **options: Proxyless("full", **options),
    "gumbel": GumbelDARTS,
    "gumbel-hard": lambda **options: GumbelDARTS(hard=True, **options),
}
"""The differentiable strategies by name: called with the keywords that all of them share."""


def sampled(kind: Callable[..., SampledStrategy]) -> Callable[..., SampledStrategy]:
    """Makes a strategy that takes, and drops, what is for differentiable strategies alone."""

    def make(**options: Any) -> SampledStrategy:
        return kind(**{n: o for n, o in options.items() if n not in DIFFERENTIABLE_OPTIONS})

    return make


DIFFERENTIABLE_OPTIONS = ("arc_learning_rate", "penalty", "arch_dataloader")


def enas(**options: Any) -> ENAS:
    """A few episodes only, and the penalty that goes with samples."""
    if "penalty" in options:
        given = options.pop("penalty")
        options["penalty"] = SampleProfilerPenalty(given.profiler, given.baseline)
    return ENAS(**{"batches_per_update": 3, "updates": 2, **options})


EVERY: Mapping[str, Any] = {
    **STRATEGIES,
    "darts-second-order": lambda **options: DARTS(order=2, **options),
    "random-one-shot": sampled(RandomOneShot),
    "fairnas": sampled(FairNAS),
    "sandwich": sampled(Sandwich),
    "enas": enas,
}
"""All strategies by name, those included that cannot do all that Lightning can."""


def classification(seed: int = 0, **options: Any) -> Classification:
    """Our own LightningModule around a `TinyNet`; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classification(ModelSpace(TinyNet()), CLASSES, **options)


def space_of(module: pl.LightningModule) -> ModelSpace:
    return next(child for child in module.modules() if isinstance(child, ModelSpace))


def loaders(batches: int = 4, noise: float = 0.1) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A user's plain loaders: shuffled training batches of 8, and two validation batches."""
    return (
        DataLoader(Noisy(8 * batches, 1, noise), batch_size=8, shuffle=True),
        DataLoader(Noisy(16, 2, noise), batch_size=8),
    )


def trainer(*callbacks: pl.Callback, max_epochs: int = 1, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return pl.Trainer(callbacks=list(callbacks), max_epochs=max_epochs, **given)


def fit(
    strategy: pl.Callback | None,
    module: pl.LightningModule | None = None,
    *callbacks: pl.Callback,
    seed: int = 5,
    batches: int = 4,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Trains with ``strategy`` from the global random state of ``seed``."""
    module = classification() if module is None else module
    torch.manual_seed(seed)
    np.random.seed(seed)
    made = trainer(*([] if strategy is None else [strategy]), *callbacks, **options)
    made.fit(module, *loaders(batches), ckpt_path=ckpt_path)
    return module, made


def logits_of(strategy: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = strategy.logits.state_dict()
    return found


def uniform(space: ModelSpace) -> dict[str, Tensor]:
    return {label: torch.full((len(found),), 1 / len(found)) for label, found in space.options.items()}


def random_probabilities(space: ModelSpace, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        label: torch.randn(len(found), generator=generator).mul(2).softmax(0)
        for label, found in space.options.items()
    }


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Exactly, through dictionaries and lists."""
    assert type(found) is type(expected), where
    if isinstance(found, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(found, Mapping):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert found == expected, where
