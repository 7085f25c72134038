from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from profilers.profile import build_cost


def weights(module: nn.Module, inputs: Sequence[Tensor]) -> float:
    return sum(parameter.numel() for parameter in module.parameters())


def test_cost_equals_the_meter_on_the_parts_of_every_architecture(space: Any) -> None:
    sites = space.sites(torch.zeros(1, 1, 6, 6))
    cost = build_cost(space, sites, weights, "parameter", constant=7.0)
    for architecture in space.every_architecture():
        parts = [site.part(architecture) for site in sites]
        total = sum(weights(part.module, part.inputs) for part in parts if part is not None)
        assert cost.of(architecture) == 7 + total


def test_every_distinct_part_is_measured_once(space: Any) -> None:
    seen: Counter[str] = Counter()

    def meter(module: nn.Module, inputs: Sequence[Tensor]) -> float:
        seen[repr(module)] += 1
        return 1.0

    build_cost(space, space.sites(torch.zeros(1, 1, 6, 6)), meter, "ms")
    assert max(seen.values()) == 1
    assert len(seen) == 2 + 4 + 4  # stems, layers, heads; skips are free


def test_tables_over_some_of_anothers_choices_are_added_into_it(space: Any) -> None:
    cost = build_cost(space, space.sites(torch.zeros(1, 1, 6, 6)), weights, "parameter")
    assert [table.labels for table in cost.tables] == [("op", "width", "depth"), ("width", "out")]


def test_a_site_of_too_many_combinations_is_named(space: Any) -> None:
    site = space.sites(torch.zeros(1, 1, 6, 6))[0]
    site.labels = tuple(f"width{i}" for i in range(20))
    space.options = dict.fromkeys(site.labels, (2, 4))
    with pytest.raises(ValueError, match=r"site 'stem' depends on \('width0'.*1048576 combinations"):
        build_cost(space, [site], weights, "parameter")
