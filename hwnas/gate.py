"""How one choice is resolved in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Gate:
    """How one choice is resolved in one forward pass: every strategy is a way to make gates.

    | strategy | picked | weights | run |
    |---|---|---|---|
    | DARTS | all | softmax of the logits | all |
    | RandomOneShot, ENAS, any fixed architecture | one | None | |
    | Proxyless, weight step | one | None | |
    | Proxyless, architecture step | one | one-hot forward, straight-through backward | all, or two |

    Attributes:
        picked: indices of the options whose own weights receive gradients.
        weights: shape ``(options,)``, one mixing weight an option, 1 in sum; None runs ``picked[0]`` alone.
            The gradient that reaches one-hot weights is relative to the picked option's, which is 0: what
            weights that always sum to 1, such as a softmax, make of it is the same, and less is kept.
        run: indices of the options that are computed under ``weights``; None means all. The weight of
            an option that is not run must be 0.
    """

    picked: tuple[int, ...]
    weights: Tensor | None = None
    run: tuple[int, ...] | None = None

    def live(self) -> tuple[int, ...]:
        """Indices of the options that this gate computes."""
        if self.weights is None:
            return self.picked[:1]
        return self.run if self.run is not None else tuple(range(len(self.weights)))


def mixture(weights: Tensor, outputs: Sequence[Tensor], of: str = "options") -> Tensor:
    """The weighted sum of equally shaped outputs.

    Args:
        weights: shape ``(outputs,)``.
        outputs: tensors of one shape; a smaller one is an error, never broadcast.
        of: whose outputs they are, for the error.

    Raises:
        TypeError: an output that is not a tensor.
        ValueError: outputs of different shapes.

    >>> mixture(torch.tensor([0.25, 0.75]), [torch.ones(2), torch.zeros(2)])
    tensor([0.2500, 0.2500])
    """
    if not all(isinstance(output, Tensor) for output in outputs):
        kinds = sorted({type(output).__name__ for output in outputs})
        raise TypeError(
            f"{of} can be mixed where each returns one tensor; got {kinds}. "
            "Search with a strategy that runs one path (RandomOneShot, ENAS)"
        )
    shapes = [tuple(output.shape) for output in outputs]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"{of} must have outputs of one shape to be mixed; got {shapes}. "
            "Give them equal shapes, or search with a strategy that runs one path (RandomOneShot, ENAS)"
        )
    mixed: Tensor = _Mixture.apply(weights, *outputs)  # type: ignore[no-untyped-call]  # torch's own
    return mixed


class _Mixture(torch.autograd.Function):
    """One pass over each output forward and one backward; no product is stored.

    Under a one-hot gate the forward is the picked output itself, and of the others only the difference from
    it is kept.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *outputs: Tensor) -> Tensor:
        factors = weights.tolist()
        ctx.factors = factors
        ctx.types = [output.dtype for output in outputs]
        ctx.picked = _picked(factors)
        kept: Sequence[Tensor] = ()
        if ctx.needs_input_grad[0]:
            kept = outputs
            if ctx.picked is not None:
                kept = [output - outputs[ctx.picked] for i, output in enumerate(outputs) if i != ctx.picked]
        ctx.save_for_backward(weights, *kept)
        dtype = outputs[0].dtype
        for output in outputs[1:]:
            dtype = torch.promote_types(dtype, output.dtype)
        total = torch.zeros_like(outputs[0], dtype=dtype)
        for weight, output in zip(factors, outputs, strict=True):
            if weight != 0.0:
                total.add_(output, alpha=weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *kept = ctx.saved_tensors
        needs_weights, *needs_outputs = ctx.needs_input_grad
        to_weights = None
        if needs_weights:
            flat = gradient.reshape(-1)
            dots = [torch.dot(flat, found.reshape(-1).to(flat.dtype)) for found in kept]
            if ctx.picked is not None:
                dots.insert(ctx.picked, flat.new_zeros(()))
            to_weights = torch.stack(dots).to(weights.dtype)
        to_outputs = [
            (gradient * factor).to(dtype) if needed else None
            for factor, dtype, needed in zip(ctx.factors, ctx.types, needs_outputs, strict=True)
        ]
        return (to_weights, *to_outputs)


def _picked(factors: Sequence[float]) -> int | None:
    """The place of the 1 where all others are 0."""
    others = [i for i, factor in enumerate(factors) if factor != 0.0]
    return others[0] if len(others) == 1 and factors[others[0]] == 1.0 else None
