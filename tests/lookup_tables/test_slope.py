"""The slope of a chain is the part alone: what its session costs cancels."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lookup_tables.export import to_onnx
from lookup_tables.session import SessionSettings
from lookup_tables.slope import COPIES, chains
from tests.lookup_tables.test_assembly import operator


def optimised(model: bytes, path) -> Counter[str]:
    """How often each operator is run."""
    options = SessionSettings(optimisation="extended").options()
    options.optimized_model_filepath = str(path / "model.onnx")
    session = onnxruntime.InferenceSession(model, options)
    inputs = {given.name: torch.randn(given.shape).numpy() for given in session.get_inputs()}
    session.run(None, inputs)
    return Counter(node.op_type for node in onnx.load(path / "model.onnx").graph.node)


def test_part_that_keeps_its_shape_is_run_in_a_row(tmp_path) -> None:
    one, several = (onnx.load_from_string(model).graph for model in chains(operator("Add", 2)))
    assert (len(one.node), len(several.node)) == (1, COPIES)
    assert len(several.input) == len(one.input) == 2
    for before, after in zip(several.node, several.node[1:], strict=False):
        assert after.input[0] == before.output[0]


@pytest.mark.parametrize(
    "module", [nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, 2), nn.Flatten()], ids=["pool", "conv", "flatten"]
)
def test_of_others_every_copy_runs_and_all_else_cancels(module: nn.Module, tmp_path) -> None:
    image = torch.empty(1, 4, 8, 8, device="meta")
    part = to_onnx({"part": (module.to("meta").eval(), (image,))})["part"]
    counts = [optimised(model, tmp_path) for model in chains(part)]
    models = [onnx.load_from_string(model).graph for model in chains(part)]
    (kind,) = {node.op_type for node in onnx.load_from_string(part).graph.node}
    added = {other: n for other in counts[1] if (n := counts[1][other] - counts[0][other])}
    assert added == {kind: COPIES - 1}
    assert counts[0]["Slice"] == COPIES
    assert len({len(model.input) for model in models}) == len({len(model.output) for model in models}) == 1


def test_part_with_two_outputs_has_both_read(tmp_path) -> None:
    class Split(nn.Module):
        def forward(self, x):
            return x[:, :2] * 2, x[:, 2:] + 1

    part = to_onnx({"part": (Split().eval(), (torch.empty(1, 4, device="meta"),))})["part"]
    one, several = (optimised(model, tmp_path) for model in chains(part))
    assert several["Mul"] - one["Mul"] == several["Add"] - one["Add"] == COPIES - 1
