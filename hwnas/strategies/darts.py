"""DARTS: every option runs, mixed by the softmax of the logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from hwnas.gate import Gate
from hwnas.strategies.differentiable import ArchOptimizer, DifferentiableStrategy
from profilers.penalty import Penalty


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The authors' architecture optimiser (quark0/darts, ``cnn/architect.py``)."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), weight_decay=1e-3)


@final
class DARTS(DifferentiableStrategy):
    """DARTS, first order (arXiv 1806.09055, section 2.3 with ξ = 0).

    Every option of every choice runs in every step, weighted by the softmax of the choice's logits; the
    weight step holds the weights fixed. Values inside operations are mixed by one blended weight
    (FBNetV2, arXiv 2004.05565). Departures: derivation is exact under a budget (`hwnas.derive`) where the
    authors take each edge's argmax; BatchNorm statistics do not move in architecture steps.

    Args:
        arc_learning_rate: the authors' 3e-4 suits tens of epochs; a short search needs more.
        penalty: makes the cost part of the loss.
        warmup_epochs: epochs in which the weights are trained alone.
        arch_dataloader: batches of the architecture steps; None: the trainer's validation batches.
        arch_optimizer: ``(parameters, learning rate)`` to an optimiser.
        log_prob_every_n_step: how often the probabilities are logged, in steps; 0: never.
        recalibration_batches: how many training batches set a subnet's BatchNorm statistics.
        validate_supernet: whether validation also runs the supernet.
        stop_at_non_finite_loss: whether a loss that is no number ends the search with an error.
        seed: of all that the strategy draws.
    """

    def __init__(
        self,
        arc_learning_rate: float = 3e-4,
        penalty: Penalty | None = None,
        warmup_epochs: int = 0,
        arch_dataloader: Iterable[Any] | None = None,
        arch_optimizer: ArchOptimizer = adam,
        log_prob_every_n_step: int = 0,
        recalibration_batches: int = 10,
        validate_supernet: bool = True,
        stop_at_non_finite_loss: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            arc_learning_rate,
            penalty,
            arch_dataloader,
            arch_optimizer,
            log_prob_every_n_step,
            warmup_epochs,
            recalibration_batches,
            validate_supernet,
            stop_at_non_finite_loss,
            seed,
        )

    def architecture_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return _gates(self.logits.probabilities())

    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return _gates(self.probabilities())


def _gates(probabilities: Mapping[str, Tensor]) -> dict[str, Gate]:
    return {label: Gate(tuple(range(len(p))), p) for label, p in probabilities.items()}
