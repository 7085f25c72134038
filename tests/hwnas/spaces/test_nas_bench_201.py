from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hwnas import ModelSpace
from hwnas.spaces import NASBench201
from hwnas.spaces.nas_bench_201 import EDGES, OPERATIONS
from profilers import FlopsProfiler, ParamsProfiler, count_macs
from tests.contracts.space import SpaceContract

CONVOLUTIONS = (
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
)


class TestNASBench201(SpaceContract):
    space = NASBench201


def test_any_cell_names_a_network_and_comes_back() -> None:
    for names in itertools.islice(itertools.product(OPERATIONS, repeat=6), 0, None, 97):
        architecture = {f"{i}-{j}": name for (i, j), name in zip(EDGES, names, strict=True)}
        assert NASBench201.architecture_of(NASBench201.cell_of(architecture)) == architecture
    network = NASBench201.from_published(CONVOLUTIONS, num_classes=100)
    # With 10 classes: 7,783,040 + 6 * 35,389,440 MACs, 73,306 + 6 * 243,040 parameters.
    assert count_macs(network, [torch.empty(1, 3, 32, 32)]).headline == 220_119_680 + 90 * 64
    assert sum(p.numel() for p in network.parameters()) == 1_531_546 + 90 * 65


@pytest.mark.parametrize(
    "cell", ["|none~0|", CONVOLUTIONS[:-1], CONVOLUTIONS.replace("3x3~2", "5x5~2"), "|~|"]
)
def test_what_is_no_cell_is_refused(cell: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {cell!r}")):
        NASBench201.from_published(cell)


def executed(subnet: nn.Module, images: Tensor, folder: Path) -> tuple[float, float]:
    """What ONNX Runtime runs, by its own profile.

    Returns:
        Multiply-adds of the convolutions and linear layers, and elements that average pooling wrote.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that takes a thirtieth of the time is deprecated
        torch.onnx.export(subnet, (images,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.intra_op_num_threads = 1
    # One level below all: the layout of the last one pads channels.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: images.numpy()})
    profile = Path(session.end_profiling())
    total = pooled = 0
    for event in json.loads(profile.read_text()):
        facts = event.get("args", {})
        if not event["name"].endswith("_kernel_time"):
            continue
        if facts["op_name"] == "AveragePool":
            pooled += math.prod(*facts["output_type_shape"][0].values())
        if facts["op_name"] in ("Conv", "FusedConv", "Gemm"):
            given, *others = (next(iter(shape.values())) for shape in facts["input_type_shape"])
            (output,) = (next(iter(shape.values())) for shape in facts["output_type_shape"])
            # A linear layer's weight is packed beforehand, and not among what is given.
            is_linear = facts["op_name"] == "Gemm"
            total += math.prod((*given, output[1]) if is_linear else (*others[0], *output[2:]))
    profile.unlink()
    return total, pooled


CELLS = int(os.environ.get("CELLS", "30"))  # CELLS=200 pytest -k live_edges: 20 CPU seconds


@pytest.mark.slow
def test_live_edges_are_what_onnx_runtime_executes(tmp_path: Path) -> None:
    space = ModelSpace(NASBench201(num_classes=4, in_channels=1, channels=4, cells=1))
    images = torch.randn(1, 1, 8, 8)
    macs = FlopsProfiler(space, images)
    generator = torch.Generator().manual_seed(0)
    live, shared = set(), set()
    for _ in range(CELLS):
        architecture = space.random(generator)
        subnet = space.freeze(architecture).eval()
        found = macs.detail(architecture)
        # Pooled is also where a stage ends: the whole image, and each image before the two reductions.
        pooling = sum(count for name, count in found.detail.items() if name.startswith("avg_pool"))
        assert executed(subnet, images, tmp_path) == (found.headline, pooling), architecture
        cell = subnet.layers[0]
        live.add(len(cell.edges) - sum(name != "none" for name in architecture.values()))
        shared.add(len(cell.edges) - len(cell.operations))
    assert {0, -1, -2} <= live  # cells with dead edges are among them
    assert {0, 1} <= shared  # and cells that pool one tensor twice


def test_what_an_edge_would_compute_again_is_computed_once() -> None:
    """Nodes 1 and 2 are what node 0 is, pooled; node 3 sums the two, and its input pooled."""
    space = ModelSpace(NASBench201(num_classes=4, in_channels=1, channels=4, cells=1))
    architecture = {
        "0-1": "avg_pool_3x3",
        "0-2": "avg_pool_3x3",
        "1-2": "none",
        "0-3": "avg_pool_3x3",
        "1-3": "skip_connect",
        "2-3": "avg_pool_3x3",
    }
    sites = [
        site.name
        for site in space.sites(torch.empty(1, 1, 8, 8))
        if site.name.startswith("layers.0.") and (part := site.part(architecture)) and not part.is_free
    ]
    pools = [name for name in sites if "pool" in name]
    assert pools == ["layers.0.operations.0-1.avg_pool_3x3", "layers.0.operations.2-3.avg_pool_3x3"]
    assert len(sites) == len(pools) + 2  # two sums
    images = torch.randn(2, 1, 8, 8)
    space.eval()
    with space.running(space.gates_of(architecture)):
        expected = space(images)
    assert torch.equal(space.freeze(architecture)(images), expected)


def test_all_cells_are_counted_in_one_call() -> None:
    """The extremes, and how many cells cost what the base costs, are those of the benchmark's own rule."""
    space = ModelSpace(NASBench201())
    macs, params = FlopsProfiler(space, torch.empty(1, 3, 32, 32)).cost, ParamsProfiler(space).cost
    every = np.array(list(itertools.product(range(5), repeat=6)))
    assert list(space.options) == [f"{i}-{j}" for i, j in EDGES]
    names = np.array(OPERATIONS)[every]
    found_macs, found_params = macs.of_many(every), params.of_many(every)
    assert (found_macs.min(), found_macs.max()) == (7_783_040, 220_119_680)
    assert (found_params.min(), found_params.max()) == (73_306, 1_531_546)
    # Where every operation is there, every edge is live: six independent terms.
    is_full = (names != "none").all(axis=1)
    threes, ones = (names == "nor_conv_3x3").sum(axis=1), (names == "nor_conv_1x1").sum(axis=1)
    expected = 7_783_040 + 35_389_440 * threes + 3_932_160 * ones
    assert np.array_equal(found_macs[is_full], expected[is_full])
    assert (found_macs <= expected).all()
    assert np.array_equal(found_params[is_full], (73_306 + 243_040 * threes + 28_000 * ones)[is_full])
