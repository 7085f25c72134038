from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from hwnas.strategies import DARTS, NonFiniteLossError
from profilers.penalty import Penalty
from tests.hwnas.strategies.tiny import TableProfiler, classification, fit, space_of


class Broken(Penalty):
    """A finite loss whose gradient, or a loss that is itself no number."""

    how: str

    def __call__(self, loss: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
        zero = 0.0 * self.excess(probabilities).float()
        return loss + (zero.sqrt() if self.how == "gradient" else zero / 0.0)

    def update(self, probabilities: Mapping[str, Tensor]) -> None:
        raise AssertionError("after a step that was refused")

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass


@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_penalty_that_gives_no_number_stops_before_the_logits_move(how: str) -> None:
    module = classification()
    penalty = Broken(TableProfiler(space_of(module)), baseline=4.0)
    penalty.how = how
    strategy = DARTS(penalty=penalty)
    with pytest.raises(NonFiniteLossError, match=rf"the {how} of the architecture step is nan in epoch 0"):
        fit(strategy, module)
    assert all(torch.isfinite(p).all() for p in strategy.probabilities().values())
