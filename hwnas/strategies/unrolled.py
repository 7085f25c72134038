"""Second-order architecture gradients: at the weights that the next weight step would lead to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from hwnas.gate import Gate
from hwnas.strategies.differentiable import ArchitectureStep

_REACH = 0.01  # how far the weights are moved for a finite difference (quark0/darts, `cnn/architect.py`)


def looked_ahead_sgd(trainer: pl.Trainer) -> torch.optim.SGD:
    """The optimiser whose step can be looked ahead.

    Raises:
        ValueError: it is not one SGD, gradients are accumulated, or the precision is mixed or low.
    """
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, torch.optim.SGD)]
    if len(trainer.optimizers) != 1 or not found or any(g["maximize"] for g in found[0].param_groups):
        kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        raise ValueError(
            "DARTS(order=2) looks one step of torch.optim.SGD ahead; configure_optimizers returned "
            f"{kinds}. Return one SGD that minimises, or search with order=1"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "DARTS(order=2) looks ahead by the gradient of one batch; accumulate_grad_batches is "
            f"{trainer.accumulate_grad_batches}. Set it to 1, or search with order=1"
        )
    if trainer.precision not in ("32-true", "64-true"):
        raise ValueError(
            "DARTS(order=2) takes differences of gradients, which need full precision; precision is "
            f"{trainer.precision!r}. Set '32-true', or search with order=1"
        )
    return found[0]


def unrolled(
    step: ArchitectureStep,
    sgd: torch.optim.SGD,
    logits: Sequence[nn.Parameter],
    weight_gates: Mapping[str, Gate],
) -> list[Tensor] | None:
    """The gradient of the objective at the looked-ahead weights, for each vector of logits.

    With ``w' = w - ξ (a ∇w L_train(w, α) + ...)`` it is
    ``∇α L(w', α) - ξ a ∇²αw L_train(w, α) ∇w' L(w', α)`` (arXiv 1806.09055, equation 6); ``a`` and the rest
    are what momentum and weight decay make of a gradient. The product is
    ``(∇α L_train(w + εv) - ∇α L_train(w - εv)) / 2ε`` (equation 7). All weights are as before afterwards.

    Args:
        step: what it runs on.
        sgd: the user's optimiser.
        logits: the architecture parameters.
        weight_gates: the gates of a weight step.
    """
    moves = list(_moves(sgd))
    weights = [move.weight for move in moves]
    loss = step.run(step.train_batch, weight_gates)
    if loss is None:
        return None
    ahead = []
    for move, gradient in zip(moves, _gradients(loss, weights), strict=True):
        ahead.append(move.weight.detach() - move.of(gradient))
    with _at(weights, ahead):
        loss = step.run(step.batch, step.gates)
        if loss is None:
            return None
        both = _gradients(step.objective(loss), [*logits, *weights])
    direct, implicit = both[: len(logits)], both[len(logits) :]
    direction = [move.lr * move.factor * found for move, found in zip(moves, implicit, strict=True)]
    length = torch.sqrt(sum((part.square().sum() for part in direction), torch.zeros(())))
    if not length > 0:
        return direct
    sides = []
    for sign in (1.0, -1.0):
        epsilon = sign * _REACH / float(length)
        moved = [w.detach() + epsilon * part for w, part in zip(weights, direction, strict=True)]
        with _at(weights, moved):
            loss = step.run(step.train_batch, step.gates)
            if loss is None:
                return None
            sides.append(_gradients(loss, logits))
    scale = float(length) / (2 * _REACH)
    return [d - scale * (up - down) for d, up, down in zip(direct, *sides, strict=True)]


@dataclass(frozen=True)
class _Move:
    """How SGD would move one weight.

    Attributes:
        weight: the parameter.
        lr: its learning rate.
        factor: what a gradient counts in the move.
        rest: what is added to the gradient's share, before the learning rate.
    """

    weight: nn.Parameter
    lr: float
    factor: float
    rest: Tensor | float

    def of(self, gradient: Tensor) -> Tensor:
        return self.lr * (self.factor * gradient + self.rest)


def _moves(sgd: torch.optim.SGD) -> Iterator[_Move]:
    for group in sgd.param_groups:
        momentum, nesterov = float(group["momentum"]), bool(group["nesterov"])
        for weight in group["params"]:
            if not weight.requires_grad:
                continue
            velocity = sgd.state[weight].get("momentum_buffer") if weight in sgd.state else None
            # The velocity of the next step is `kept * velocity + share * gradient`.
            share, kept = (1 - float(group["dampening"]), momentum) if velocity is not None else (1.0, 0.0)
            if not momentum:
                factor, old = 1.0, 0.0
            elif nesterov:
                factor, old = 1 + momentum * share, momentum * kept
            else:
                factor, old = share, kept
            rest = factor * float(group["weight_decay"]) * weight.detach()
            if velocity is not None:
                rest = rest + old * velocity
            yield _Move(weight, float(group["lr"]), factor, rest)


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    # Retained: all passes share the gates, and their graph.
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@contextmanager
def _at(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
