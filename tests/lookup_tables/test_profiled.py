"""Parts timed inside a network: the dear one is dear, and together they take what the network takes."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lookup_tables import profiled
from lookup_tables.assembly import PartCall, Wiring, assembled
from lookup_tables.export import to_onnx
from lookup_tables.profiled import Node, _session, as_profiled, nodes_of, owners, profile
from lookup_tables.session import SessionSettings
from lookup_tables.worker import session_options
from tests.lookup_tables.test_assembly import operator


@pytest.fixture(scope="module")
def network() -> bytes:
    """A dear convolution, a cheap one, and a ReLU that is fused into the latter."""
    image = torch.empty(1, 32, 24, 24, device="meta")
    with torch.device("meta"):
        modules = {"dear": nn.Conv2d(32, 32, 5, padding=2), "cheap": nn.Conv2d(32, 32, 1), "relu": nn.ReLU()}
    parts = to_onnx({key: (module.eval(), (image,)) for key, module in modules.items()})
    calls = tuple(PartCall(key, (n,), (n + 1,)) for n, key in enumerate(modules))
    return assembled(Wiring((0,), calls, (3,)), parts)


def test_parts_are_timed_where_they_run(network: bytes) -> None:
    told: list[str] = []
    steps: list[tuple[int, int]] = []
    found = profile(
        {"a": network},
        SessionSettings(optimisation="extended"),
        progress=lambda *step: steps.append(step),
        on_result=lambda key, times: told.append(key),
    )
    assert told == list(found) == ["a"]
    assert steps[-1] == (1, 1)
    times = found["a"]
    assert times.keys() == {0, 1}  # the ReLU has no node of its own
    assert all(len(us) == profiled._SESSIONS for us in times.values())
    assert min(times[0]) > 3 * min(times[1]) > 0


def test_what_the_profiler_adds_to_each_node_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of 10, 20 and 70 us; the profiler adds 5 to each."""

    class Scripted:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Scripted:
            return self

        def __exit__(self, *_: object) -> None: ...

        def node_times(self, *_: object) -> tuple[dict[str, list[float]], list[float]]:
            nodes = {"p0.a": [15.0] * 9, "p0.b": [25.0] * 9, "p1.a": [75.0] * 8 + [900.0]}
            return nodes, [103.0, 100.0, 250.0]

    monkeypatch.setattr(profiled, "Worker", Scripted)
    monkeypatch.setattr(profiled.Path, "read_bytes", lambda path: b"")
    monkeypatch.setattr(profiled, "as_profiled", lambda nodes, ran: nodes)
    monkeypatch.setattr(profiled, "owners", lambda nodes: {"p0.a": 0, "p0.b": 0, "p1.a": 1})
    found = profile({"net": b""}, SessionSettings())
    assert found == {"net": {0: pytest.approx((30.0,) * 3), 1: pytest.approx((70.0,) * 3)}}


def test_session_that_is_disturbed_without_the_profiler_does_not_make_its_nodes_dear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes of 20 us, the profiler adds 5; the last network was disturbed while it went on without it."""
    wholes = {"0.onnx": 40.0, "1.onnx": 40.0, "2.onnx": 40.0, "3.onnx": 40.0, "4.onnx": 90.0}

    class Scripted:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Scripted:
            return self

        def __exit__(self, *_: object) -> None: ...

        def node_times(self, path: Path, *_: object) -> tuple[dict[str, list[float]], list[float]]:
            return {"p0.a": [25.0] * 30, "p1.a": [25.0] * 30}, [wholes[path.name]]

    monkeypatch.setattr(profiled, "Worker", Scripted)
    monkeypatch.setattr(profiled.Path, "read_bytes", lambda path: b"")
    monkeypatch.setattr(profiled, "as_profiled", lambda nodes, ran: nodes)
    monkeypatch.setattr(profiled, "owners", lambda nodes: {"p0.a": 0, "p1.a": 1})
    found = profile({str(n): b"" for n in range(5)}, SessionSettings())
    assert found["4"] == {0: pytest.approx((20.0,) * 3), 1: pytest.approx((20.0,) * 3)}


def test_disturbed_runs_say_nothing() -> None:
    session = _session({"p0.a": [10.0] * 15 + [400.0] * 15}, [12.0, 90.0], {"p0.a": 0})
    assert session.us == {0: 10.0}
    assert session.alone_us(0, session.added_us) == 12.0


def test_what_the_profiler_adds_is_that_of_the_session() -> None:
    """Of a session that is disturbed from end to end, all nodes are: the parts take no more for it."""
    belongs = {"p0.a": 0, "p1.a": 1, "p1.b": 1}
    calm = _session({"p0.a": [25.0] * 30, "p1.a": [15.0] * 30, "p1.b": [15.0] * 30}, [40.0], belongs)
    busy = _session({"p0.a": [27.0] * 30, "p1.a": [17.0] * 30, "p1.b": [17.0] * 30}, [40.0], belongs)
    for session in (calm, busy):
        assert [session.alone_us(part, session.added_us) for part in (0, 1)] == pytest.approx([20.0, 20.0])


def test_nodes_that_a_runtime_makes_of_a_function_have_an_owner(tmp_path: Path) -> None:
    """HardSwish behind a matrix product: ONNX Runtime runs it as two nodes without a name."""
    given = torch.empty(1, 8, device="meta")
    with torch.device("meta"):
        modules = {"linear": nn.Linear(8, 8), "act": nn.Hardswish(), "last": nn.Linear(8, 4)}
    parts = to_onnx({key: (module.eval(), (given,)) for key, module in modules.items()})
    calls = (PartCall("linear", (0,), (1,)), PartCall("act", (1,), (2,)), PartCall("last", (2,), (3,)))
    found = profile({"net": assembled(Wiring((0,), calls, (3,)), parts)}, SessionSettings())
    assert found["net"].keys() == {0, 1, 2}


def test_nodes_without_a_name_are_called_as_the_profiler_calls_them() -> None:
    nodes = [
        Node("p0.n0", "Gemm", ["x"], ["a"]),
        Node("", "HardSigmoid", ["a"], ["_s"]),
        Node("", "Mul", ["a", "_s"], ["p1.v0"]),
    ]
    named = as_profiled(nodes, ["p0.n0", "HardSigmoid_77", "Mul_78"])
    assert [node.name for node in named] == ["p0.n0", "HardSigmoid_77", "Mul_78"]
    assert owners(named) == {"p0.n0": 0, "HardSigmoid_77": 1, "Mul_78": 1}
    for ran in (["p0.n0", "Mul_78", "HardSigmoid_77"], ["p0.n0", "HardSigmoid_77"], ["p0.n0", "a", "b", "c"]):
        with pytest.raises(RuntimeError, match=r"its optimised model has .*another method"):
            as_profiled(nodes, ran)


def test_network_that_cannot_be_run_is_named() -> None:
    with pytest.raises(ValueError, match="cannot run network 'broken'"):
        profile({"broken": b"no model"}, SessionSettings())


@pytest.mark.parametrize("level", ["all", "extended"])
def test_every_node_of_the_optimised_network_has_the_owner_of_its_work(level: str, tmp_path: Path) -> None:
    """Convolution, addition of the input, pooling: fused, brought into another layout and back."""
    image = torch.empty(1, 16, 6, 6, device="meta")
    with torch.device("meta"):
        modules = {
            "conv": nn.Conv2d(16, 16, 3, padding=1),
            "relu": nn.ReLU(),
            "mean": nn.AdaptiveAvgPool2d(1),
        }
    parts = to_onnx({key: (module.eval(), (image,)) for key, module in modules.items()})
    parts["add"] = operator("Add", 2, (1, 16, 6, 6))
    calls = [PartCall("conv", (0,), (1,)), PartCall("add", (1, 0), (2,)), PartCall("relu", (2,), (3,)),
             PartCall("mean", (3,), (4,))]  # fmt: skip
    options = session_options(1, level)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(assembled(Wiring((0,), tuple(calls), (4,)), parts), options)
    optimised = onnx.load(tmp_path / "optimised.onnx")
    nodes = nodes_of((tmp_path / "optimised.onnx").read_bytes())
    assert [(n.name, n.op, [*n.inputs], [*n.outputs]) for n in nodes] == [
        (n.name, n.op_type, [*n.input], [*n.output]) for n in optimised.graph.node
    ]
    found = owners(nodes)
    assert found.keys() == {node.name for node in optimised.graph.node}
    by_kind = {node.op_type.removeprefix("Fused"): found[node.name] for node in optimised.graph.node}
    assert by_kind["Conv"] == 0  # also with the addition and the ReLU in it
    assert max(found.values()) == 3


def test_node_that_a_runtime_put_between_goes_to_its_maker_or_reader() -> None:
    nodes = [
        Node("in", "ReorderInput", ["input0"], ["token0"]),
        Node("p0.n0_nchwc", "Conv", ["token0"], ["token1"]),
        Node("out", "ReorderOutput", ["token1"], ["p0.y"]),
        Node("p1.n0", "Relu", ["p0.y"], ["p1.y"]),
        Node("last", "Relu", ["p1.y"], ["unnamed"]),
    ]
    assert owners(nodes) == {"in": 0, "p0.n0_nchwc": 0, "out": 0, "p1.n0": 1, "last": 1}
