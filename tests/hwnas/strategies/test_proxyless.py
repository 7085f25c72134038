from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from hwnas import Gate, LayerChoice, ModelSpace
from hwnas.strategies import Proxyless
from profilers.penalty import ExpectationProfilerPenalty
from tests.contracts.strategy import DifferentiableStrategyContract
from tests.hwnas.strategies.tiny import TableProfiler, classification, fit, logits_of, space_of

Paths = Literal["two", "full"]


class TestTwoPaths(DifferentiableStrategyContract):
    runs_one_path = True
    paths_of_ranks = "own"

    def make(self, **options: Any) -> Proxyless:
        return Proxyless("two", 0.1, **options)


class TestAllPaths(DifferentiableStrategyContract):
    runs_one_path = True

    def make(self, **options: Any) -> Proxyless:
        return Proxyless("full", 0.1, **options)


class Counted(nn.Module):
    """A layer that counts how often it runs, and whether with a graph."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.constant_(self.layer.weight, factor)
        self.runs: list[bool] = []

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs).tanh()
        self.runs.append(outputs.requires_grad)
        return outputs


def prepared(paths: Paths, seed: int = 0) -> tuple[Proxyless, list[Counted]]:
    torch.manual_seed(seed)
    layers = [Counted(factor) for factor in (0.3, -0.2, 0.7, 0.1)]
    strategy = Proxyless(paths, 0.1)
    strategy.prepare_for(ModelSpace(LayerChoice(layers, label="op")))
    strategy.logits.of["op"].data = torch.randn(4)
    return strategy, layers


def architecture_step(strategy: Proxyless, seed: int) -> tuple[Gate, Tensor, Tensor]:
    """The gate, the gradient of the logits, and the gradient of the output."""
    gates = strategy.architecture_gates(torch.Generator().manual_seed(seed))
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    with strategy.space.running(gates):
        output = strategy.space(inputs)
    (to_output,) = torch.autograd.grad(output.square().sum(), output, retain_graph=True)
    (to_logits,) = torch.autograd.grad(output.square().sum(), strategy.logits.parameters())
    return gates["op"], to_logits, to_output


@pytest.mark.parametrize("seed", range(4))
def test_gradient_in_full_mode_is_equation_4(seed: int) -> None:
    strategy, layers = prepared("full", seed)
    _, found, to_output = architecture_step(strategy, seed)
    p = strategy.probabilities()["op"]
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    # dL/dg_j is the scalar product of the output's gradient with the output of option j.
    to_gates = torch.stack([(to_output * layer(inputs)).sum() for layer in layers]).detach()
    expected = torch.zeros(4)
    for i in range(4):
        for j in range(4):
            expected[i] += to_gates[j] * p[j] * (float(i == j) - p[i])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_gradient_of_two_paths_is_equation_4_between_the_two(seed: int) -> None:
    strategy, layers = prepared("two", seed)
    gate, found, to_output = architecture_step(strategy, seed)
    a, b = gate.live()
    p = strategy.logits.of["op"].detach()[[a, b]].softmax(0)
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    to_gates = [float((to_output * layers[option](inputs)).sum().detach()) for option in (a, b)]
    expected = torch.zeros(4)
    expected[a] = p[0] * p[1] * (to_gates[0] - to_gates[1])
    expected[b] = -expected[a]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("paths", "count"), [("two", 2), ("full", 4)])
def test_only_the_picked_option_keeps_a_graph(paths: Paths, count: int) -> None:
    strategy, layers = prepared(paths)
    gate, _, _ = architecture_step(strategy, 1)
    assert sum(len(layer.runs) for layer in layers) == count
    assert [index for index, layer in enumerate(layers) if layer.runs == [True]] == list(gate.picked)


def test_picked_output_passes_unchanged() -> None:
    strategy, _ = prepared("full")
    gate = strategy.architecture_gates(torch.Generator())["op"]
    assert gate.weights is not None
    assert sorted(gate.weights.tolist()) == [0, 0, 0, 1]
    assert gate.weights[gate.picked[0]] == 1


@pytest.mark.parametrize("seed", range(4))
def test_two_path_step_keeps_the_probabilities_of_the_others(seed: int) -> None:
    strategy, _ = prepared("two", seed)
    before, p = logits_of(strategy), strategy.probabilities()["op"]
    gate, gradient, _ = architecture_step(strategy, seed)
    strategy.logits.of["op"].grad = gradient
    strategy._arch_optimizer.step()
    strategy.after_architecture_step({"op": gate}, before)
    others = [index for index in range(4) if index not in gate.live()]
    torch.testing.assert_close(strategy.probabilities()["op"][others], p[others])
    assert torch.equal(logits_of(strategy)["op"][others], before["op"][others])
    assert not torch.equal(logits_of(strategy)["op"], before["op"])


def test_samples_follow_the_probabilities() -> None:
    strategy, _ = prepared("two")
    generator = torch.Generator().manual_seed(0)
    picked = [strategy.weight_gates(generator)["op"].picked[0] for _ in range(4000)]
    frequencies = torch.bincount(torch.tensor(picked), minlength=4) / len(picked)
    # Four standard deviations of a share of 4,000 draws.
    torch.testing.assert_close(frequencies, strategy.probabilities()["op"], atol=0.032, rtol=0)


@pytest.mark.parametrize("paths", ["two", "full"])
def test_penalty_moves_the_logits_towards_cheaper_networks(paths: Paths) -> None:
    found: dict[float, Any] = {}
    for scale in (0.0, 3.0):
        module = classification()
        profiler = TableProfiler(space_of(module))
        penalty = ExpectationProfilerPenalty(profiler, baseline=4.0, scale=scale)
        strategy = Proxyless(paths, 0.1, penalty=penalty)
        fit(strategy, module, max_epochs=3)
        found[scale] = logits_of(strategy), float(profiler.cost.expected(strategy.probabilities()))
    assert all(not torch.equal(found[0.0][0][label], found[3.0][0][label]) for label in found[0.0][0])
    assert found[3.0][1] < 0.8 * found[0.0][1]


def test_other_numbers_of_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="paths must be 'two' or 'full'; got 'three'"):
        Proxyless("three")  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("paths", ["two", "full"])
def test_layer_that_writes_in_place_may_follow_a_choice(paths: Paths) -> None:
    layers = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()]
    strategy = Proxyless(paths)
    strategy.prepare_for(ModelSpace(nn.Sequential(LayerChoice(layers, label="op"), nn.ReLU(inplace=True))))
    with strategy.space.running(strategy.architecture_gates(torch.Generator())):
        loss = strategy.space(torch.randn(4, 3)).sum()
    (gradient,) = torch.autograd.grad(loss, strategy.logits.parameters())
    assert gradient.isfinite().all()
