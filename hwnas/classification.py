"""A LightningModule for who has none: classification."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from hwnas.supervised import MakeOptimizer, MakeSchedule, Metrics, OptimizerName, ScheduleName, Supervised


@final
class Classification(Supervised):
    """Trains a network on ``(images, labels)`` batches, with SGD and a one-cycle schedule by default.

    Logs ``train_loss``, ``train_acc``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``; with other
    ``metrics``, these in place of the accuracy.

    Distillation is that of Hinton et al. (arXiv 1503.02531, section 2): the loss of training is
    ``(1 - weight) * cross entropy + weight * T^2 * KL(teacher at T || network at T)``, where scores are
    divided by the temperature ``T`` before the softmax. Departure: the divergence in place of the cross
    entropy with the teacher's probabilities; they differ by the teacher's entropy, which has no gradient.

    Args:
        network: images ``(N, ...)`` to scores ``(N, num_classes, ...)``; a `ModelSpace` or a plain network.
        num_classes: how many classes.
        lr: peak of the schedule.
        momentum: Nesterov momentum of ``"sgd"``.
        weight_decay: on weights of two and more dimensions; biases and normalisation have none.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, in training.
        schedule: ``"one-cycle"`` warms up in the first twentieth and anneals to zero, ``"cosine"``
            anneals to zero, ``"constant"`` stays; or ``(optimiser, steps)`` to a schedule. They are
            stepped after each step.
        optimizer: ``"sgd"``, ``"adamw"``, or ``(parameter groups, lr)`` to an optimiser.
        metrics: of torchmetrics, called with scores and labels: one, several (then named after their
            classes), or a dictionary with names; None: the share that is right, ``acc``.
        teacher: a trained network of the same classes. It is put into evaluation mode, gets no gradient,
            and is in no checkpoint.
        temperature: of teacher and network in distillation.
        distillation_weight: the teacher's share of the loss; the paper advises most of it.
        auxiliary_weight: of the loss of auxiliary heads: of scores that the network returns, in training,
            in a tuple behind its own (DARTS, arXiv 1806.09055, section 3.3, has 0.4).

    Raises:
        ValueError: an unknown name, or a number outside its range.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.1,
        schedule: ScheduleName | MakeSchedule = "one-cycle",
        optimizer: OptimizerName | MakeOptimizer = "sgd",
        metrics: Metrics | None = None,
        teacher: nn.Module | None = None,
        temperature: float = 4.0,
        distillation_weight: float = 0.9,
        auxiliary_weight: float = 0.4,
    ) -> None:
        if not 0 <= label_smoothing <= 1 or not temperature > 0:
            raise ValueError(
                "label_smoothing is a share from 0 to 1 and temperature above 0; "
                f"got {label_smoothing} and {temperature}"
            )
        super().__init__(
            network,
            {"acc": MulticlassAccuracy(num_classes, average="micro")} if metrics is None else metrics,
            lr,
            momentum,
            weight_decay,
            optimizer,
            schedule,
            teacher,
            distillation_weight,
            auxiliary_weight,
        )
        self.label_smoothing = label_smoothing
        self.temperature = temperature

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def evaluation_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def imitation_loss(self, outputs: Tensor, taught: Tensor) -> Tensor:
        found, wanted = (F.log_softmax(scores / self.temperature, dim=1) for scores in (outputs, taught))
        divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=1)
        return self.temperature**2 * divergence.mean()
