"""RandomOneShot: each step trains one path, drawn uniformly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch

from hwnas.gate import Gate
from hwnas.strategies.sampled import UniformStrategy


@final
class RandomOneShot(UniformStrategy):
    """Trains one uniformly drawn path a step (SPOS, arXiv 1904.00420, section 3.2).

    "Uniformly" is over the canonical architectures, inside the filters exactly (`hwnas.sampling.Sampler`);
    drawing each choice by itself would favour those that inactive choices count many times. Nothing is
    learned besides the weights: what is best is found by a search on the trained supernet. The answer that
    it has is the best of a fixed set of candidates, and it is what validation speaks for.

    Under DDP each rank draws its own path, so that a step trains as many as there are ranks: give the
    trainer ``strategy="ddp_find_unused_parameters_true"``.

    Args:
        options: as in `SampledStrategy` (`filter`, `n_candidates`, ...) and `Strategy` (`seed`, ...).
    """

    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return self.space.gates_of(self.sample(generator))
