"""A network made of exported parts is the exported network."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lookup_tables.assembly import PartCall, Wiring, assembled
from lookup_tables.worker import session_options


def operator(kind: str, inputs: int = 1, shape: tuple[int, ...] = (1, 4), opset: int = 20) -> bytes:
    names = [f"x{n}" for n in range(inputs)]
    graph = helper.make_graph(
        [helper.make_node(kind, names, ["y"])],
        kind,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    opsets = [helper.make_opsetid("", opset)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


PARTS = {"neg": operator("Neg"), "exp": operator("Exp"), "add": operator("Add", 2)}
# exp(-x) + x, and a part that feeds nothing
WIRING = Wiring(
    (0,),
    (PartCall("neg", (0,), (1,)), PartCall("exp", (0,), (9,)), PartCall("exp", (1,), (2,)),
     PartCall("add", (2, 0), (3,))),
    (3,),
)  # fmt: skip


def run(model: bytes, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, session_options(1, "all"))
    return session.run(None, {given.name: x for given, x in zip(session.get_inputs(), inputs, strict=True)})


def test_assembled_network_computes_what_its_wiring_says() -> None:
    x = np.array([[0.0, 1.0, -1.0, 2.0]], dtype=np.float32)
    np.testing.assert_allclose(run(assembled(WIRING, PARTS), x)[0], np.exp(-x) + x, rtol=1e-6)


def test_dead_call_is_left_out_and_names_count_the_others() -> None:
    assert [call.key for call in WIRING.live()] == ["neg", "exp", "add"]
    nodes = onnx.load_from_string(assembled(WIRING, PARTS)).graph.node
    assert [(node.op_type, node.name) for node in nodes] == [
        ("Neg", "p0.n0"), ("Exp", "p1.n0"), ("Add", "p2.n0"),
    ]  # fmt: skip


def test_tensor_that_nobody_makes_is_a_constant() -> None:
    model = onnx.load_from_string(assembled(Wiring((0,), (PartCall("add", (0, 7), (1,)),), (1,)), PARTS))
    assert [tensor.name for tensor in model.graph.initializer] == ["constant7"]
    assert len(model.graph.input) == 1


@pytest.mark.parametrize(
    ("wiring", "parts", "says"),
    [
        (Wiring((0,), (PartCall("add", (0,), (1,)),), (1,)), PARTS, "called with 1 tensors.*2 inputs"),
        (Wiring((0,), WIRING.calls, (5,)), PARTS, r"returns \[5\]"),
        (WIRING, {**PARTS, "exp": operator("Exp", opset=18)}, "exported alike"),
    ],
)
def test_what_does_not_fit_together_is_refused(wiring: Wiring, parts: dict[str, bytes], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        assembled(wiring, parts)
