from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas import ModelSpace, ValueChoice
from hwnas.classification import Classification
from hwnas.nn import Conv2d, Linear
from hwnas.strategies import DARTS, RandomOneShot
from hwnas.strategies.blends import check_blends
from tests.hwnas.strategies.tiny import CLASSES, fit


class Net(nn.Module):
    """An elastic width between two convolutions, and what a subclass does in between."""

    added = 0

    def __init__(self) -> None:
        super().__init__()
        width, self.other = ValueChoice([4, 8], label="width"), ValueChoice([2, 3], label="other")
        self.stem = Conv2d(1, width, 3, padding=1)
        self.point = Conv2d(width + self.added, self.other, 1)
        self.head = Linear(self.other, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.point(self.between(self.stem(images))).mean((2, 3)))
        return scores

    def between(self, features: Tensor) -> Tensor:
        return features.relu()


class Concatenated(Net):
    added = 4

    def between(self, features: Tensor) -> Tensor:
        return torch.cat([features, features[:, :4]], dim=1)


class Attended(Net):
    def between(self, features: Tensor) -> Tensor:
        return features * features.mean(1, keepdim=True).sigmoid()


class Shuffled(Net):
    def between(self, features: Tensor) -> Tensor:
        return features.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class Random(Attended):
    """Its paths differ from run to run: nothing can be said of them."""

    def between(self, features: Tensor) -> Tensor:
        return F.dropout(super().between(features), training=True)


@pytest.mark.parametrize("network", [Concatenated, Attended, Shuffled])
def test_widths_that_are_not_blended_between_operations_are_refused_by_name(network: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"pick one option of 'width' must give what that option alone gives"
    ):
        fit(DARTS(), Classification(ModelSpace(network()), CLASSES))
    fit(RandomOneShot(), Classification(ModelSpace(network()), CLASSES), batches=1)


@pytest.mark.parametrize("network", [Net, Random])
def test_what_is_blended_or_random_is_searched(network: Any) -> None:
    fit(DARTS(), Classification(ModelSpace(network()), CLASSES), batches=1)


def test_looking_leaves_no_trace() -> None:
    space = ModelSpace(nn.Sequential(Net(), nn.BatchNorm1d(CLASSES)))
    numbers, mode, mean = (
        torch.get_rng_state(),
        space.network[1].train(),
        space.network[1].running_mean.clone(),
    )
    reached = []
    check_blends(space, lambda: reached.append(space(torch.ones(4, 1, 5, 5))), seed=0)
    assert not reached
    assert not space._forward_pre_hooks
    assert mode.training
    assert torch.equal(space.network[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), numbers)
