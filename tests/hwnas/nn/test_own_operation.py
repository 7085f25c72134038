"""An operation that a user writes, tested by the contract alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import ValueChoice
from hwnas.nn.mixed import MixedOperation, split
from hwnas.values import Value
from tests.contracts.mixed_operation import Arguments, MixedOperationContract, choice


class PReLU(MixedOperation, nn.PReLU):
    elastic = ("num_parameters",)

    def __init__(self, num_parameters: int | Value = 1, init: float = 0.25) -> None:
        values, largest = split({"num_parameters": num_parameters}, {"init": init})
        super().__init__(**largest)
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.parts(self.running_sizes())["weight"])

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        return nn.PReLU(**sizes, device="meta")

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"weight": self.weight[: sizes["num_parameters"]]}

    def check_can_mix(self) -> None:
        pass


class TestPReLU(MixedOperationContract):
    operation, plain = PReLU, nn.PReLU

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            return {"num_parameters": choice(draw, "width", [2, 5, 8])}

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        return self.arguments()

    def refused_arguments(self) -> Sequence[Arguments]:
        return []

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        return (torch.randn(3, sizes["num_parameters"], 4, dtype=torch.double),)

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        return {"weight": state["weight"][: sizes["num_parameters"]]}


def test_printed_operation_shows_its_choice() -> None:
    value = ValueChoice([2, 4], label="width")
    assert repr(PReLU(value)) == "PReLU(num_parameters=4, num_parameters=ValueChoice([2, 4], label='width'))"
