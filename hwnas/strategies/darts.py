"""DARTS: every option runs, mixed by the softmax of the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Unpack, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from hwnas.gate import Gate
from hwnas.strategies.differentiable import (
    ArchitectureStep,
    ArchOptimizer,
    DifferentiableOptions,
    DifferentiableStrategy,
)
from hwnas.strategies.unrolled import looked_ahead_sgd, unrolled


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The authors' architecture optimiser (quark0/darts, ``cnn/architect.py``)."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), weight_decay=1e-3)


@final
class DARTS(DifferentiableStrategy):
    """DARTS (arXiv 1806.09055, section 2.3).

    Every option of every choice runs in every step, weighted by the softmax of the choice's logits; the
    weight step holds the weights fixed. Values inside operations are mixed by one blended weight
    (FBNetV2, arXiv 2004.05565).

    ``order=1`` takes the gradient at the weights of now (ξ = 0). ``order=2`` takes it where the next weight
    step would lead (equation 6), the Hessian-vector product by finite differences (equation 7). The step that
    it looks ahead by is that of the user's SGD, with momentum and weight decay, on the batch that the weight
    step trains next (quark0/darts, ``cnn/architect.py``); gradient clipping is not looked ahead.

    Departures: derivation is exact under a budget (`hwnas.derive`) where the authors take each edge's
    argmax; BatchNorm statistics do not move in architecture steps.

    Args:
        arc_learning_rate: the authors' 3e-4 suits tens of epochs; a short search needs more.
        order: 1 or 2. The second order needs one ``torch.optim.SGD``, no accumulation and full precision.
        arch_optimizer: ``(parameters, learning rate)`` to an optimiser.
        options: as in `DifferentiableStrategy` (`penalty`, `arch_dataloader`, ...) and `Strategy`
            (`warmup_epochs`, `seed`, ...).
    """

    def __init__(
        self,
        arc_learning_rate: float = 3e-4,
        order: Literal[1, 2] = 1,
        arch_optimizer: ArchOptimizer = adam,
        **options: Unpack[DifferentiableOptions],
    ) -> None:
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2; got {order!r}")
        super().__init__(arc_learning_rate, arch_optimizer, **options)
        self.order = order
        self._sgd: torch.optim.SGD | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.order == 2:
            self._sgd = looked_ahead_sgd(trainer)

    def differentiate(self, step: ArchitectureStep) -> Sequence[Tensor | None] | None:
        if self._sgd is None:
            return super().differentiate(step)
        return unrolled(step, self._sgd, self.logits.parameters(), self.weight_gates(torch.Generator()))

    def architecture_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return _gates(self.logits.probabilities())

    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return _gates(self.probabilities())


def _gates(probabilities: Mapping[str, Tensor]) -> dict[str, Gate]:
    return {label: Gate(tuple(range(len(p))), p) for label, p in probabilities.items()}
