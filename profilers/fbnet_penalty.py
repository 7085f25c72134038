"""FBNet's objective: the loss times a power of the logarithm of the cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from profilers.penalty import Penalty
from profilers.profile import Profiler


@final
class FBNetPenalty(Penalty):
    """``loss * alpha * log(expected cost) ** beta`` (FBNet, arXiv 1812.03443, equation 2).

    The logarithm needs a unit in which every cost is above 1: milliseconds are taken as microseconds, as in
    NNI's table (microsoft/nni, ``nni/algorithms/nas/pytorch/fbnet/utils.py``, ``mode="mul"``, whose alpha and
    beta are the defaults); other units as they are.

    ``alpha`` scales loss and cost alike: it moves no optimum, and under Adam hardly a step. ``beta`` says
    what a saving is worth: a cost lower by 1 % is worth as much as a loss lower by ``beta / log(cost)`` %.

    Departure: the formula knows no target, so that the search ends wherever it does. The baseline does not
    enter it; it bounds what is validated and derived, exactly.

    Args:
        profiler: what counts.
        baseline: the most that a derived architecture may cost, in the profiler's unit.
        alpha: factor of the loss.
        beta: exponent of the logarithm.

    Raises:
        ValueError: the baseline is outside of what the space's architectures cost, alpha or beta is not
            positive, or the cheapest architecture's logarithm is not.
    """

    def __init__(self, profiler: Profiler, baseline: float, alpha: float = 0.25, beta: float = 0.6) -> None:
        super().__init__(profiler, baseline)
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"alpha and beta of an FBNetPenalty must be positive, got {alpha} and {beta}")
        self.alpha = alpha
        self.beta = beta
        self._per_unit = 1000.0 if profiler.unit == "ms" else 1.0
        low, _ = profiler.cost.bounds()
        if not low * self._per_unit > 1:
            raise ValueError(
                f"the logarithm of every cost must be positive, and the cheapest architecture costs {low:g} "
                f"{profiler.unit}; use a smaller unit or another penalty"
            )

    def __call__(self, loss: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
        cost = self.profiler.cost.expected(probabilities) * self._per_unit
        factor = self.alpha * cost.log() ** self.beta
        return loss * factor.to(loss.device, torch.promote_types(loss.dtype, torch.float32))

    def update(self, probabilities: Mapping[str, Tensor]) -> None:
        pass  # alpha and beta are given

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if state:
            raise ValueError(
                f"the state belongs to another penalty: it must be empty, got {list(state)}; resume with the "
                "penalty that the search was started with"
            )
