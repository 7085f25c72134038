"""Every kind of choice keeps the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwnas import Cell, InputChoice, LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.nn import BatchNorm2d, Conv2d
from tests.contracts.choice import ChoiceContract


def images() -> tuple[Tensor]:
    return (torch.randn(1, 3, 6, 6),)


def conv(kernel: int) -> nn.Module:
    return nn.Conv2d(3, 3, kernel, padding=kernel // 2)


class TestLayerChoice(ChoiceContract):
    def make_space(self) -> ModelSpace:
        inner = nn.Sequential(LayerChoice([conv(1), conv(3)], label="inner"), conv(1))
        layers = {"conv": conv(3), "nested": inner, "skip": nn.Identity()}
        return ModelSpace(nn.Sequential(conv(1), LayerChoice(layers, label="op"), conv(1)))

    def make_inputs(self) -> tuple[Any, ...]:
        return images()


class Skips(nn.Module):
    """Every input is used besides, as what nothing uses would still run."""

    def __init__(self, n_chosen: int | None, reduction: Any) -> None:
        super().__init__()
        self.first, self.second = conv(1), LayerChoice([conv(1), conv(3)], label="op")
        self.edges = InputChoice(3, n_chosen, reduction, label="edges")

    def forward(self, x: Tensor) -> Any:
        first = self.first(x)
        second = self.second(first)
        return torch.cat([self.edges([x, first, second]), second], 1)


@pytest.mark.parametrize(
    ("n_chosen", "reduction"), [(1, "sum"), (2, "mean"), (None, "mean"), (2, "concat")], scope="class"
)
class TestInputChoice(ChoiceContract):
    @pytest.fixture(autouse=True)
    def arguments(self, n_chosen: int | None, reduction: str) -> None:
        self.given = n_chosen, reduction
        self.mixes = reduction != "concat"

    def make_space(self) -> ModelSpace:
        return ModelSpace(Skips(*self.given))

    def make_inputs(self) -> tuple[Any, ...]:
        return images()


class TestRepeat(ChoiceContract):
    def make_space(self) -> ModelSpace:
        half = ValueChoice([0, 1, 2], label="half")
        width = ValueChoice([2, 3], label="width")
        blocks = Repeat(lambda index: LayerChoice([conv(1), conv(3)], label=f"op{index}"), half + half)
        stem = nn.Sequential(Conv2d(3, width, 1), BatchNorm2d(width), Conv2d(width, 3, 1))
        return ModelSpace(nn.Sequential(stem, blocks))

    def make_inputs(self) -> tuple[Any, ...]:
        return images()


class CellNetwork(nn.Module):
    """The cell's width goes on to a layer, which under loose ends depends on the edges."""

    def __init__(self, merge_op: Any, label: str | None) -> None:
        super().__init__()
        ops = {"conv": lambda *_: conv(3), "skip": nn.Identity()}
        self.cell = Cell(ops, 2, 2, num_predecessors=2, merge_op=merge_op, label=label)
        self.head = Conv2d(self.cell.n_outputs * 3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.cell(x, x.flip(3)))


@pytest.mark.parametrize(("merge_op", "label"), [("all", "cell"), ("loose_end", None)], scope="class")
class TestCell(ChoiceContract):
    @pytest.fixture(autouse=True)
    def arguments(self, merge_op: str, label: str | None) -> None:
        self.given = merge_op, label
        self.mixture_is_expectation = merge_op == "all"

    def make_space(self) -> ModelSpace:
        return ModelSpace(CellNetwork(*self.given))

    def make_inputs(self) -> tuple[Any, ...]:
        return images()
