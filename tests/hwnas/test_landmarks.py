from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwnas.landmarks import Landmarks, NormalisedMeanError, wing_loss


def test_the_wing_loss_joins_a_logarithm_and_the_absolute_error() -> None:
    errors = torch.tensor([-25.0, -3.0, 0.0, 1.0, 9.9999, 10.0, 10.0001], dtype=torch.float64)
    found = wing_loss(errors, torch.zeros_like(errors), width=10.0, curvature=2.0)
    for x, loss in zip(errors.abs().tolist(), found.tolist(), strict=True):
        expected = 10 * math.log(1 + x / 2) if x < 10 else x - (10 - 10 * math.log(6))
        assert loss == pytest.approx(expected, abs=1e-9)
    assert found[4] == pytest.approx(float(found[5]), abs=1e-3)  # no jump


def by_hand(predictions: np.ndarray, targets: np.ndarray, eyes: tuple[int, int]) -> float:
    """The definition, image by image and point by point."""
    errors = []
    for found, wanted in zip(predictions, targets, strict=True):
        unit = math.dist(wanted[eyes[0]], wanted[eyes[1]])
        errors += [sum(math.dist(a, b) for a, b in zip(found, wanted, strict=True)) / (unit * len(wanted))]
    return sum(errors) / len(errors)


def test_the_error_is_that_of_its_definition_over_batches_of_any_size() -> None:
    numbers = torch.rand(2, 7, 10, 2, generator=torch.Generator().manual_seed(0))
    metric = NormalisedMeanError(points=10, eyes=(2, 5))
    for rows in (slice(0, 4), slice(4, 7)):
        found, wanted = (given[rows].flatten(1) for given in numbers)
        metric.update(torch.cat([found, torch.ones(len(found), 3)], 1), wanted)  # the pose does not count
    assert float(metric.compute()) == pytest.approx(by_hand(*numbers.double().numpy(), (2, 5)), rel=1e-5)


class Fixed(nn.Module):
    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs


def test_a_face_whose_pose_is_wrong_weighs_more() -> None:
    targets = torch.tensor([[0.2, 0.4, 0.0, 0.0, 0.0], [0.2, 0.4, 0.0, 0.0, 0.0]])
    outputs = torch.tensor([[0.3, 0.4, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, math.pi, math.pi / 2]])
    module = Landmarks(Fixed(outputs), points=1, eyes=(0, 0), pixels=100)
    wing = float(wing_loss(torch.tensor([10.0, 0.0]), torch.zeros(2)).mean())
    assert float(module.evaluation_loss(outputs, targets)) == pytest.approx(wing, rel=1e-5)
    assert float(module.training_loss(outputs, targets).detach()) == pytest.approx(
        (wing + wing * (1 + 2 + 1)) / 2, rel=1e-5
    )
    right = module.training_loss(outputs[:1].requires_grad_(), targets[:1])
    assert float(right.detach()) == pytest.approx(wing, rel=1e-5)  # it does not vanish with the angles


def test_other_widths_are_refused() -> None:
    module = Landmarks(Fixed(torch.zeros(2, 5)), points=1)
    with pytest.raises(ValueError, match=r"targets of 1 landmarks have the shape \(N, 2\)"):
        module.evaluation_loss(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="predicts the pose needs targets"):
        module.training_loss(torch.zeros(2, 5), torch.zeros(2, 2))
