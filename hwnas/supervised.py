"""What the ready-made LightningModules share: steps, metrics, a teacher, optimiser and schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torchmetrics import Metric, MetricCollection

Metrics = Metric | Sequence[Metric] | Mapping[str, Metric] | MetricCollection
OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["one-cycle", "cosine", "constant"]
MakeOptimizer = Callable[[list[dict[str, Any]], float], Optimizer]
"""Parameter groups with their ``weight_decay``, and the learning rate, to an optimiser."""
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
"""The optimiser and how many steps it will take, to a schedule that is stepped after each."""


class Supervised(pl.LightningModule, ABC):
    """Trains a network on ``(inputs, targets)`` batches; a task says what its losses are.

    Logs ``train_loss``, ``val_loss`` and ``test_loss``, and each metric under its name with the same
    prefixes.

    Args:
        network: inputs to outputs; a `ModelSpace` or a plain network.
        metrics: of torchmetrics, called with outputs and targets: one, several (then named after their
            classes), or a dictionary with names.
        lr: learning rate; where there is a schedule, its peak.
        momentum: Nesterov momentum of ``"sgd"``.
        weight_decay: on weights of two and more dimensions; biases and normalisation have none.
        optimizer: ``"sgd"``, ``"adamw"``, or ``(parameter groups, lr)`` to an optimiser.
        schedule: ``"one-cycle"`` warms up in the first twentieth and anneals to zero, ``"cosine"``
            anneals to zero, ``"constant"`` stays; or ``(optimiser, steps)`` to a schedule. They are
            stepped after each step.
        teacher: a trained network that the network learns from as well, on the same inputs. It is put into
            evaluation mode, gets no gradient, and is in no checkpoint.
        distillation_weight: share of the teacher's loss in the loss of training, from 0 to 1.
        auxiliary_weight: of what a network returns in training behind its outputs, in a tuple: outputs of
            auxiliary heads, whose loss is added to the loss of training with this factor.

    Raises:
        ValueError: an unknown name, or a weight outside 0 to 1.
    """

    def __init__(
        self,
        network: nn.Module,
        metrics: Metrics,
        lr: float,
        momentum: float,
        weight_decay: float,
        optimizer: OptimizerName | MakeOptimizer,
        schedule: ScheduleName | MakeSchedule,
        teacher: nn.Module | None,
        distillation_weight: float,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if not (callable(optimizer) or optimizer in ("sgd", "adamw")):
            raise ValueError(f"optimizer is 'sgd', 'adamw' or a function; got {optimizer!r}")
        if not (callable(schedule) or schedule in ("one-cycle", "cosine", "constant")):
            raise ValueError(f"schedule is 'one-cycle', 'cosine', 'constant' or a function; got {schedule!r}")
        if not 0 <= distillation_weight <= 1:
            raise ValueError(f"distillation_weight is a share from 0 to 1; got {distillation_weight}")
        # Twice as fast on CPUs: 1,440 images a second against 750 (small-mobilenet, two threads).
        if all(parameter.ndim <= 4 for parameter in network.parameters()):
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.schedule = schedule
        self.distillation_weight = distillation_weight
        self.auxiliary_weight = auxiliary_weight
        # In a tuple, or it would be trained, saved, and put into training mode with the rest.
        self._teacher = () if teacher is None else (teacher.eval(),)
        given: Any = metrics  # torchmetrics wants a dictionary of its own type
        collection = metrics if isinstance(metrics, MetricCollection) else MetricCollection(given)
        self.train_metrics = collection.clone(prefix="train_")
        self.val_metrics = collection.clone(prefix="val_")
        self.test_metrics = collection.clone(prefix="test_")

    # ---- what a task is

    @abstractmethod
    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training makes small: a scalar."""

    @abstractmethod
    def evaluation_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is logged of validation and test: a scalar."""

    @abstractmethod
    def imitation_loss(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """How far outputs are from the teacher's on the same inputs: a scalar."""

    # ---- steps

    def forward(self, inputs: Tensor) -> Any:
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.network(inputs)

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device, cast("torch.dtype", self.dtype))  # never the name of one

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs, *auxiliary = found if isinstance(found := self(inputs), tuple) else (found,)
        loss = self.training_loss(outputs, targets)
        for other in auxiliary:
            loss = loss + self.auxiliary_weight * self.training_loss(other, targets)
        for teacher in self._teacher:
            with torch.no_grad():
                taught = teacher(inputs)
            if taught.shape != outputs.shape:
                raise ValueError(
                    "a teacher's outputs have the shape of the network's; got "
                    f"{tuple(taught.shape)} and {tuple(outputs.shape)}"
                )
            share = self.distillation_weight
            loss = (1 - share) * loss + share * self.imitation_loss(outputs, taught)
        self.train_metrics(outputs, targets)
        size = len(targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: Any, name: str, metrics: MetricCollection) -> None:
        inputs, targets = batch
        outputs = self(inputs)
        self.log(
            f"{name}_loss", self.evaluation_loss(outputs, targets), batch_size=len(targets), sync_dist=True
        )
        metrics(outputs, targets)
        self.log_dict(metrics, prog_bar=True, batch_size=len(targets))

    # ---- optimiser

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = self._made_optimizer(groups)
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                f"schedule {self.schedule!r} needs to know how many steps there are, and this trainer has "
                "no end: give it max_steps (or max_epochs, where the loader has a length), or take "
                "schedule='constant'"
            )
        schedule = self._made_schedule(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _made_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        if self.optimizer == "sgd":
            nesterov = self.momentum > 0
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=nesterov)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return self.optimizer(groups, self.lr)

    def _made_schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        if self.schedule == "one-cycle":
            # Of 20 steps the warm-up would end at step 0, and torch divide by that.
            warm = 0.0 if steps == 20 else 0.05
            return OneCycleLR(
                optimizer, max_lr=self.lr, total_steps=steps, pct_start=warm, cycle_momentum=False
            )
        if self.schedule == "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
        assert callable(self.schedule)  # "constant" has none
        return self.schedule(optimizer, steps)
