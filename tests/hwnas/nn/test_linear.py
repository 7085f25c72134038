from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwnas import Gate, ModelSpace, ValueChoice
from hwnas.nn import Linear

sizes = st.lists(st.integers(1, 9), min_size=2, max_size=4, unique=True)


@given(sizes, sizes, st.booleans(), st.data())
@settings(deadline=None)
def test_sampled_path_equals_freshly_built_linear(ins: Any, outs: Any, bias: bool, data: Any) -> None:
    layer = Linear(ValueChoice(ins, label="in"), ValueChoice(outs, label="out"), bias=bias).double()
    space = ModelSpace(layer)
    n_in, n_out = data.draw(st.sampled_from(ins)), data.draw(st.sampled_from(outs))
    plain = nn.Linear(n_in, n_out, bias=bias).double()
    state = {"weight": layer.weight[:n_out, :n_in], "bias": layer.bias[:n_out] if bias else None}
    plain.load_state_dict({name: part for name, part in state.items() if part is not None})
    x = torch.randn(2, 3, n_in, dtype=torch.double, requires_grad=True)

    with space.running(space.gates_of({"in": n_in, "out": n_out})):
        output = space(x)
    torch.testing.assert_close(output, plain(x))
    found = torch.autograd.grad(output.square().sum(), (x, layer.weight))
    expected = torch.autograd.grad(plain(x).square().sum(), (x, plain.weight))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][:n_out, :n_in], expected[1])
    assert found[1].count_nonzero() <= n_out * n_in  # nothing outside of the slice


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
