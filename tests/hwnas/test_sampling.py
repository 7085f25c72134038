import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from hwnas import LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.nn import Linear
from hwnas.sampling import Sampler, _Walk
from profilers import Cost, CostTable, Profiler, RangeProfilerFilter


class Nested(nn.Module):
    """A choice inside a choice, a depth whose blocks hold choices, and a coupled width."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([2, 4, 6], label="width")
        inner = LayerChoice([nn.Identity(), nn.ReLU(), nn.Tanh()], label="inner")
        self.op = LayerChoice({"skip": nn.Identity(), "nested": inner}, label="op")
        self.deep = Repeat(
            lambda i: LayerChoice([nn.Identity(), nn.ReLU()], label=f"block{i}"), (0, 3), label="depth"
        )
        self.linear = Linear(4, width)


def costs_of(space: ModelSpace, seed: int, unit: str = "ms") -> Profiler:
    """Random tables over one to three choices each, the space's conditions respected."""
    generator = np.random.default_rng(seed)
    labels = list(space.options)
    tables = []
    for label in labels:
        on = space.activity[label].labels()
        names = (*on, label) if on else (label, labels[(labels.index(label) + 1) % len(labels)])
        if any(space.activity[name].labels() for name in names[1:]) and not on:
            names = (label,)
        values = generator.uniform(0, 1, [len(space.options[name]) for name in names])
        if on:
            values = np.where(space.activity[label].table(space.options)[..., None], values, 0.0)
        tables.append(CostTable(names, values))
    return Profiler(Cost(space.options, 0.3, tables, unit))


def layers(count: int, options: int, *widths: ValueChoice) -> ModelSpace:
    network = nn.Sequential(
        *(LayerChoice([nn.Identity() for _ in range(options)], label=f"op{i}") for i in range(count))
    )
    network.widths = list(widths)  # type: ignore[assignment]  # held by the network, as an attribute
    return ModelSpace(network)


def chain(count: int, options: int, seed: int) -> tuple[ModelSpace, Profiler]:
    """Layers whose costs hang on their own choice and on the widths before and after them."""
    widths = [ValueChoice([8, 16, 24], label=f"width{i}") for i in range(count // 3 + 2)]
    space = layers(count, options, *widths)
    generator = np.random.default_rng(seed)
    tables = [
        CostTable(
            (f"op{i}", f"width{i // 3}", f"width{i // 3 + 1}"), generator.uniform(0.05, 1, (options, 3, 3))
        )
        for i in range(count)
    ]
    return space, Profiler(Cost(space.options, 0.1, tables, "ms"))


def pairs(space: ModelSpace, neighbours: Iterable[tuple[str, str]], seed: int) -> Cost:
    """A random table for each pair of choices."""
    generator = np.random.default_rng(seed)
    sizes = {label: len(options) for label, options in space.options.items()}
    tables = [CostTable((a, b), generator.uniform(0, 1, (sizes[a], sizes[b]))) for a, b in neighbours]
    return Cost(space.options, 0.0, tables, "MAC")


def key(architecture: dict[str, object]) -> tuple[object, ...]:
    return tuple(architecture.values())


@pytest.mark.parametrize("quantile", [0.02, 0.3, 1.0])
def test_draws_are_uniform_over_the_canonical_architectures_in_range(quantile: float) -> None:
    space = ModelSpace(Nested())
    profiler = costs_of(space, 0)
    costs = {key(a): profiler.profile(a) for a in space.grid()}
    limit = float(np.quantile(list(costs.values()), quantile))
    inside = {found for found, cost in costs.items() if cost <= limit}
    sampler = Sampler(space, [RangeProfilerFilter(profiler, max=limit)])
    drawn = Counter(key(a) for a in sampler.draw_many(60 * len(inside), torch.Generator().manual_seed(1)))
    assert sampler.is_exact
    assert set(drawn) == inside
    assert chisquare(list(drawn.values())).pvalue > 1e-3
    assert sampler.size == pytest.approx(len(inside), rel=0.1)


def test_draws_in_the_cheapest_percent_of_a_hundred_thousand_networks_are_uniform() -> None:
    space = layers(5, 10)
    cost = pairs(space, itertools.pairwise(space.options), seed=5)
    rows = np.indices([10] * 5).reshape(5, -1).T
    costs = cost.of_many(rows)
    limit = float(np.quantile(costs, 0.01))
    inside = int((costs <= limit).sum())
    sampler = Sampler(space, [RangeProfilerFilter(Profiler(cost), max=limit)])
    drawn = Counter(key(a) for a in sampler.draw_many(50 * inside, torch.Generator().manual_seed(0)))
    assert len(drawn) == inside
    assert chisquare(list(drawn.values())).pvalue > 1e-3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.floats(0, 0.9), width=st.floats(0.02, 0.5))
def test_every_draw_is_canonical_and_in_range(seed: int, low: float, width: float) -> None:
    space = ModelSpace(Nested())
    profiler = costs_of(space, seed)
    costs = np.array([profiler.profile(a) for a in space.grid()])
    least, most = np.quantile(costs, [low, min(1.0, low + width)], method="nearest")
    found = RangeProfilerFilter(profiler, min=float(least), max=float(most))
    for architecture in Sampler(space, [found]).draw_many(20, torch.Generator().manual_seed(seed)):
        assert found.filter(architecture)
        assert space.canonical(architecture) == architecture


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_two_costs_at_once_are_kept_to_uniformly(seed: int) -> None:
    space = ModelSpace(Nested())
    fast, small = costs_of(space, seed), costs_of(space, seed + 1, "MAC")
    grid = list(space.grid())
    limits = [float(np.quantile([p.profile(a) for a in grid], 0.4)) for p in (fast, small)]
    filters = [RangeProfilerFilter(p, max=limit) for p, limit in zip((fast, small), limits, strict=True)]
    inside = {key(a) for a in grid if all(f.filter(a) for f in filters)}
    if not inside:
        with pytest.raises(ValueError, match="in all of these ranges"):
            Sampler(space, filters)
        return
    sampler = Sampler(space, filters)
    drawn = Counter(key(a) for a in sampler.draw_many(60 * len(inside), torch.Generator().manual_seed(0)))
    assert sampler.is_exact
    assert set(drawn) == inside
    assert len(inside) == 1 or chisquare(list(drawn.values())).pvalue > 1e-4


def test_a_range_of_one_architecture_is_found() -> None:
    space = ModelSpace(Nested())
    profiler = costs_of(space, 7)
    low, _ = profiler.cost.bounds()
    sampler = Sampler(space, [RangeProfilerFilter(profiler, max=low)])
    assert sampler.draw_many(5, torch.Generator()) == [space.canonical(profiler.cost.minimum())] * 5


def test_one_filter_stands_for_a_list_of_it_and_anything_else_is_refused() -> None:
    space = ModelSpace(Nested())
    found = RangeProfilerFilter(costs_of(space, 3), max=2.0)
    one, several = Sampler(space, found), Sampler(space, [found])
    assert one.draw(torch.Generator()) == several.draw(torch.Generator())
    with pytest.raises(TypeError, match="a filter is a RangeProfilerFilter or a list of them; got float"):
        Sampler(space, 2.0)  # type: ignore[arg-type]  # that is the point


def test_without_filters_the_whole_space_is_drawn() -> None:
    space = ModelSpace(Nested())
    drawn = Counter(key(a) for a in Sampler(space).draw_many(60 * space.size, torch.Generator()))
    assert len(drawn) == space.size == Sampler(space).size
    assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_what_is_drawn_depends_on_the_generator_alone() -> None:
    space, profiler = chain(8, 5, seed=0)
    low, high = profiler.cost.bounds()
    sampler = Sampler(space, [RangeProfilerFilter(profiler, max=low + 0.3 * (high - low))])
    first = [sampler.draw(torch.Generator().manual_seed(seed)) for seed in range(5)]
    sampler.draw_many(50, torch.Generator())
    assert [sampler.draw(torch.Generator().manual_seed(seed)) for seed in range(5)] == first


def test_a_thousand_draws_inside_a_tight_budget_of_a_huge_space_take_a_second() -> None:
    space, profiler = chain(18, 7, seed=0)
    assert space.size > 1e15
    low, high = profiler.cost.bounds()
    found = RangeProfilerFilter(profiler, max=low + 0.04 * (high - low))
    begun = time.process_time()
    sampler = Sampler(space, [found])
    drawn = sampler.draw_many(1000, torch.Generator())
    seconds = time.process_time() - begun
    assert sampler.is_exact
    assert 1e6 < sampler.size < 1e8
    assert all(map(found.filter, drawn))
    assert seconds < 1


def test_ranges_that_tables_cannot_serve_are_walked_without_leaving_them() -> None:
    space, profiler = chain(16, 6, seed=2)
    entangled = Profiler(pairs(space, itertools.combinations(space.options, 2), seed=0))
    generator = torch.Generator().manual_seed(0)
    some = [space.random(generator) for _ in range(200)]
    filters = [
        RangeProfilerFilter(p, max=float(np.quantile([p.profile(a) for a in some], 0.3)))
        for p in (profiler, entangled)
    ]
    sampler = Sampler(space, filters)
    assert not sampler.is_exact
    drawn = sampler.draw_many(5, torch.Generator())
    assert all(found.filter(a) for found in filters for a in drawn)
    assert len({key(a) for a in drawn}) == 5


def test_the_walk_is_uniform_over_what_it_connects() -> None:
    space = ModelSpace(Nested())
    profiler = costs_of(space, 4)
    limit = float(np.quantile([profiler.profile(a) for a in space.grid()], 0.1))
    inside = [a for a in space.grid() if profiler.profile(a) <= limit]
    walk = _Walk(space, [(profiler.cost, -math.inf, limit)], inside[0])
    drawn = Counter(tuple(row.tolist()) for row in walk.draw(15 * len(inside), torch.Generator()))
    assert len(drawn) == len(inside)
    assert chisquare(list(drawn.values())).pvalue > 1e-3
