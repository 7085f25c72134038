"""The exported file computes what torch computes, and carries its facts and nothing of this machine."""

from __future__ import annotations

import math
import os

import onnx
import pytest
import torch
from torch import nn

from hwnas import ModelSpace
from hwnas.export import accuracy, export_onnx, load_session, parity, read_metadata, run, write_metadata
from tests.hwnas.tiny_space import EXAMPLE, TinyNet


@pytest.fixture(scope="module")
def subnet():
    torch.manual_seed(0)
    space = ModelSpace(TinyNet())
    network = space.freeze({**space.default(), "layer1": "k5"})
    network(torch.randn(64, 1, 28, 28))  # statistics that are not 0 and 1
    return network.eval()


@pytest.fixture(scope="module")
def fixed(subnet, tmp_path_factory):
    return export_onnx(subnet, EXAMPLE, tmp_path_factory.mktemp("fixed") / "subnet.onnx", metadata={"a": 1})


def test_file_equals_torch_with_a_fixed_and_with_an_open_batch(subnet, fixed, tmp_path):
    images = torch.randn(5, 1, 28, 28)
    assert parity(subnet, fixed, [images]) < 1e-4
    dynamic = export_onnx(subnet, EXAMPLE, tmp_path / "dynamic.onnx", dynamic_batch=True)
    assert parity(subnet, dynamic, [images, images[:1]]) < 1e-4
    assert load_session(dynamic).get_inputs()[0].shape[0] != 1


def test_outputs_that_are_no_numbers_are_not_passed_over(subnet, fixed):
    """In whichever batch they are."""
    images = torch.randn(1, 1, 28, 28)
    broken = torch.full_like(images, torch.nan)
    for batches in ([images, broken], [broken, images]):
        assert math.isnan(parity(subnet, fixed, batches))
    with pytest.raises(ValueError, match="at least one batch"):
        parity(subnet, fixed, [])


def test_fixed_batch_takes_any_number_of_inputs_in_parts(subnet, tmp_path):
    path = export_onnx(subnet, torch.zeros(4, 1, 28, 28), tmp_path / "four.onnx")
    images = torch.randn(6, 1, 28, 28)
    with torch.no_grad():
        expected = subnet(images).numpy()
    assert abs(run(load_session(path), images) - expected).max() < 1e-4


def test_accuracy_counts_right_answers(subnet, fixed):
    images = torch.randn(6, 1, 28, 28)
    with torch.no_grad():
        answers = subnet(images).argmax(1)
    wrong = (answers + torch.tensor([0, 0, 0, 1, 1, 1])) % 10
    assert accuracy(fixed, [(images, wrong)]) == 0.5
    with pytest.raises(ValueError, match="at least one batch"):
        accuracy(fixed, [])


def test_file_holds_no_path_no_trace_and_no_name_of_ours(fixed):
    content = fixed.read_bytes()
    for word in (b"tiny_space", b"/work", b"site-packages", b"stack_trace", os.getcwd().encode()):
        assert word not in content
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(str(fixed)).graph.node)


def test_facts_survive_in_the_file(fixed):
    write_metadata(fixed, {"b": [1, {"c": "d"}]})
    assert read_metadata(fixed) == {"a": 1, "b": [1, {"c": "d"}]}


def test_killed_export_leaves_the_old_file(subnet, tmp_path, monkeypatch):
    path = tmp_path / "subnet.onnx"
    path.write_bytes(b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(subnet, EXAMPLE, path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["subnet.onnx"]


def test_batch_baked_into_a_reshape_is_refused(tmp_path):
    class Baked(nn.Module):
        def forward(self, images):
            return images.reshape(2, -1)

    with pytest.raises(ValueError, match=r"Baked"):
        export_onnx(Baked(), EXAMPLE, tmp_path / "baked.onnx", dynamic_batch=True)


@pytest.mark.parametrize("read", [read_metadata, load_session])
def test_truncated_foreign_and_absent_files_are_named(fixed, tmp_path, read):
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(fixed.read_bytes()[:300])
    foreign = tmp_path / "foreign.onnx"
    foreign.write_text("no model")
    for path in (truncated, foreign, tmp_path / "absent.onnx"):
        with pytest.raises(ValueError, match=path.name):
            read(path)
