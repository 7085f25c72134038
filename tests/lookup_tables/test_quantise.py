import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from lookup_tables import sources
from lookup_tables.export import to_onnx
from lookup_tables.quantise import quantise, quantise_untrained, quantised_nodes
from lookup_tables.session import SessionSettings
from lookup_tables.sources import EntrySource


@pytest.fixture(scope="module")
def model() -> bytes:
    """Two convolutions with ReLU and a residual addition."""
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["v0", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w2", "b2"], ["c2"], "conv2"),
        helper.make_node("Add", ["v0", "c2"], ["sum"], "add"),
    ]
    shapes = {"w1": (8, 8, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1), "b2": (8,)}
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32) / 5, name)
        for name, shape in shapes.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8, 6, 6]) for name in ("v0", "sum")
    ]
    graph = helper.make_graph(nodes, "residual", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(made, {"fact": "kept"})
    return bytes(made.SerializeToString())


def images(count: int = 4) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [{"v0": generator.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(count)]


def outputs(model: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def test_quantised_model_computes_nearly_the_same_in_8_bits_and_keeps_its_facts(model: bytes) -> None:
    made = quantise(model, images())
    exact, rough = outputs(model, images()[0]), outputs(made, images()[0])
    assert 0 < np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()
    assert {tensor.data_type for tensor in onnx.load_from_string(made).graph.initializer} >= {
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT32,
    }
    assert [(fact.key, fact.value) for fact in onnx.load_from_string(made).metadata_props] == [
        ("fact", "kept")
    ]


def test_only_the_nodes_that_were_named_are_quantised(model: bytes) -> None:
    assert quantised_nodes(quantise(model, images())) == {"conv1", "conv2", "add"}  # ReLU is within a range
    assert quantised_nodes(quantise(model, images(), nodes=["conv2"])) == {"conv2"}
    assert quantise(model, images(), nodes=[]) == model
    with pytest.raises(ValueError, match="no node nowhere"):
        quantise(model, images(), nodes=["nowhere"])


def test_range_is_that_of_the_batches(model: bytes) -> None:
    narrow = [{"v0": image["v0"] * 0.01} for image in images()]
    wide = outputs(model, images()[0])
    clipped = np.abs(outputs(quantise(model, narrow), images()[0]) - wide).max()
    assert clipped > 5 * np.abs(outputs(quantise(model, images()), images()[0]) - wide).max()


def test_quantisation_needs_a_batch_and_says_nothing_of_its_own(
    model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        quantise(model, [])
    with caplog.at_level(logging.WARNING):
        assert quantise_untrained(model) == quantise_untrained(model)
    assert caplog.records == []


def test_batchnorm_that_stands_alone_is_quantised_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    norm = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).eval()
    image = torch.empty(1, 3, 4, 4, device="meta")
    file = to_onnx({"norm": (norm.to("meta"), (image,))})["norm"]
    assert "BatchNormalization" in {node.op_type for node in onnx.load_from_string(file).graph.node}
    handlers = [*logging.getLogger().handlers]
    with caplog.at_level(logging.WARNING):
        quantise_untrained(file)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert logging.getLogger().handlers == handlers


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    models: list[bytes] = []
    monkeypatch.setattr(sources, "to_onnx", lambda modules, progress: dict.fromkeys(modules, b"fp32"))
    monkeypatch.setattr(sources, "quantise_untrained", lambda model: models.append(model) or b"int8")
    return models


def test_tables_in_int8_measure_quantised_models(quantised: list[bytes]) -> None:
    given = {"conv": EntrySource("conv", nn.Conv2d(1, 1, 1, device="meta"), ())}
    for precision, expected in (("fp32", b"fp32"), ("int8", b"int8")):
        settings = SessionSettings(precision=precision)  # type: ignore[arg-type]  # both are
        assert sources.exported(given, settings, "", lambda *step: None) == {"conv": expected}
    assert quantised == [b"fp32"]
