"""The side of hwnas in `beside_nni`: one measure in a fresh process."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from beside_nni_blocks import BATCH, TRAINER, Meter, Steps, between, images, layers, run, sgd, timed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hwnas import LayerChoice, ModelSpace
from hwnas.strategies import DARTS, ENAS, Proxyless, RandomOneShot
from hwnas.trials import RandomSearch, RegularizedEvolution, search
from hwnas.trials.method import Method
from profilers.space import Architecture

warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", category=FutureWarning)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = layers(LayerChoice)

    def forward(self, batch: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(self.stem(batch)))
        return found


class Searched(Steps, pl.LightningModule):
    def __init__(self, space: ModelSpace) -> None:
        super().__init__()
        self.model = space


class Plain(Steps, pl.LightningModule):
    """Trains plain subnets in turn, one a step, each with its own optimiser."""

    def __init__(self, subnets: list[nn.Module]) -> None:
        super().__init__()
        # Not registered: each is a network of its own.
        self._subnets = [(subnet.train(), sgd(subnet)) for subnet in subnets]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._subnets[0][1]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        vars(self)["model"], optimizer = self._subnets[batch_idx]
        self.trainer.optimizers = [optimizer]


class Paths(pl.Callback):
    """Notes the path of each step of the first timed epoch."""

    def __init__(self, space: ModelSpace) -> None:
        self.space = space
        self.found: list[Architecture] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            gates = self.space.gates or {}
            options = self.space.options
            self.found.append({label: options[label][gate.picked[0]] for label, gate in gates.items()})


def loader(steps: int) -> DataLoader[Any]:
    return DataLoader(images(steps), BATCH)


def fitted(
    callbacks: list[pl.Callback], module: pl.LightningModule, steps: int, epochs: int
) -> dict[str, float]:
    meter = Meter(steps)
    trainer = pl.Trainer(**TRAINER, max_epochs=epochs + 2, callbacks=[*callbacks, meter])
    trainer.fit(module, loader(steps))
    return meter.result


def darts(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    strategy = DARTS(arch_dataloader=loader(steps), seed=seed)
    return fitted([strategy], Searched(ModelSpace(Network())), steps, epochs)


def proxyless(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    strategy = Proxyless(arch_dataloader=loader(steps), seed=seed)
    return fitted([strategy], Searched(ModelSpace(Network())), steps, epochs)


def proxyless_full(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    strategy = Proxyless("full", arch_dataloader=loader(steps), seed=seed)
    return fitted([strategy], Searched(ModelSpace(Network())), steps, epochs)


def random_one_shot(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return fitted([RandomOneShot(seed=seed)], Searched(ModelSpace(Network())), steps, epochs)


def enas(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    # After the weight steps of an epoch as many episodes, and one update.
    strategy = ENAS(batches_per_update=steps, updates=1, arch_dataloader=loader(steps), seed=seed)
    return fitted([strategy], Searched(ModelSpace(Network())), steps, epochs)


def beside_plain(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    """RandomOneShot's step and that of the same architectures as plain subnets, alternately."""
    shared, plain = [], []
    for _ in range(2):
        space = ModelSpace(Network())
        paths = Paths(space)
        shared.append(fitted([RandomOneShot(seed=seed), paths], Searched(space), steps, 1)["ms"])
        subnets = [space.freeze(architecture) for architecture in paths.found]
        plain.append(fitted([], Plain(subnets), steps, 1)["ms"])
    return {"ms": statistics.mean(shared), "plain_ms": statistics.mean(plain)}


def freeze(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    space = ModelSpace(Network())
    return {"ms": timed(lambda: space.freeze(space.random()), steps)}


def trials(method: Method, steps: int, seed: int, freezes: bool = False) -> Mapping[str, float]:
    space = ModelSpace(Network())
    marks: list[float] = []

    def evaluate(architecture: Architecture) -> dict[str, float]:
        marks.append(time.process_time())
        if freezes:
            space.freeze(architecture)
        return {"accuracy": 0.5}

    search(space, evaluate, method, {"accuracy": "max"}, trials=2 * steps, seed=seed)
    return {"ms": between(marks, steps)}


def random_search(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return trials(RandomSearch(), steps, seed)


def evolution(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return trials(RegularizedEvolution(population_size=20, sample_size=10), steps, seed)


def evolution_with_networks(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return trials(RegularizedEvolution(population_size=20, sample_size=10), steps, seed, freezes=True)


if __name__ == "__main__":
    functions = (
        darts,
        proxyless,
        proxyless_full,
        random_one_shot,
        enas,
        beside_plain,
        freeze,
        random_search,
        evolution,
        evolution_with_networks,
    )
    run({function.__name__: function for function in functions})
