from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import Gate, ModelSpace, ValueChoice
from hwnas.nn import Dropout
from tests.contracts.mixed_operation import Arguments, MixedOperationContract, choice


class TestDropout(MixedOperationContract):
    operation, plain, draws = Dropout, nn.Dropout, True

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            return {"p": choice(draw, "p", [0, 0.3, 0.7, 1.0])}

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        return self.arguments()

    def refused_arguments(self) -> Sequence[Arguments]:
        return []

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        return (torch.randn(4, 5, dtype=torch.double),)

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("chances", [[0.7, 0.1, 0.3], [0.0, 1.0, 0.5]])
def test_one_draw_decides_for_all_options_under_mixing_weights(chances: list[float]) -> None:
    space = ModelSpace(Dropout(ValueChoice(chances, label="p")))
    x = torch.randn(50, 40, dtype=torch.double, requires_grad=True)
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.double, requires_grad=True)
    weights = logits.softmax(0)
    torch.manual_seed(3)
    with space.running({"p": Gate((0, 1, 2), weights)}):
        blended = space(x)
    torch.manual_seed(3)
    drawn = torch.rand(x.shape)
    paths = [(drawn >= p) * x / (1 - p) if p < 1 else torch.zeros_like(x) for p in chances]
    mixture = torch.tensordot(weights, torch.stack(paths), dims=1)
    torch.testing.assert_close(blended, mixture, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(x)
    found = torch.autograd.grad(blended, (x, logits), cotangent, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(mixture, (x, logits), cotangent))


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_chance_out_of_range_is_refused(p: Any) -> None:
    with pytest.raises(ValueError, match=f"p must be from 0 to 1 under every option; .* can be {p}"):
        Dropout(ValueChoice([0.5, p], label="c"))
