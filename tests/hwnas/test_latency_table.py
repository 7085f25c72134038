"""A table is measured on every part that costs something, and calibrated from end to end of the space."""

from __future__ import annotations

import pytest
import torch

from hwnas import ModelSpace
from hwnas.latency_table import build_latency_table, spread_architectures, subnet_source
from lookup_tables import SessionSettings
from profilers import FlopsProfiler, distinct_parts
from tests.hwnas.tiny_space import EXAMPLE, TinyNet


@pytest.fixture(scope="module")
def space():
    return ModelSpace(TinyNet())


@pytest.fixture(scope="module")
def parts(space):
    return distinct_parts(space, space.sites(EXAMPLE))


def test_every_network_is_made_of_distinct_parts(space, parts):
    sites = space.sites(EXAMPLE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        source = subnet_source(space, sites, space.random(generator), EXAMPLE)
        assert source.keys
        assert set(source.keys) <= set(parts)


def test_equal_parts_are_listed_once_and_free_ones_not_at_all(parts):
    assert not any(part.is_free for part in parts.values())
    # three equal layers: 3 kernels at 2 widths each, counted once
    layers = {key for key, part in parts.items() if "k" in part.name or "layers" in part.name}
    assert len(parts) < 3 * 3 * 2 + 2 * 2 + 1
    assert len(layers) <= len(parts)


def test_source_is_the_network_of_its_architecture(space):
    architecture = {**space.default(), "layer0": "skip", "layer1": "k5"}
    source = subnet_source(space, space.sites(EXAMPLE), architecture, EXAMPLE)
    frozen = space.freeze(architecture)
    expected = {name: tensor.shape for name, tensor in frozen.state_dict().items()}
    assert {name: tensor.shape for name, tensor in source.module.state_dict().items()} == expected
    assert "layer1=k5" in source.name


def test_spread_holds_both_ends_and_is_repeatable(space):
    cost = FlopsProfiler(space, EXAMPLE).cost
    found = spread_architectures(space, EXAMPLE, 12, seed=0)
    assert found == spread_architectures(space, EXAMPLE, 12, seed=0)
    assert len(found) == 12 == len({tuple(sorted(a.items())) for a in found})
    costs = [cost.of(architecture) for architecture in found]
    assert (min(costs), max(costs)) == pytest.approx(cost.bounds())


def test_spread_of_a_small_space_is_at_most_the_whole_space(space):
    assert len(spread_architectures(space, EXAMPLE, 10 * space.size, seed=0)) <= space.size


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_table_of_this_machine_has_every_part(space, parts, tmp_path):
    path = tmp_path / "table.json"
    table = build_latency_table(space, EXAMPLE, path, name="tiny", settings=SessionSettings(), subnets=8)
    assert set(table.entries) >= set(parts)
    assert path.exists()
