"""FairNAS: in each step every option of every choice is trained once."""

from __future__ import annotations

from typing import Unpack, final

import pytorch_lightning as pl
import torch
from torch import Tensor

from hwnas.strategies.differentiable import loss_of
from hwnas.strategies.many_paths import ManyPathsStrategy
from hwnas.strategies.sampled import SampledOptions
from profilers.space import Architecture


@final
class FairNAS(ManyPathsStrategy):
    """Strict fairness (arXiv 1907.01845, section 3.1 and algorithm 1).

    Each step draws a permutation of every choice's options and trains as many paths as the largest choice has
    options, the ``i``-th path with the ``i``-th option of each; one optimizer step follows the sum of their
    gradients. Departures: a choice with fewer options goes through its permutation again, so that fairness is
    strict within what its number divides; a choice that takes no part in a path is not trained by it. Filters
    bind the candidates and the answer, not the paths: all options are trained.

    Args:
        options: as in `SampledStrategy` (`filter`, `n_candidates`, ...) and `Strategy` (`seed`, ...).
    """

    def __init__(self, **options: Unpack[SampledOptions]) -> None:
        super().__init__(**options)

    def paths(self, generator: torch.Generator) -> list[Architecture]:
        found = self.space.options
        orders = {
            n: torch.randperm(len(options), generator=generator).tolist() for n, options in found.items()
        }
        count = max(map(len, found.values()))
        return [
            {n: options[orders[n][path % len(options)]] for n, options in found.items()}
            for path in range(count)
        ]

    def other_loss(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> Tensor | None:
        return loss_of(pl_module.training_step(batch, batch_idx))
