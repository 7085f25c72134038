from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from hwnas import LayerChoice, ModelSpace
from hwnas.strategies.side_effects import (
    frozen_weights,
    kept_buffers,
    own_random_numbers,
    random_states,
    set_random_states,
)
from tests.hwnas.strategies.tiny import CLASSES, EVERY, TinyNet, assert_equal, fit

every_strategy = pytest.mark.parametrize("name", EVERY)


class Updates(Metric):
    """How often, and on how many images, it was updated."""

    full_state_update = False
    count: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        self.count += 1
        self.images += len(scores)

    def compute(self) -> Tensor:
        return self.images.float()


class Same(nn.Module):
    """Every option is one network: training is the same whatever a strategy of one path picks."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.op = LayerChoice([shared, shared, shared], label="op")
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.op(images))
        return scores


class Watched(pl.LightningModule):
    """Logs in every way that a user may, and counts what its metrics see."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.space = ModelSpace(Same() if network is None else network)
        self.updates = Updates()
        self.several = MetricCollection(
            {"acc": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES)}, prefix="train_"
        )
        self.inner = nn.ModuleDict({"acc": MulticlassAccuracy(CLASSES)})
        self.seen = Updates()
        self.register_buffer("total", torch.zeros(()))
        self.total: Tensor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        scores = self.space(images)
        loss = F.cross_entropy(scores, labels)
        self.total = self.total + loss.detach()  # a buffer that is replaced
        self.updates(scores)
        self.inner["acc"](scores, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_inner", self.inner["acc"], on_epoch=True)
        self.log_dict({"a": loss.detach() * 2, "b": scores.detach().sum()}, on_epoch=True)
        self.log_dict(self.several(scores, labels), on_epoch=True)
        self.log("train_updates", self.updates, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        scores = self.space(images)
        self.seen(scores)
        self.log("val_seen", self.seen)
        self.log("val_loss", F.cross_entropy(scores, labels))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Counts(pl.Callback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Watched, *_: Any) -> None:
        self.found.append((int(module.updates.count), int(module.updates.images), module.total.clone()))


@pytest.mark.parametrize("name", ["proxyless-two", "proxyless-full", "enas"])
def test_training_metrics_and_random_numbers_equal_those_without_a_strategy(name: str) -> None:
    def run(strategy: Any) -> dict[str, Any]:
        counts = Counts()
        random.seed(3)
        module, trainer = fit(strategy, Watched(), counts, max_epochs=2)
        strategys = (
            "val_",
            "supernet_",
            "architecture_",
            "controller_",
        )  # validation: of a recalibrated subnet
        logged = {n: v for n, v in trainer.callback_metrics.items() if not n.startswith(strategys)}
        found = {"logged": logged, "module": module.state_dict(), "counts": counts.found}
        return {**found, "random": random_states()}

    expected = run(None)
    found = run(EVERY[name](arc_learning_rate=0.1))
    assert {"train_loss_epoch", "train_acc_epoch", "train_f1_epoch", "b_epoch"} < expected["logged"].keys()
    assert_equal(found, expected)


@every_strategy
def test_metrics_are_updated_once_a_batch(name: str) -> None:
    counts = Counts()
    _, trainer = fit(EVERY[name](), Watched(TinyNet()), counts, max_epochs=1)
    assert [count for count, _, _ in counts.found] == [1, 2, 3, 4]
    assert float(trainer.callback_metrics["train_updates"]) == 32
    assert float(trainer.callback_metrics["val_seen"]) == 16
    assert float(trainer.callback_metrics["supernet_val_seen"]) == 16


@every_strategy
def test_random_numbers_after_the_fit_are_those_without_a_strategy(name: str) -> None:
    # Not TinyNet: dropout draws as many numbers as there are channels.
    fit(None, Watched(), max_epochs=2)
    expected = torch.rand(3), np.random.rand(3)
    fit(EVERY[name](), Watched(), max_epochs=2)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_frozen_weights_ask_again_afterwards_but_not_those_the_user_froze() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in module.parameters()]
    inside = []
    with contextlib.suppress(KeyError), frozen_weights(module):
        inside += [parameter.requires_grad for parameter in module.parameters()]
        raise KeyError
    assert not any(inside)
    assert [parameter.requires_grad for parameter in module.parameters()] == before


def test_buffers_come_back_written_to_and_replaced() -> None:
    norm = nn.BatchNorm1d(2)
    mean, variance = norm.running_mean, norm.running_var
    with contextlib.suppress(KeyError), kept_buffers(norm):
        norm(torch.randn(4, 2))
        norm.running_var = torch.full((2,), 9.0)
        raise KeyError
    assert norm.running_mean is mean
    assert norm.running_var is variance
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.running_var.tolist() == [1, 1]


def test_own_random_numbers_depend_on_the_seed_and_leave_no_trace() -> None:
    before = random_states()
    draws = []
    for seed in (1, 2, 1):
        with own_random_numbers(seed):
            draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[2] != draws[1]
    assert_equal(random_states(), before)


def test_random_states_bring_the_next_numbers_back() -> None:
    np.random.randn()  # numpy keeps the second of a pair
    states = random_states()
    first = random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()
    set_random_states(states)
    assert first == (random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist())
