from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace
from hwnas.strategies import DARTS
from profilers.penalty import ExpectationProfilerPenalty
from tests.contracts.strategy import DifferentiableStrategyContract
from tests.hwnas.strategies.tiny import (
    TableProfiler,
    TinyNet,
    classification,
    fit,
    logits_of,
    random_probabilities,
    space_of,
)


class TestFirstOrder(DifferentiableStrategyContract):
    def make(self, **options: Any) -> DARTS:
        return DARTS(0.1, **options)


def expected_cost(strategy: DARTS, profiler: TableProfiler) -> float:
    return float(profiler.cost.expected(strategy.probabilities()))


def test_penalty_moves_the_logits_towards_cheaper_networks() -> None:
    found = {}
    for scale in (0.0, 3.0):
        module = classification()
        profiler = TableProfiler(space_of(module))
        strategy = DARTS(0.1, penalty=ExpectationProfilerPenalty(profiler, baseline=4.0, scale=scale))
        fit(strategy, module, max_epochs=3)
        found[scale] = logits_of(strategy), expected_cost(strategy, profiler)
    assert all(not torch.equal(found[0.0][0][label], found[3.0][0][label]) for label in found[0.0][0])
    assert found[3.0][1] < 0.8 * found[0.0][1]


def test_gradients_equal_plain_autograd_over_the_softmax_mixture() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Identity()]
    space = ModelSpace(LayerChoice(layers, label="op"))
    strategy = DARTS()
    strategy.prepare_for(space)
    logits = strategy.logits.of["op"]
    inputs, targets = torch.randn(5, 3), torch.randn(5, 3)

    def plain(logits: Tensor) -> Tensor:
        return sum(p * layer(inputs) for p, layer in zip(logits.softmax(0), layers, strict=True))

    weights = list(space.parameters())
    with space.running(strategy.architecture_gates(torch.Generator())):
        found = torch.autograd.grad(F.mse_loss(space(inputs), targets), [logits, *weights])
    expected = torch.autograd.grad(F.mse_loss(plain(logits), targets), [logits, *weights])
    torch.testing.assert_close(found, expected)
    with space.running(strategy.weight_gates(torch.Generator())):
        loss = F.mse_loss(space(inputs), targets)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), expected[1:])


def test_weight_step_does_not_reach_the_logits() -> None:
    strategy = DARTS()
    strategy.prepare_for(ModelSpace(TinyNet()))
    gates = strategy.weight_gates(torch.Generator())
    assert all(gate.weights is not None and not gate.weights.requires_grad for gate in gates.values())
    gates = strategy.architecture_gates(torch.Generator())
    assert all(gate.weights is not None and gate.weights.requires_grad for gate in gates.values())


def test_answer_is_the_most_probable_architecture_within_the_baseline() -> None:
    module = classification()
    profiler = TableProfiler(space_of(module))
    strategy = DARTS(penalty=ExpectationProfilerPenalty(profiler, baseline=4.0))
    strategy.prepare_for(space_of(module))
    for label, p in random_probabilities(strategy.space, 1).items():
        strategy.logits.of[label].data = p.log()
    assert profiler.profile(strategy.architecture()) <= 4.0
    assert strategy.architecture(max_cost={}) == strategy.space.canonical(
        {
            label: options[int(strategy.logits.of[label].argmax())]
            for label, options in strategy.space.options.items()
        }
    )
    best = strategy.top_k(100)
    assert best[0] == strategy.architecture()
    feasible = [a for a in strategy.space.grid() if profiler.profile(a) <= 4.0]
    assert len(best) == len(feasible)
    with pytest.raises(ValueError, match=r"0.5 ms cannot be kept.*cheapest"):
        strategy.architecture(max_cost={profiler: 0.5})
