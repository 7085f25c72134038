from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from profilers.cost import Cost, CostTable
from profilers.penalty import (
    ExpectationProfilerPenalty,
    LagrangianPenalty,
    RangeProfilerFilter,
    SampleProfilerPenalty,
)
from profilers.profile import Profiler


@pytest.fixture
def profiler() -> Profiler:
    """1 to 6 ms, 1, 2 or 4 ms for the operation and 0, 1 or 2 for the depth."""
    tables = [CostTable(("op",), np.array([1.0, 2.0, 4.0])), CostTable(("depth",), np.array([0.0, 1.0, 2.0]))]
    return Profiler(Cost({"op": (0, 1, 2), "depth": (1, 2, 3)}, 0.0, tables, "ms"))


def distributions(logits: Tensor) -> dict[str, Tensor]:
    return {"op": logits[0].softmax(0), "depth": logits[1].softmax(0)}


BENT = {
    "linear": lambda x: x,
    "positive": lambda x: max(0, x),
    "negative": lambda x: min(0, x),
    "absolute": abs,
}


@pytest.mark.parametrize("nonlinear", BENT)
@pytest.mark.parametrize("baseline", [2.0, 5.0])
def test_penalties_follow_their_formulas(profiler: Profiler, nonlinear: str, baseline: float) -> None:
    architecture = {"op": 1, "depth": 2}  # 3 ms
    certain = {"op": torch.tensor([0.0, 1, 0]), "depth": torch.tensor([0.0, 1, 0])}
    bent = BENT[nonlinear](3.0 / baseline - 1)
    for aggregate, expected in (("add", 1.5 + 0.7 * bent), ("mul", 1.5 * (1 + bent) ** 0.7)):
        arguments = (profiler, baseline, 0.7, nonlinear, aggregate)
        found = ExpectationProfilerPenalty(*arguments)(torch.tensor(1.5).double(), certain)
        assert float(found) == pytest.approx(expected, rel=1e-6)
        assert SampleProfilerPenalty(*arguments)(1.5, architecture) == pytest.approx(expected, rel=1e-12)


def test_a_reward_is_penalised_with_the_opposite_sign(profiler: Profiler) -> None:
    architecture = {"op": 2, "depth": 2}  # 5 ms
    tunas = SampleProfilerPenalty(profiler, 4.0, scale=0.07, nonlinear="absolute")
    assert tunas.reward(0.9, architecture) == pytest.approx(0.9 - 0.07 * (5 / 4 - 1), rel=1e-12)
    assert tunas.reward(0.9, {"op": 1, "depth": 1}) == pytest.approx(0.9 - 0.07 * (1 - 2 / 4), rel=1e-12)
    mnasnet = SampleProfilerPenalty(profiler, 4.0, scale=0.07, aggregate="mul")
    assert mnasnet.reward(0.9, architecture) == pytest.approx(0.9 * (5 / 4) ** -0.07, rel=1e-12)


@pytest.mark.parametrize("aggregate", ["add", "mul"])
def test_the_gradient_of_the_expected_cost_reaches_the_logits(profiler: Profiler, aggregate: str) -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    penalty = ExpectationProfilerPenalty(profiler, 2.0, aggregate=aggregate)
    (gradient,) = torch.autograd.grad(penalty(torch.tensor(1.0), distributions(logits)), logits)
    # d E / d logit_i = p_i (cost_i - mean cost), over the baseline of 2 ms
    expected = torch.tensor([[1 - 7 / 3, 2 - 7 / 3, 4 - 7 / 3], [-1.0, 0.0, 1.0]]) / 3 / 2
    torch.testing.assert_close(gradient, expected)


def test_the_loss_keeps_its_gradient_and_a_type_of_at_least_float32(profiler: Profiler) -> None:
    loss = torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True)
    total = LagrangianPenalty(profiler, 3.0)(loss, distributions(torch.zeros(2, 3)))
    total.backward()
    assert total.dtype == torch.float32
    assert loss.grad == 1


def search(
    profiler: Profiler, penalty: LagrangianPenalty | None, lr: float, steps: int, gain: float
) -> float:
    """Expected cost that Adam reaches where a task's gain grows with an option's cost."""
    options = profiler.cost.options
    logits = {label: torch.zeros(len(found), requires_grad=True) for label, found in options.items()}
    optimiser = torch.optim.Adam(list(logits.values()), lr, betas=(0.5, 0.999))
    worth = {label: gain * torch.arange(len(found)) for label, found in options.items()}

    def distribution() -> Mapping[str, Tensor]:
        return {label: found.softmax(0) for label, found in logits.items()}

    for _ in range(steps):
        found = distribution()
        loss = 2.3 - torch.stack([(found[label] * worth[label]).sum() for label in options]).sum()
        optimiser.zero_grad()
        (loss if penalty is None else penalty(loss, found)).backward()
        optimiser.step()
        if penalty is not None:
            penalty.update(distribution())
    return profiler.cost.expected(distribution()).item()


@pytest.mark.parametrize(("lr", "steps"), [(0.01, 1000), (0.03, 300), (0.05, 200)])
@pytest.mark.parametrize("gain", [0.003, 0.03])
def test_the_lagrangian_ends_at_the_baseline(lr: float, steps: int, gain: float) -> None:
    generator = np.random.default_rng(0)
    options = {f"layer{i}": tuple(range(7)) for i in range(10)}
    tables = [CostTable((label,), np.sort(generator.uniform(0.1, 1, 7))) for label in options]
    profiler = Profiler(Cost(options, 0.2, tables, "ms"))
    low, high = profiler.cost.bounds()
    baseline = low + 0.35 * (high - low)
    assert search(profiler, None, lr, steps, gain) > 1.2 * baseline
    penalty = LagrangianPenalty(profiler, baseline)
    assert search(profiler, penalty, lr, steps, gain) == pytest.approx(baseline, rel=0.03)


def test_the_multiplier_is_the_running_excess_and_never_negative(profiler: Profiler) -> None:
    penalty = LagrangianPenalty(profiler, 2.0, learning_rate=0.5)
    dear = {"op": torch.tensor([0.0, 0, 1]), "depth": torch.tensor([1.0, 0, 0])}  # 4 ms
    cheap = {"op": torch.tensor([1.0, 0, 0]), "depth": torch.tensor([1.0, 0, 0])}  # 1 ms
    found = []
    for given in (dear, dear, cheap, cheap, cheap, cheap, cheap):
        penalty.update(given)
        found.append(penalty.multiplier)
    assert found == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_a_cost_below_the_baseline_is_not_pushed(profiler: Profiler) -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    total = LagrangianPenalty(profiler, 5.0)(torch.tensor(1.0), distributions(logits))
    (gradient,) = torch.autograd.grad(total, logits)
    assert total == 1
    assert not gradient.any()


def test_state_goes_round_through_plain_floats(profiler: Profiler) -> None:
    penalty, resumed = LagrangianPenalty(profiler, 2.0), LagrangianPenalty(profiler, 2.0)
    penalty.update(distributions(torch.zeros(2, 3)))
    assert {type(value) for value in penalty.state_dict().values()} == {float}
    resumed.load_state_dict(penalty.state_dict())
    assert resumed.multiplier == penalty.multiplier > 0
    with pytest.raises(ValueError, match="belongs to another penalty"):
        ExpectationProfilerPenalty(profiler, 2.0).load_state_dict(penalty.state_dict())


@pytest.mark.parametrize("kind", [ExpectationProfilerPenalty, SampleProfilerPenalty, LagrangianPenalty])
@pytest.mark.parametrize("baseline", [0.9, 6.1, math.nan])
def test_a_baseline_out_of_reach_is_refused_with_the_bounds(
    profiler: Profiler, kind: type[ExpectationProfilerPenalty], baseline: float
) -> None:
    with pytest.raises(ValueError, match=rf"from 1 to 6 ms, got {baseline:g} ms"):
        kind(profiler, baseline)


def test_a_filter_takes_both_ends_in(profiler: Profiler) -> None:
    within = RangeProfilerFilter(profiler, min=2.0, max=3.0)
    costs = {(op, depth): (1, 2, 4)[op] + depth - 1 for op in (0, 1, 2) for depth in (1, 2, 3)}
    for (op, depth), cost in costs.items():
        assert within.filter({"op": op, "depth": depth}) == (2 <= cost <= 3)


@pytest.mark.parametrize(
    "ends", [{"max": 0.5}, {"min": 7.0}, {"min": 3.0, "max": 2.0}, {"min": 1.1, "max": 1.9}]
)
def test_a_range_that_holds_nothing_is_refused_with_the_bounds(
    profiler: Profiler, ends: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match="1 to 6 ms"):
        RangeProfilerFilter(profiler, **ends)


def test_unknown_words_and_an_empty_range_are_refused(profiler: Profiler) -> None:
    with pytest.raises(ValueError, match="nonlinear must be one of"):
        ExpectationProfilerPenalty(profiler, 2.0, nonlinear="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aggregate must be one of"):
        SampleProfilerPenalty(profiler, 2.0, aggregate="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs min, max or both"):
        RangeProfilerFilter(profiler)
    with pytest.raises(ValueError, match="ends must be numbers of ms; got None and nan"):
        RangeProfilerFilter(profiler, max=math.nan)
    with pytest.raises(ValueError, match="must be positive"):
        LagrangianPenalty(profiler, 2.0, learning_rate=0.0)
