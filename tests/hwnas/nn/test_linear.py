from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import Gate, ModelSpace, ValueChoice
from hwnas.nn import Linear
from tests.contracts.mixed_operation import Arguments, MixedOperationContract, choice


class TestLinear(MixedOperationContract):
    operation, plain = Linear, nn.Linear

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            return {
                "in_features": choice(draw, "in", range(1, 9)),
                "out_features": choice(draw, "out", range(1, 9)),
                "bias": draw(st.booleans()),
            }

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        return self.arguments()

    def refused_arguments(self) -> Sequence[Arguments]:
        return []

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        return (torch.randn(2, 3, sizes["in_features"], dtype=torch.double),)

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        parts = {"weight": state["weight"][: sizes["out_features"], : sizes["in_features"]]}
        return {**parts, "bias": state["bias"][: sizes["out_features"]]} if "bias" in state else parts


def test_linear_after_flatten_of_a_coupled_width_equals_mixture() -> None:
    width = ValueChoice([2, 3, 5], label="width")
    layer = Linear(width * 4, 3).double()
    space = ModelSpace(layer)
    x = torch.randn(6, 5, 2, 2, dtype=torch.double)
    logits = torch.randn(3, dtype=torch.double, requires_grad=True)
    weights = logits.softmax(0)
    with space.running({"width": Gate((0, 1, 2), weights)}):
        blended = space(x.flatten(1))
    expected = sum(
        w * nn.functional.linear(x[:, :c].flatten(1), layer.weight[:, : 4 * c], layer.bias)
        for w, c in zip(weights, (2, 3, 5), strict=True)
    )
    torch.testing.assert_close(blended, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(blended.square().sum(), (logits, layer.weight), retain_graph=True)
    brute = torch.autograd.grad(expected.square().sum(), (logits, layer.weight))
    torch.testing.assert_close(found, brute, rtol=1e-12, atol=1e-12)
