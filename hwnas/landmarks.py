"""A LightningModule for landmarks: the wing loss, the normalised mean error, and the pose beside them."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from hwnas.supervised import MakeOptimizer, MakeSchedule, OptimizerName, ScheduleName, Supervised


def wing_loss(predictions: Tensor, targets: Tensor, width: float = 10.0, curvature: float = 2.0) -> Tensor:
    """The wing loss (arXiv 1711.06753, equation 5), for every coordinate.

    ``width * ln(1 + |x| / curvature)`` where the error ``x`` is below ``width``, and ``|x|`` less a constant
    that joins both beyond it: small errors weigh more than by the absolute error.

    Args:
        predictions, targets: of one shape, in pixels.
        width: where the logarithm ends, in pixels.
        curvature: below it the logarithm is nearly linear, in pixels.

    Returns:
        Losses of that shape.

    >>> wing_loss(torch.tensor([0.0, 2.0, 20.0]), torch.zeros(3))
    tensor([ 0.0000,  6.9315, 27.9176])
    """
    error = (predictions - targets).abs()
    constant = width - width * math.log(1 + width / curvature)
    return torch.where(error < width, width * torch.log1p(error / curvature), error - constant)


@final
class NormalisedMeanError(Metric):
    """The mean distance of the landmarks as a share of the distance between the eyes, over all images.

    As microsoft/nni, ``examples/nas/oneshot/pfld/lib/utils.py``, ``accuracy``: the outer corners of the eyes
    are points 35 and 93 of 106. A share: 0.0558 is printed as 5.58 %.

    Shapes: predictions and targets ``(N, >= 2 * points)``, x and y by turns; what comes after is ignored.

    Args:
        points: how many landmarks.
        eyes: the two points whose distance is the unit.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, points: int = 106, eyes: tuple[int, int] = (35, 93)) -> None:
        super().__init__()
        self.points = points
        self.eyes = eyes
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        shape = (-1, self.points, 2)
        found = predictions[:, : 2 * self.points].detach().reshape(shape)
        wanted = targets[:, : 2 * self.points].reshape(shape)
        first, second = (wanted[:, eye] for eye in self.eyes)
        unit = torch.linalg.vector_norm(first - second, dim=1)
        self.total += (torch.linalg.vector_norm(found - wanted, dim=2).mean(1) / unit).sum()
        self.count += len(wanted)

    def compute(self) -> Tensor:
        return self.total / self.count


@final
class Landmarks(Supervised):
    """Trains a network on ``(images, targets)`` batches by the wing loss, with AdamW and a one-cycle
    schedule.

    Logs ``train_loss``, ``train_nme``, ``val_loss``, ``val_nme``, ``test_loss`` and ``test_nme``.

    Targets are ``(N, 2 * points)``, or with the pose ``(N, 2 * points + 3)``: coordinates as shares of the
    image, then three Euler angles in radians. Where the network puts out three angles as well
    (`hwnas.spaces.PFLD` with ``pose``, in training), an image's loss is multiplied by ``1 + sum(1 - cos(angle
    error))``, so that a face whose pose is not understood weighs more (PFLD, arXiv 1902.10859, equation 2,
    without its weights of attributes). Departure: "1 +". In the paper and in NNI's example the product
    vanishes with the error of the angles, and the landmarks stop learning.

    Args:
        network: images to predictions; a `ModelSpace` or a plain network.
        points: how many landmarks.
        eyes: of `NormalisedMeanError`.
        pixels: side of the images: the wing loss counts in pixels.
        lr, momentum, weight_decay, schedule, optimizer: as in `hwnas.regression.Regression`.
        teacher: a trained network with the same landmarks; its loss is the wing loss to them.
        distillation_weight: the teacher's share of the loss.

    Raises:
        ValueError: an unknown name, or a number outside its range; in training, predictions and targets
            of other widths.
    """

    def __init__(
        self,
        network: nn.Module,
        points: int = 106,
        eyes: tuple[int, int] = (35, 93),
        pixels: int = 112,
        lr: float = 2e-3,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: ScheduleName | MakeSchedule = "one-cycle",
        optimizer: OptimizerName | MakeOptimizer = "adamw",
        teacher: nn.Module | None = None,
        distillation_weight: float = 0.5,
    ) -> None:
        super().__init__(
            network,
            {"nme": NormalisedMeanError(points, eyes)},
            lr,
            momentum,
            weight_decay,
            optimizer,
            schedule,
            teacher,
            distillation_weight,
        )
        self.points = points
        self.pixels = pixels

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self._wing(outputs, targets)
        if outputs.shape[1] == 2 * self.points + 3:
            if targets.shape != outputs.shape:
                raise ValueError(
                    f"a network that predicts the pose needs targets of {tuple(outputs.shape)}, landmarks "
                    f"and three angles; got {tuple(targets.shape)}"
                )
            losses = losses * (1 + (1 - torch.cos(outputs[:, -3:] - targets[:, -3:])).sum(1))
        return losses.mean()

    def evaluation_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._wing(outputs, targets).mean()

    def imitation_loss(self, outputs: Tensor, taught: Tensor) -> Tensor:
        return self._wing(outputs, taught).mean()

    def _wing(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean wing loss of each image."""
        width = 2 * self.points
        for what, given in (("predictions", outputs), ("targets", targets)):
            if given.ndim != 2 or given.shape[1] not in (width, width + 3):
                raise ValueError(
                    f"{what} of {self.points} landmarks have the shape (N, {width}), or (N, {width + 3}) "
                    f"with the pose; got {tuple(given.shape)}"
                )
        return wing_loss(outputs[:, :width] * self.pixels, targets[:, :width] * self.pixels).mean(1)
