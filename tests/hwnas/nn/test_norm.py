from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwnas import ModelSpace, ValueChoice
from hwnas.nn import BatchNorm2d


def norm_of_random_state(width: Any, **arguments: Any) -> BatchNorm2d:
    norm = BatchNorm2d(width, **arguments).double()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return norm


@given(
    st.sampled_from([2, 5, 8]),
    st.sampled_from([0.1, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None)
def test_sampled_path_equals_freshly_built_norm(
    width: int, momentum: float | None, affine: bool, tracks: bool, training: bool
) -> None:
    arguments: dict[str, Any] = {"momentum": momentum, "affine": affine, "track_running_stats": tracks}
    norm = norm_of_random_state(ValueChoice([2, 5, 8], label="width"), **arguments).train(training)
    plain = nn.BatchNorm2d(width, **arguments).double().train(training)
    plain.load_state_dict({name: t[:width] if t.ndim else t for name, t in norm.state_dict().items()})
    space = ModelSpace(norm).train(training)
    frozen = space.freeze({"width": width})
    beyond = {name: t[width:].clone() for name, t in norm.state_dict().items() if t.ndim}
    x = torch.randn(4, width, 3, 3, dtype=torch.double, requires_grad=True)

    with space.running(space.gates_of({"width": width})):
        output = space(x)
    expected = plain(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(frozen(x), expected)
    cotangent = torch.randn_like(x)
    (to_x,) = torch.autograd.grad(output, x, cotangent)
    torch.testing.assert_close(to_x, torch.autograd.grad(expected, x, cotangent)[0])
    for name, tensor in norm.state_dict().items():  # running statistics, updated alike, and no further
        torch.testing.assert_close(tensor[:width] if tensor.ndim else tensor, plain.state_dict()[name])
        torch.testing.assert_close(frozen.state_dict()[name], plain.state_dict()[name])
    torch.testing.assert_close({name: norm.state_dict()[name][width:] for name in beyond}, beyond)


def test_input_of_the_wrong_rank_is_refused_as_torch_does() -> None:
    space = ModelSpace(BatchNorm2d(ValueChoice([2, 4], label="width")))
    with pytest.raises(ValueError, match="expected 4D input"):
        space(torch.randn(2, 2))


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="of newer torch")
def test_norm_without_bias_freezes_to_one_without() -> None:
    space = ModelSpace(BatchNorm2d(ValueChoice([2, 4], label="width"), bias=False)).eval()
    subnet = space.freeze({"width": 2})
    assert subnet.bias is None
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(subnet(x), space(x))
