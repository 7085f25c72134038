"""A LightningModule for who has none: regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.regression import MeanAbsoluteError

from hwnas.supervised import MakeOptimizer, MakeSchedule, Metrics, OptimizerName, ScheduleName, Supervised

Loss = Callable[[Tensor, Tensor], Tensor]
"""Predictions and targets of one shape to a scalar."""

LOSSES: dict[str, Loss] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


@final
class Regression(Supervised):
    """Trains a network on ``(inputs, targets)`` batches, with AdamW and a one-cycle schedule by default.

    Logs ``train_loss``, ``train_mae``, ``val_loss``, ``val_mae``, ``test_loss`` and ``test_mae``; with other
    ``metrics``, these in place of the mean absolute error.

    With a teacher the loss of training is ``(1 - weight) * loss(prediction, target) + weight *
    loss(prediction, teacher's prediction)``.

    Args:
        network: inputs ``(N, ...)`` to predictions of the targets' shape; a `ModelSpace` or a plain network.
        loss: ``"mse"``, ``"mae"``, ``"huber"`` (bend at 1), or ``(predictions, targets)`` to a scalar.
        lr: peak of the schedule.
        momentum: Nesterov momentum of ``"sgd"``.
        weight_decay: on weights of two and more dimensions; biases and normalisation have none.
        schedule: ``"one-cycle"`` warms up in the first twentieth and anneals to zero, ``"cosine"``
            anneals to zero, ``"constant"`` stays; or ``(optimiser, steps)`` to a schedule. They are
            stepped after each step.
        optimizer: ``"sgd"``, ``"adamw"``, or ``(parameter groups, lr)`` to an optimiser.
        metrics: of torchmetrics, called with predictions and targets: one, several (then named after
            their classes), or a dictionary with names; None: the mean absolute error, ``mae``.
        teacher: a trained network with predictions of the same shape. It is put into evaluation mode, gets
            no gradient, and is in no checkpoint.
        distillation_weight: the teacher's share of the loss.

    Raises:
        ValueError: an unknown name, or a number outside its range; in training, predictions and targets
            of different shapes.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: str | Loss = "mse",
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: ScheduleName | MakeSchedule = "one-cycle",
        optimizer: OptimizerName | MakeOptimizer = "adamw",
        metrics: Metrics | None = None,
        teacher: nn.Module | None = None,
        distillation_weight: float = 0.5,
    ) -> None:
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss is {', '.join(map(repr, LOSSES))} or a function; got {loss!r}")
        super().__init__(
            network,
            {"mae": MeanAbsoluteError()} if metrics is None else metrics,
            lr,
            momentum,
            weight_decay,
            optimizer,
            schedule,
            teacher,
            distillation_weight,
        )
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.evaluation_loss(outputs, targets)

    def evaluation_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # Torch would broadcast (N, 1) and (N,) to (N, N): every prediction against every target.
        if outputs.shape != targets.shape:
            raise ValueError(
                f"predictions have the shape of the targets; got {tuple(outputs.shape)} and "
                f"{tuple(targets.shape)}. Let the network or the data drop or add an axis"
            )
        # The gradient of the Huber loss fails where targets are whole numbers.
        return self.loss(outputs, targets if targets.is_floating_point() else targets.to(outputs.dtype))

    def imitation_loss(self, outputs: Tensor, taught: Tensor) -> Tensor:
        return self.loss(outputs, taught)
