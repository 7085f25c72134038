from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas import Gate, ModelSpace, ValueChoice
from hwnas.nn import Conv1d, Conv2d, Conv3d, Linear

WIDTHS = (2, 3, 5)


def run_and_reference(space: ModelSpace, layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the output under their softmax, and what it is by definition."""
    logits = torch.randn(len(WIDTHS), dtype=torch.double, requires_grad=True)
    weights = logits.softmax(0).to(layer.weight.dtype)
    with space.running({"width": Gate((0, 1, 2), weights)}):
        output = space(x)
    present = torch.tensor([[float(channel < width) for channel in range(5)] for width in WIDTHS])
    mask = torch.tensordot(weights, present.to(weights), dims=1)
    axes = layer.weight.ndim - 2
    cut = mask.reshape(-1, *[1] * axes)
    if axes == 0:
        return logits, output, F.linear(x * mask, layer.weight, layer.bias)
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    same = (layer.bias, layer.stride, layer.padding, layer.dilation)
    return logits, output, function(x * cut, layer.weight, *same)


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    width = ValueChoice(WIDTHS, label="width")
    return [
        (Linear(width, 4), (3, 2, 5)),
        (Linear(width, 4, bias=False), (5,)),
        (Conv1d(width, 4, 3, stride=2, padding=1), (2, 5, 9)),
        (Conv2d(width, 4, (3, 2), stride=(1, 2), padding=(0, 1), dilation=2), (2, 5, 9, 8)),
        (Conv2d(width, 4, 3, padding="same"), (2, 5, 6, 6)),
        (Conv2d(width, 4, 1), (5, 6, 6)),  # without a batch
        (Conv3d(width, 4, 2), (2, 5, 4, 4, 4)),
    ]


@pytest.mark.parametrize(("layer", "shape"), layers(), ids=str)
@pytest.mark.parametrize("input_asks", [True, False])
def test_gradient_of_the_mask_is_that_of_its_definition_where_weights_are_frozen(
    layer: Any, shape: tuple[int, ...], input_asks: bool
) -> None:
    space = ModelSpace(layer.double().requires_grad_(False))
    x = torch.randn(shape, dtype=torch.double, requires_grad=input_asks)
    logits, output, expected = run_and_reference(space, layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    wanted = [logits, x] if input_asks else [logits]
    cotangent = torch.randn_like(output)
    found = torch.autograd.grad(output, wanted, cotangent, retain_graph=True)
    brute = torch.autograd.grad(expected, wanted, cotangent)
    torch.testing.assert_close(found, brute, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), layers()[:4], ids=str)
def test_gradient_of_the_mask_under_autocast_is_that_of_full_precision(
    layer: Any, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    space = ModelSpace(layer.requires_grad_(False))
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits, output, _ = run_and_reference(space, layer, x)
    assert output.dtype == torch.bfloat16
    cotangent = torch.randn_like(output)
    found = torch.autograd.grad(output, (logits, x), cotangent)
    assert found[1].dtype == torch.float
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    logits, output, _ = run_and_reference(space, layer, x)
    expected = torch.autograd.grad(output, (logits, x), cotangent.float())
    # bfloat16 has 8 bits; some dozen products are summed.
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_weight_that_asks_for_a_gradient_gets_it_beside_the_mask() -> None:
    layer = Conv2d(ValueChoice(WIDTHS, label="width"), 4, 3, bias=True).double()
    layer.weight.requires_grad_(False)  # the bias alone is trained
    assert layer.bias is not None
    logits, output, expected = run_and_reference(
        ModelSpace(layer), layer, torch.randn(2, 5, 6, 6, dtype=torch.double)
    )
    cotangent = torch.randn_like(output)
    found = torch.autograd.grad(output, (logits, layer.bias), cotangent, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (logits, layer.bias), cotangent))


def test_nothing_but_the_input_is_kept_for_the_gradient_of_the_mask() -> None:
    layer = Conv2d(ValueChoice(WIDTHS, label="width"), 64, 3).requires_grad_(False)
    x = torch.randn(2, 5, 6, 6, requires_grad=True)
    kept: list[Tensor] = []
    weights = torch.full((3,), 1 / 3, requires_grad=True)
    space = ModelSpace(layer)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        space.running({"width": Gate((0, 1, 2), weights)}),
    ):
        space(x)
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, layer.weight)}
    others = [tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() not in given]
    assert max(others) <= 3 * 5  # masks
