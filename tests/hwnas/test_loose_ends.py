"""Cells that concatenate what no node takes: exact costs, budgets and draws, however many nodes there are."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from hwnas import Cell, Gate, ModelSpace
from hwnas.derive import ranked
from hwnas.nn import Conv2d, Linear
from hwnas.sampling import Sampler
from hwnas.spaces import ENASMicro
from hwnas.trials.additive import pareto_front
from hwnas.trials.candidates import Candidates
from profilers import Cost, FlopsProfiler, ParamsProfiler, RangeProfilerFilter, count_macs
from profilers.space import Architecture

IMAGES = torch.zeros(1, 1, 8, 8)


class Net(nn.Module):
    """Cells that take the two before them, brought to their width."""

    def __init__(self, nodes: int, cells: int = 2, labels: Any = ("normal", "reduce"), ops: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        candidates = {"conv": lambda *_: nn.Conv2d(2, 2, 3, padding=1), "skip": nn.Identity()}
        widths: list[Any] = [2, 2]
        self.resize, self.cells = nn.ModuleList(), nn.ModuleList()
        for index in range(cells):
            self.resize.append(nn.ModuleList(Conv2d(width, 2, 1) for width in widths))
            cell = Cell(candidates, nodes, ops, 2, merge_op="loose_end", label=labels[index % len(labels)])
            self.cells.append(cell)
            widths = [widths[1], cell.n_outputs * 2]
        self.head = Linear(widths[1], 3)

    def forward(self, images: Tensor) -> Tensor:
        before = last = self.stem(images)
        for (first, second), cell in zip(self.resize, self.cells, strict=True):  # type: ignore[misc]
            before, last = last, cell(first(before), second(last))
        scores: Tensor = self.head(last.mean((2, 3)))
        return scores


def every(space: ModelSpace) -> np.ndarray[Any, np.dtype[np.int64]]:
    sizes = [len(options) for options in space.options.values()]
    return np.indices(sizes).reshape(len(sizes), -1).T


def is_true_for(space: ModelSpace, cost: Cost, parameters: Cost, architecture: Architecture) -> None:
    subnet = space.freeze(architecture)
    assert cost.of(architecture) == count_macs(subnet, [IMAGES]).headline
    assert parameters.of(architecture) == sum(p.numel() for p in subnet.parameters())


@pytest.mark.parametrize(("nodes", "cells"), [(3, 3), (6, 2), (8, 1)])
def test_costs_are_those_of_the_frozen_subnets(nodes: int, cells: int) -> None:
    space = ModelSpace(Net(nodes, cells))
    macs, params = FlopsProfiler(space, IMAGES).cost, ParamsProfiler(space).cost
    generator = torch.Generator().manual_seed(0)
    for architecture in [space.random(generator) for _ in range(6)]:
        is_true_for(space, macs, params, architecture)
    low, high = macs.minimum(), macs.maximum()
    for architecture in (low, high):
        is_true_for(space, macs, params, space.canonical(architecture))
    rows = np.stack([torch.randint(len(o), (2_000,), generator=generator) for o in space.options.values()], 1)
    assert (macs.of_many(rows) >= macs.of(low)).all()
    assert (macs.of_many(rows) <= macs.of(high)).all()
    assert max(table.values.size for table in macs.tables) <= 2 * math.comb(nodes + 1, 2)


@pytest.fixture(scope="module")
def small() -> tuple[ModelSpace, FlopsProfiler]:
    space = ModelSpace(Net(3, cells=1, ops=1))
    return space, FlopsProfiler(space, IMAGES)


def test_the_expected_cost_and_its_gradient_are_those_of_enumeration(small: Any) -> None:
    space, profiler = small
    rows = every(space)
    costs = torch.from_numpy(profiler.cost.of_many(rows))
    logits = [torch.randn(len(o), dtype=torch.double).requires_grad_() for o in space.options.values()]
    given = {label: row.softmax(0) for label, row in zip(space.options, logits, strict=True)}
    chances = torch.stack([row[rows[:, i]] for i, row in enumerate(given.values())]).prod(0)
    found, wanted = profiler.cost.expected(given), chances @ costs
    torch.testing.assert_close(found, wanted)
    gradient = torch.autograd.grad(found, logits, retain_graph=True)
    for ours, theirs in zip(gradient, torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bounds_and_the_best_within_a_budget_are_those_of_enumeration(small: Any) -> None:
    space, profiler = small
    costs = {tuple(a.items()): profiler.profile(a) for a in space.grid()}
    low, high = min(costs.values()), max(costs.values())
    assert profiler.cost.bounds() == (low, high)
    budget = low + 0.4 * (high - low)
    generator = torch.Generator().manual_seed(3)
    rows = {
        label: torch.randn(len(options), generator=generator).softmax(0)
        for label, options in space.options.items()
    }
    logs = {label: row.log() - row.log().max() for label, row in rows.items()}

    def score(architecture: Architecture) -> float:
        active = space.active(architecture)
        return sum(float(logs[label][space.options[label].index(o)]) for label, o in active.items())

    within = [score(dict(a)) for a, cost in costs.items() if cost <= budget]
    best = next(ranked(space, rows, {profiler: budget}))
    assert profiler.profile(best) <= budget
    assert score(best) == pytest.approx(max(within))


def test_draws_within_a_budget_are_uniform_and_all_that_is_within_is_listed(small: Any) -> None:
    space, profiler = small
    costs = {tuple(a.values()): profiler.profile(a) for a in space.grid()}
    limit = float(np.quantile([*costs.values()], 0.3))
    inside = {found for found, cost in costs.items() if cost <= limit}
    within = RangeProfilerFilter(profiler, max=limit)
    sampler = Sampler(space, within)
    drawn = sampler.draw_many(40 * len(inside), torch.Generator().manual_seed(1))
    counts = Counter(tuple(a.values()) for a in drawn)
    assert sampler.is_exact
    assert set(counts) == inside
    assert chisquare([*counts.values()]).pvalue > 1e-3
    listed = Candidates(space, [within], torch.Generator()).grid()
    assert {tuple(a.values()) for a in listed} == inside


def test_the_front_of_two_costs_is_that_of_enumeration(small: Any) -> None:
    space, profiler = small
    params = ParamsProfiler(space)
    rows = every(space)
    found = pareto_front(params.cost, profiler.cost)
    worth, price = params.cost.of_many(rows), profiler.cost.of_many(rows)
    wanted = {p: worth[price <= p].max() for p in sorted(set(price.tolist()))}
    front = [(p, w) for p, w in wanted.items() if all(w > other for q, other in wanted.items() if q < p)]
    assert [(point.cost, point.score) for point in found] == front


def test_draws_within_a_budget_of_six_nodes_are_exact() -> None:
    space = ModelSpace(Net(6))
    profiler = FlopsProfiler(space, IMAGES)
    low, high = profiler.cost.bounds()
    sampler = Sampler(space, RangeProfilerFilter(profiler, max=low + 0.4 * (high - low)))
    assert sampler.is_exact
    drawn = sampler.draw_many(20, torch.Generator().manual_seed(0))
    assert all(profiler.profile(a) <= low + 0.4 * (high - low) for a in drawn)


def test_a_width_that_meets_its_own_choices_is_exact_too() -> None:
    """The second cell's operations take the first one's output as it is, and the choices are the same."""

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Cell([nn.Identity()], 3, 1, 1, "loose_end", label="cell")
            width = self.first.n_outputs * 2

            def conv(node: int, _: int, source: int) -> nn.Module:
                return Conv2d(2 if source else width, 2, 1)

            self.second = Cell([conv], 3, 1, 1, label="cell")

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.second(self.first(images.expand(-1, 2, -1, -1)))
            return found

    space = ModelSpace(Direct())
    macs, params = FlopsProfiler(space, IMAGES).cost, ParamsProfiler(space).cost
    for architecture in space.grid():
        is_true_for(space, macs, params, architecture)


def test_the_derived_micro_space_of_enas_is_profiled() -> None:
    network = ENASMicro(in_channels=1, channels=4, cells=3, nodes=2, derived=True)
    space = ModelSpace(network)
    macs, params = FlopsProfiler(space, IMAGES).cost, ParamsProfiler(space).cost
    generator = torch.Generator().manual_seed(0)
    for architecture in (space.random(generator), space.random(generator), macs.minimum(), macs.maximum()):
        is_true_for(space, macs, params, space.canonical(architecture))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        candidates = {
            "conv": lambda *_: nn.Conv2d(2, 2, 3, padding=1),
            "point": lambda *_: nn.Conv2d(2, 2, 1),
        }
        self.cell = Cell(candidates, 4, 1, 1, "loose_end", label="cell")
        self.take = Conv2d(self.cell.n_outputs * 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        taken: Tensor = self.take(self.cell(images))
        return taken


def test_a_mixture_is_the_expectation_over_the_edges_of_what_is_taken() -> None:
    torch.manual_seed(0)
    network = Mixed()
    space = ModelSpace(network).double()
    space.check_can_mix()
    logits = {
        label: torch.randn(len(o), dtype=torch.double).requires_grad_() for label, o in space.options.items()
    }
    weights = {label: row.softmax(0) for label, row in logits.items()}
    nodes: list[Tensor] = []
    for node in network.cell.nodes.values():
        node.register_forward_hook(lambda _, __, output: nodes.append(output))
    with space.running({label: Gate(tuple(range(len(row))), row) for label, row in weights.items()}):
        found = space(torch.randn(2, 2, 5, 5, dtype=torch.double))
    edges = [label for label in space.options if label.endswith("inputs")]
    wanted = torch.zeros(())
    for chosen in itertools.product(*(enumerate(space.options[label]) for label in edges)):
        chance = torch.stack([weights[label][i] for label, (i, _) in zip(edges, chosen, strict=True)]).prod()
        taken = {source for _, (source,) in chosen}
        loose = torch.cat([node for index, node in enumerate(nodes, start=1) if index not in taken], 1)
        weight = network.take.weight[:, : loose.shape[1]]
        wanted = wanted + chance * nn.functional.conv2d(loose, weight, network.take.bias)
    torch.testing.assert_close(found, wanted)
    parameters = [*logits.values(), network.take.weight]
    ours = torch.autograd.grad(found.square().sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(wanted.square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_under_one_hot_weights_it_is_the_path_and_every_edge_learns() -> None:
    torch.manual_seed(0)
    space = ModelSpace(Mixed()).double()
    architecture = {**space.default(), "cell.2.inputs": (1,), "cell.3.inputs": (2,), "cell.4.inputs": (3,)}
    images = torch.randn(2, 2, 5, 5, dtype=torch.double)
    logits = {
        label: torch.zeros(len(o), dtype=torch.double).requires_grad_() for label, o in space.options.items()
    }
    gates = {}
    for label, gate in space.gates_of(architecture).items():
        hot = nn.functional.one_hot(torch.tensor(gate.picked[0]), len(logits[label])).double()
        soft = logits[label].softmax(0)
        gates[label] = Gate(gate.picked, hot + soft - soft.detach())
    with space.running(gates):
        found = space(images)
    torch.testing.assert_close(found, space.freeze(architecture)(images))
    found.square().sum().backward()
    # No width but the narrowest was run: what a wider one would be worth reaches the edges all the same.
    edges = [row for label, row in logits.items() if label.endswith("inputs")]
    assert all(row.grad is not None and row.grad.abs().sum() > 0 for row in edges)
