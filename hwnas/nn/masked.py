"""A linear operation whose input's channels are masked: the cheapest way to the mask's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
ToInput = Callable[[Tensor, Tensor, Tensor], Tensor]


def masked(
    input: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, run: Run, to_input: ToInput
) -> Tensor:
    """``run(input, weight * mask, bias)``.

    Its gradient with respect to the mask would take the whole gradient of the weight. Where only the mask
    asks for one, as in an architecture step, it is read off the input's gradient instead, which the layers
    before need anyway; nothing more is kept for that than the input.

    Args:
        input: with channels that the mask lines up with by broadcasting.
        mask: one factor a channel of the input; it lines up with the weight, too.
        weight, bias: of the operation.
        run: the operation, linear in ``input * mask``.
        to_input: its gradient with respect to the input, from ``(gradient, input, weight)``.
    """
    mask = mask.to(weight.dtype)
    asked = weight.requires_grad or (bias is not None and bias.requires_grad)
    if asked or not mask.requires_grad or not torch.is_grad_enabled():
        return run(input, weight * mask, bias)
    output: Tensor = _Masked.apply(input, mask, weight, bias, run, to_input)  # type: ignore[no-untyped-call]
    return output


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mask: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Run,
        to_input: ToInput,
    ) -> Tensor:
        output = run(input, weight * mask, bias)
        ctx.save_for_backward(input, mask, weight)
        ctx.to_input = to_input
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, mask, weight = ctx.saved_tensors
        # Under autocast the gradient has another type than what went in.
        to_masked = ctx.to_input(gradient, input.to(gradient.dtype), weight.to(gradient.dtype))
        to_mask = (to_masked * input).sum_to_size(mask.shape).to(mask.dtype)
        to_input = to_masked.mul_(mask).to(input.dtype) if ctx.needs_input_grad[0] else None
        return to_input, to_mask, None, None, None, None
