"""The side of NNI 3.0 in `beside_nni`: one measure in a fresh process of an environment that holds NNI.

NNI's loader for ENAS is patched to Lightning 2.6, which reads an attribute that it does not have and unpacks
what its module expects whole. Experiments write to the home folder: it is a temporary one here.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

warnings.filterwarnings("ignore")
home = tempfile.TemporaryDirectory()
os.environ["HOME"] = home.name

import nni  # noqa: E402
import nni.nas.strategy as methods  # noqa: E402
from beside_nni_blocks import BATCH, TRAINER, Meter, Steps, between, images, layers, run, timed  # noqa: E402
from nni.nas.evaluator import FunctionalEvaluator  # noqa: E402
from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule, Trainer  # noqa: E402
from nni.nas.experiment import NasExperiment, NasExperimentConfig  # noqa: E402
from nni.nas.nn.pytorch import LayerChoice, ModelSpace  # noqa: E402
from nni.nas.oneshot.pytorch._dataloader import ConcatLoader  # noqa: E402
from pytorch_lightning.utilities.combined_loader import CombinedLoader  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def whole(loader: ConcatLoader) -> tuple[Any, int, int]:
    packed = CombinedLoader.__next__(loader)  # batch, its number, the number of its loader
    return packed, packed[1], 0


ConcatLoader._limits = None
ConcatLoader.__next__ = whole


class Network(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = layers(LayerChoice)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(batch)))


@nni.trace
class Searched(Steps, LightningModule):
    def __init__(self) -> None:
        super().__init__()


def fitted(method: Any, steps: int, epochs: int) -> tuple[ModelSpace, dict[str, float]]:
    """Runs an experiment; the space that it has mutated, and what the meter read."""
    space, meter = Network(), Meter(steps)
    evaluator = Lightning(
        Searched(),
        Trainer(**TRAINER, max_epochs=epochs + 2, callbacks=[meter]),
        train_dataloaders=DataLoader(images(steps), BATCH),
        val_dataloaders=DataLoader(images(steps), BATCH),
    )
    NasExperiment(space, evaluator, method).run()
    return space, meter.result


def darts(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return fitted(methods.DARTS(log_prob_every_n_step=10**9), steps, epochs)[1]


def proxyless(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return fitted(methods.Proxyless(log_prob_every_n_step=10**9), steps, epochs)[1]


def random_one_shot(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return fitted(methods.RandomOneShot(), steps, epochs)[1]


def enas(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    # An epoch is as many weight steps as episodes. NNI updates while the number of episodes is a multiple of
    # batches_per_update, in weight steps too: 25 an epoch, one update every 20, meet once in the timed one.
    method = methods.ENAS(batches_per_update=20, reward_metric_name="val_acc", log_prob_every_n_step=10**9)
    return fitted(method, steps, epochs)[1]


def freeze(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    """With weights: of the space that a search has turned into a supernet."""
    space = Network()
    methods.RandomOneShot().mutate_model(space)
    mutables = space.simplify()

    def once() -> nn.Module:
        return space.freeze({label: mutable.random() for label, mutable in mutables.items()})

    return {"ms": timed(once, steps)}


def trials(method: Any, steps: int, model_format: str) -> Mapping[str, float]:
    """NNI makes the network of each trial before it calls the user's function."""
    marks: list[float] = []

    def evaluate(network: nn.Module) -> None:
        marks.append(time.process_time())
        nni.report_final_result(0.5)

    space, evaluator = Network(), FunctionalEvaluator(evaluate)
    config = NasExperimentConfig(execution_engine="sequential", model_format=model_format)
    config.max_trial_number = 2 * steps
    NasExperiment(space, evaluator, method, config).run()
    return {"ms": between(marks, steps)}


def random_search(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return trials(methods.Random(seed=seed), steps, "simplified")


def evolution(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return trials(
        methods.RegularizedEvolution(population_size=20, sample_size=10, seed=seed), steps, "simplified"
    )


def evolution_raw(steps: int, epochs: int, seed: int) -> Mapping[str, float]:
    return trials(methods.RegularizedEvolution(population_size=20, sample_size=10, seed=seed), steps, "raw")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    functions = (darts, proxyless, random_one_shot, enas, freeze, random_search, evolution, evolution_raw)
    run({function.__name__: function for function in functions})
