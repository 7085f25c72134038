"""What a frozen network runs, part by part, is what its sites say; put together again it is the network."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
from torch import Tensor, nn

from hwnas import Cell, InputChoice, LayerChoice, ModelSpace
from hwnas.latency_table import networks_to_profile, subnet_source
from hwnas.nn import Conv2d
from hwnas.survey import on_meta
from hwnas.wiring import wired
from lookup_tables import EntrySource, to_onnx
from lookup_tables.assembly import assembled
from lookup_tables.export import _operators
from profilers import distinct_parts
from tests.hwnas.tiny_space import EXAMPLE, TinyNet


class Branches(nn.Module):
    """A cell, a chosen input, functions between modules, and an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2d(1, 4, 3, stride=4, padding=1)
        operations = {
            "conv": lambda *_: nn.Conv2d(4, 4, 3, padding=1),
            "pool": lambda *_: nn.AvgPool2d(3, 1, 1),
        }
        self.cell = Cell(operations, 2, 1, 1, label="cell")
        self.take = InputChoice(2, n_chosen=None, label="take")
        self.op = LayerChoice({"relu": nn.ReLU(inplace=True), "skip": nn.Identity()}, label="op")
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.head = nn.Linear(4 * 49, 10)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        cell = self.cell(stem)
        features = self.op(self.take([stem, cell[:, :4]]) * self.scale)
        left, right = features.chunk(2, dim=1)
        return self.head(torch.cat([right, left], 1).flatten(1))


@pytest.fixture(scope="module", params=[TinyNet, Branches])
def space(request):
    return ModelSpace(request.param())


def entries_of(space, sites):
    return {key: EntrySource(p.name, p.module, p.inputs) for key, p in distinct_parts(space, sites).items()}


def test_wiring_runs_the_parts_that_the_sites_name(space):
    sites = space.sites(EXAMPLE)
    parts = entries_of(space, sites)
    entries = set(parts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        architecture = space.random(generator)
        wiring = wired(on_meta(space.network), architecture, EXAMPLE, parts)
        source = subnet_source(space, sites, architecture, EXAMPLE)
        assert Counter(c.key for c in wiring.calls if c.key in entries) == Counter(source.keys)


def test_assembled_network_has_the_operators_of_the_exported_one(space):
    sites = space.sites(EXAMPLE)
    parts = entries_of(space, sites)
    architecture = space.random(torch.Generator().manual_seed(1))
    wiring = wired(on_meta(space.network), architecture, EXAMPLE, parts)
    source = subnet_source(space, sites, architecture, EXAMPLE)
    models = to_onnx({key: (parts[key].module, parts[key].inputs) for key in {c.key for c in wiring.live()}})
    whole = onnx.load_from_string(to_onnx({"whole": (source.module, source.inputs)})["whole"])
    kinds = [
        Counter(node.op_type for node in model.graph.node if node.op_type not in ("Reshape", "Identity"))
        for model in (onnx.load_from_string(assembled(wiring, models)), whole)
    ]
    assert kinds[0] == kinds[1]
    if isinstance(space.network, TinyNet):  # nothing that an exporter writes in two ways
        assert _operators(onnx.load_from_string(assembled(wiring, models))) == _operators(whole)


def test_every_entry_is_in_three_networks_that_were_not_set_apart(space):
    sites = space.sites(EXAMPLE)
    entries = entries_of(space, sites)
    apart = [space.default()]
    found = networks_to_profile(space, sites, entries, EXAMPLE, 0, apart)
    seen = Counter(key for wiring in found.wirings for key in {call.key for call in wiring.live()})
    assert min(seen[key] for key in entries) >= 3
    assert len(set(found.wirings)) == len(found.wirings)
    alone = wired(on_meta(space.network), apart[0], EXAMPLE, dict(entries))
    assert alone not in found.wirings
    assert seen.keys() <= found.parts.keys()
