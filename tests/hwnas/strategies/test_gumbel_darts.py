from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from scipy.stats import chisquare

from hwnas.strategies import GumbelDARTS
from profilers.penalty import ExpectationProfilerPenalty
from tests.contracts.strategy import DifferentiableStrategyContract
from tests.hwnas.strategies.tiny import TableProfiler, classification, fit, logits_of, space_of


class TestSoft(DifferentiableStrategyContract):
    def make(self, **options: Any) -> GumbelDARTS:
        return GumbelDARTS(0.1, **options)


class TestHard(DifferentiableStrategyContract):
    def make(self, **options: Any) -> GumbelDARTS:
        return GumbelDARTS(0.1, hard=True, **options)


class Temperatures(pl.Callback):
    def __init__(self, strategy: GumbelDARTS) -> None:
        self.strategy = strategy
        self.seen: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.strategy.temperature)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (2.0, [2.0] * 5),
        (2, [2.0] * 5),
        ((1.0, 0.2), [1.0, 0.8, 0.6, 0.4, 0.2]),
        (lambda done: 5 * 0.1**done, [5, 5 * 0.1**0.25, 5 * 0.1**0.5, 5 * 0.1**0.75, 0.5]),
    ],
    ids=["float", "int", "pair", "function"],
)
def test_temperature_goes_from_the_first_epochs_to_the_last_ones(
    temperature: Any, expected: list[float]
) -> None:
    strategy = GumbelDARTS(temperature=temperature)
    fit(strategy, None, seen := Temperatures(strategy), batches=1, max_epochs=5)
    assert seen.seen == pytest.approx(expected)
    assert strategy.temperature == expected[-1]  # the last one is reached to the bit


def test_temperature_follows_a_limit_of_steps() -> None:
    strategy = GumbelDARTS(temperature=(1.0, 0.2))
    fit(strategy, None, seen := Temperatures(strategy), batches=2, max_epochs=-1, max_steps=6)
    assert seen.seen == pytest.approx([1.0, 1.0, 0.6, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("temperature", ["hot", (1, 2, 3), (1, None)])
def test_temperature_that_is_none_is_refused(temperature: Any) -> None:
    with pytest.raises(ValueError, match="a temperature is a number, a pair of them or a function"):
        GumbelDARTS(temperature=temperature)


def test_temperatures_that_are_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be positive; got \(1.0, 0.0\)"):
        GumbelDARTS(temperature=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"must be positive; got -1\.0 after 0% of the search"):
        GumbelDARTS(temperature=lambda done: -1.0)


@pytest.mark.parametrize("hard", [False, True])
def test_picked_option_is_distributed_as_the_probabilities(hard: bool) -> None:
    strategy = GumbelDARTS(hard=hard)
    strategy.prepare_for(space_of(classification()))
    with torch.no_grad():
        strategy.logits.of["op"].copy_(torch.tensor([1.0, 0.0, -1.0]))
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(2000):
        weights = strategy.architecture_gates(generator)["op"].weights
        assert weights is not None
        counts[int(weights.argmax())] += 1
    expected = 2000 * strategy.probabilities()["op"].double()
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_hard_gate_is_one_hot_forward_and_has_the_soft_gradient() -> None:
    gradients = []
    for hard in (False, True):
        strategy = GumbelDARTS(hard=hard, temperature=0.7)
        strategy.prepare_for(space_of(classification()))
        weights = strategy.architecture_gates(torch.Generator().manual_seed(3))["op"].weights
        assert weights is not None
        if hard:
            assert sorted(weights.tolist()) == [0.0, 0.0, 1.0]
        score = (weights * torch.tensor([1.0, -2.0, 0.5])).sum()
        gradients.append(torch.autograd.grad(score, strategy.logits.of["op"])[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("hard", [False, True])
def test_penalty_sees_the_draw_that_the_forward_pass_saw(hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = classification()
    profiler = TableProfiler(space_of(module))
    penalty = ExpectationProfilerPenalty(profiler, baseline=4.0)
    strategy = GumbelDARTS(hard=hard, penalty=penalty)
    forward, seen = [], []

    def excess(probabilities: Any) -> torch.Tensor:
        seen.append({label: found.detach().clone() for label, found in probabilities.items()})
        return original(probabilities)

    original = penalty.excess
    monkeypatch.setattr(penalty, "excess", excess)

    original_gates = strategy.architecture_gates

    def gates(generator: torch.Generator) -> Any:
        drawn = original_gates(generator)
        forward.append({label: gate.weights.detach().clone() for label, gate in drawn.items()})
        return drawn

    monkeypatch.setattr(strategy, "architecture_gates", gates)
    fit(strategy, module, max_epochs=1)
    assert len(forward) == len(seen) == 4
    for drawn, given in zip(forward, seen, strict=True):
        assert all(torch.equal(drawn[label], given[label]) for label in drawn)


@pytest.mark.parametrize("hard", [False, True])
def test_penalty_moves_the_logits_towards_cheaper_networks(hard: bool) -> None:
    found = {}
    for scale in (0.0, 3.0):
        module = classification()
        profiler = TableProfiler(space_of(module))
        penalty = ExpectationProfilerPenalty(profiler, baseline=4.0, scale=scale)
        strategy = GumbelDARTS(0.1, hard=hard, penalty=penalty)
        fit(strategy, module, max_epochs=3)
        found[scale] = logits_of(strategy), strategy.expected_cost(profiler)
    assert all(not torch.equal(found[0.0][0][label], found[3.0][0][label]) for label in found[0.0][0])
    assert found[3.0][1] < 0.8 * found[0.0][1]
