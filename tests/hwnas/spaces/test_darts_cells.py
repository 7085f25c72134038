from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from hwnas.freezing import Freezer
from hwnas.spaces import DARTSCells
from hwnas.spaces.batch_norm import UnscaledBatchNorm2d
from hwnas.spaces.drop_path import DropPath, set_drop_path
from tests.contracts.space import SpaceContract


class TestDARTSCells(SpaceContract):
    space = DARTSCells
    counted: ClassVar[dict[str, str]] = {"darts-v1": "DARTS_V1_cifar10_C36_L20"}


def test_a_genotype_comes_back() -> None:
    for published in DARTSCells.published.values():
        genotype = DARTSCells.genotype_of(published.architecture)
        assert DARTSCells.architecture_of(genotype) == published.architecture
    with pytest.raises(ValueError, match=r"two edges for each of four nodes.*conv_9x9"):
        DARTSCells.architecture_of({**genotype, "reduce": [("conv_9x9", 0)] * 8})


@pytest.mark.parametrize("size", [28, 32])
def test_the_auxiliary_head_is_trained_and_not_evaluated(size: int) -> None:
    network = DARTSCells.from_published("darts-v1", channels=4, cells=3, auxiliary=True, in_channels=1)
    scores, auxiliary = network(torch.randn(2, 1, size, size))
    assert scores.shape == auxiliary.shape == (2, 10)
    assert network.eval()(torch.randn(2, 1, size, size)).shape == (2, 10)


def test_drop_path_leaves_out_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, ones = DropPath(), torch.ones(4000, 2, 1, 1)
    assert drop(ones) is ones
    set_drop_path(nn.Sequential(drop), 0.25)
    dropped = drop(ones)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)  # four standard errors
    assert drop.eval()(ones) is ones
    with pytest.raises(ValueError, match=r"got 1\.0"):
        set_drop_path(drop, 1.0)


def test_scale_and_shift_are_learned_in_the_subnet_alone() -> None:
    searched = UnscaledBatchNorm2d(3)
    assert not any(parameter.requires_grad for parameter in searched.parameters())
    plain = Freezer({})(searched)
    assert type(plain) is nn.BatchNorm2d
    assert all(parameter.requires_grad for parameter in plain.parameters())
    images = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(plain(images), nn.BatchNorm2d(3)(images))
