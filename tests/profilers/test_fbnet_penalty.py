from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from profilers import Cost, CostTable, FBNetPenalty, Profiler


def profiler(unit: str = "ms", constant: float = 0.5) -> Profiler:
    tables = [CostTable(("op",), np.array([1.0, 2.0, 4.0]))]
    return Profiler(Cost({"op": (0, 1, 2)}, constant, tables, unit))


@pytest.mark.parametrize(("unit", "factor"), [("ms", 1000), ("MAC", 1)])
def test_it_follows_its_formula(unit: str, factor: float) -> None:
    penalty = FBNetPenalty(profiler(unit), baseline=3.0, alpha=0.25, beta=0.6)
    certain = {"op": torch.tensor([0.0, 0.0, 1.0])}
    found = penalty(torch.tensor(2.0).double(), certain)
    assert float(found) == pytest.approx(2 * 0.25 * math.log(4.5 * factor) ** 0.6, rel=1e-6)


def test_its_gradient_is_worth_what_beta_says() -> None:
    penalty = FBNetPenalty(profiler(), baseline=3.0, alpha=0.25, beta=0.6)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found = penalty(loss, {"op": logits.softmax(0)})
    by_logits, by_loss = torch.autograd.grad(found, [logits, loss])
    options = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    by_cost = (options - options.mean()) / 3  # of the expected cost, by the softmax
    cost = 0.5 + options.mean()
    relative = 0.6 / math.log(1000 * float(cost))  # of the penalised loss, for a relative change of the cost
    torch.testing.assert_close(by_logits, found.detach() * relative * by_cost / cost)
    torch.testing.assert_close(by_loss * loss.detach(), found.detach())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="logarithm of every cost must be positive"):
        FBNetPenalty(profiler("MB", constant=-0.5), baseline=3.0)
    with pytest.raises(ValueError, match="alpha and beta"):
        FBNetPenalty(profiler(), baseline=3.0, alpha=0.0)
    with pytest.raises(ValueError, match=r"from 1\.5 to 4\.5 ms"):
        FBNetPenalty(profiler(), baseline=9.0)
    with pytest.raises(ValueError, match="another penalty"):
        FBNetPenalty(profiler(), baseline=3.0).load_state_dict({"multiplier": 1.0})
