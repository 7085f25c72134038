"""What a frozen network runs, part by part, is what its sites say; put together again it is the network."""

from __future__ import annotations

from collections import Counter
from functools import partial

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hwnas import Cell, InputChoice, LayerChoice, ModelSpace
from hwnas.latency_table import networks_to_profile, site_sources, subnet_source
from hwnas.nn import Conv2d
from hwnas.spaces import NASBench201
from hwnas.survey import on_meta
from hwnas.wiring import wired
from lookup_tables import SessionSettings, to_onnx
from lookup_tables.assembly import assembled
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


@pytest.fixture(scope="module", params=[TinyNet, Branches, partial(NASBench201.small, in_channels=1)])
def space(request):
    return ModelSpace(request.param())


def test_wiring_runs_the_parts_that_the_sites_name(space):
    sites = space.sites(EXAMPLE)
    parts = site_sources(space, sites)
    entries = set(parts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        architecture = space.random(generator)
        wiring = wired(on_meta(space.network), architecture, EXAMPLE, parts)
        source = subnet_source(space, sites, architecture, EXAMPLE)
        assert Counter(c.key for c in wiring.calls if c.key in entries) == Counter(source.keys)


def executed(model: bytes, path) -> Counter[str]:
    """How often the runtime executes each operator; reshaping is nothing to it."""
    options = SessionSettings(optimisation="extended").options()
    options.optimized_model_filepath = str(path / "model.onnx")
    onnxruntime.InferenceSession(model, options)
    nodes = onnx.load(path / "model.onnx").graph.node
    return Counter(node.op_type for node in nodes if node.op_type != "Reshape")


def test_runtime_executes_of_an_assembled_network_what_it_does_of_the_exported_one(space, tmp_path):
    sites = space.sites(EXAMPLE)
    parts = site_sources(space, sites)
    architecture = space.canonical(space.random(torch.Generator().manual_seed(1)))
    wiring = wired(on_meta(space.network), architecture, EXAMPLE, parts)
    source = subnet_source(space, sites, architecture, EXAMPLE)
    needed = {call.key for call in wiring.live()}
    models = to_onnx({key: (parts[key].module, parts[key].inputs) for key in needed})
    whole = to_onnx({"whole": (source.module, source.inputs)})["whole"]
    assert executed(assembled(wiring, models), tmp_path) == executed(whole, tmp_path)


def test_dead_edges_of_a_cell_are_not_in_its_wiring():
    space = ModelSpace(NASBench201.small(in_channels=1))
    dead = {**dict.fromkeys(space.options, "none"), "0-1": "nor_conv_3x3"}
    live = {**dead, "1-3": "avg_pool_3x3"}
    parts = site_sources(space, space.sites(EXAMPLE))
    names = [
        Counter(parts[call.key].name for call in wired(on_meta(space.network), a, EXAMPLE, parts).live())
        for a in (dead, live)
    ]
    assert not any(name.startswith("AvgPool2d") for name in names[0])
    pools = {name: count for name, count in names[1].items() if name.startswith("AvgPool2d")}
    assert len(pools) == 3  # one a stage
    assert names[1].total() == names[0].total() + 3  # a convolution and a pooling in place of the zeros


def test_every_entry_is_in_three_networks_that_were_not_set_apart(space):
    sites = space.sites(EXAMPLE)
    entries = site_sources(space, sites)
    apart = [space.default()]
    found = networks_to_profile(space, sites, entries, EXAMPLE, 0, apart)
    seen = Counter(key for wiring in found.wirings for key in {call.key for call in wiring.live()})
    assert min(seen[key] for key in entries) >= 3
    assert len(set(found.wirings)) == len(found.wirings)
    alone = wired(on_meta(space.network), apart[0], EXAMPLE, dict(entries))
    assert alone not in found.wirings
    assert seen.keys() <= found.parts.keys()
