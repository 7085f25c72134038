"""A search may choose the precision with the operator, and its answer is a file of just these precisions."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hwnas import LayerChoice, ModelSpace, ValueChoice
from hwnas.cli import app
from hwnas.export import read_metadata
from hwnas.precision import int8_modules, measure_borders, precision_labels
from hwnas.trials import RegularizedEvolution, search
from lookup_tables import Entry, Measurement, SessionSettings
from lookup_tables.quantise import quantised_nodes
from profilers import MixedPrecisionProfiler, RangeProfilerFilter, distinct_parts
from tests.hwnas.tiny_space import EXAMPLE, TinyNet, tiny_table

PRECISIONS = ["fp32", "int8"]
MODULES = ("layers.0", "layers.1", "layers.2", "head")


def mixed_space(num_classes=10, in_channels=1):
    settings = {"precision": {name: ValueChoice(PRECISIONS) for name in MODULES}}
    return ModelSpace(TinyNet(num_classes, in_channels), settings=settings)


def tables():
    """In INT8 the 5x5 convolutions take a tenth, all others three times as long."""
    fp32 = tiny_table()
    space = ModelSpace(TinyNet())
    large = {
        key
        for key, part in distinct_parts(space, space.sites(EXAMPLE)).items()
        if any(getattr(module, "kernel_size", None) == (5, 5) for module in part.module.modules())
    }
    entries = {
        key: dataclasses.replace(entry, p10_us=entry.p10_us * (0.1 if key in large else 3.0))
        for key, entry in fp32.entries.items()
    }
    int8 = dataclasses.replace(fp32, entries=entries, settings=SessionSettings(precision="int8"))
    return {"fp32": fp32, "int8": int8}


def test_choices_stand_beside_the_network_by_the_names_of_its_modules():
    space = mixed_space()
    assert precision_labels(space) == {name: f"precision.{name}" for name in MODULES}
    architecture = {**space.default(), "precision.layers.1": "int8"}
    assert int8_modules(space, architecture) == ["layers.1"]
    whole = ModelSpace(TinyNet(), settings={"precision": ValueChoice(PRECISIONS)})
    assert int8_modules(whole, {**whole.default(), "precision": "int8"}) == [""]
    assert int8_modules(ModelSpace(TinyNet()), ModelSpace(TinyNet()).default()) == []


def test_precision_of_what_does_not_run_is_no_decision():
    space = mixed_space()
    # width, then three layers of three convolutions in two precisions or a skip, and the head's precision
    assert space.size == 2 * (3 * 2 + 1) ** 3 * 2 == len([*space.grid()])
    skips = {**space.default(), "layer1": "skip", "precision.layers.1": "int8"}
    assert "precision.layers.1" not in space.active(skips)
    assert space.canonical(skips)["precision.layers.1"] == "fp32"
    assert int8_modules(space, skips) == []


def test_a_skip_costs_no_borders_between_its_neighbours():
    space, given = mixed_space(), tables()
    latency = MixedPrecisionProfiler(space, EXAMPLE, given, precision_labels(space), border_us=100.0)
    around = {**space.default(), "precision.layers.0": "int8", "precision.layers.2": "int8"}
    through = latency.profile({**around, "layer1": "k1", "precision.layers.1": "int8"})
    skipped = latency.profile({**around, "layer1": "skip", "precision.layers.1": "fp32"})
    fp32_between = latency.profile({**around, "layer1": "k1", "precision.layers.1": "fp32"})
    assert skipped < through < fp32_between - 0.15  # two borders more


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"layers.9": ValueChoice(PRECISIONS)}, "it has no layers.9, it has .*layers.0"),
        ({"head": ValueChoice(["fp16"])}, "the precision of 'head' must be a ValueChoice among fp32, int8"),
        ({}, "no choice of a precision"),
    ],
)
def test_wrong_settings_are_told(setting, text):
    with pytest.raises(ValueError, match=text):
        precision_labels(ModelSpace(TinyNet(), settings={"precision": setting}))


def test_answer_of_a_search_is_exported_with_just_its_modules_quantised(tmp_path):
    space = mixed_space()
    latency = MixedPrecisionProfiler(space, EXAMPLE, tables(), precision_labels(space), border_us=0.5)
    low, high = latency.cost.bounds()
    found = search(
        space,
        # The most 5x5 convolutions: within a tight budget they fit in INT8 alone.
        lambda architecture: {"kernels": float(list(architecture.values()).count("k5"))},
        RegularizedEvolution(population_size=20, sample_size=10),
        {"kernels": "max"},
        trials=60,
        filters=[RangeProfilerFilter(latency, max=low + 0.1 * (high - low))],
    )
    answer = dict(found.best.architecture)
    chosen = int8_modules(space, answer)
    assert found.best.metrics["kernels"] > 0
    assert all(answer[f"layer{name[-1]}"] in ("k5", "skip") for name in chosen if name != "head")
    assert any(answer[f"layer{name[-1]}"] == "k5" for name in chosen if name != "head")
    (tmp_path / "architecture.json").write_text(json.dumps(answer))
    torch.save(space.freeze(answer).state_dict(), tmp_path / "last.ckpt")
    arguments = [tmp_path / "architecture.json", tmp_path / "last.ckpt", "--out", tmp_path / "net.onnx"]
    given = ["--space", "tests.hwnas.test_precision:mixed_space", "--data", "digits"]
    result = CliRunner().invoke(app, ["export", *map(str, arguments), *given])
    assert result.exit_code == 0, result.output
    nodes = quantised_nodes((tmp_path / "net.onnx").read_bytes())
    inside = {name for name in MODULES for node in nodes if node.startswith(f"{name}.")}
    runs = [name for name in chosen if name == "head" or answer[f"layer{name[-1]}"] != "skip"]
    assert inside == set(runs)
    assert all(node.startswith(tuple(f"{name}." for name in chosen)) for node in nodes)
    assert read_metadata(tmp_path / "net.onnx")["architecture"] == answer


class Small(nn.Module):
    """Two layers, cheap to export."""

    def __init__(self):
        super().__init__()
        self.first = LayerChoice([nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3, groups=1, bias=False)], label="op")
        self.last = nn.Conv2d(2, 2, 3)

    def forward(self, images):
        return self.last(self.first(images))


def test_cost_of_a_border_is_found_on_mixed_networks(monkeypatch):
    """A machine on which a network takes what its sites say, and 7 us a border."""
    space = ModelSpace(Small(), settings={"precision": {"first": ValueChoice(PRECISIONS)}})
    example = torch.zeros(1, 1, 8, 8)
    base = tiny_table()
    entries = {
        key: Entry(key, part.name, 10.0, 10.0, 10.0, 8)
        for key, part in distinct_parts(space, space.sites(example)).items()
    }
    fp32 = dataclasses.replace(base, entries=entries)
    given = {
        "fp32": fp32,
        "int8": dataclasses.replace(fp32, settings=SessionSettings(precision="int8")),
    }
    monkeypatch.setattr("hwnas.precision.export_onnx", lambda network, example, path: write(path))
    monkeypatch.setattr("hwnas.precision.nodes_in", lambda graph, modules: modules)
    monkeypatch.setattr("hwnas.precision.quantise_untrained", lambda model, nodes: repr(nodes).encode())

    def write(path):
        graph = onnx.helper.make_graph([], "empty", [], [])
        onnx.save(onnx.helper.make_model(graph), path)
        return path

    def machine(models, settings, **_):
        us = {name: 20.0 + 7.0 * (b"first" in model) for name, model in models.items()}
        return {name: Measurement(number, number, number, 8) for name, number in us.items()}

    border_us, accuracy = measure_borders(space, example, given, networks=6, measurer=machine)
    assert border_us == pytest.approx(7.0)
    assert accuracy.mape_percent == pytest.approx(0.0, abs=1e-9)
    assert np.isfinite(accuracy.spearman)
    with pytest.raises(ValueError, match="at least 3 networks, got 2"):
        measure_borders(space, example, given, networks=2, measurer=machine)
