"""Parts timed inside a network: the dear one is dear, and together they take what the network takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lookup_tables import profiled
from lookup_tables.assembly import PartCall, Wiring, assembled
from lookup_tables.export import to_onnx
from lookup_tables.profiled import _session, profile
from lookup_tables.session import SessionSettings


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
    monkeypatch.setattr(profiled.onnx, "load", lambda path: None)
    monkeypatch.setattr(profiled, "owners", lambda model: {"p0.a": 0, "p0.b": 0, "p1.a": 1})
    found = profile({"net": b""}, SessionSettings())
    assert found == {"net": {0: pytest.approx((30.0,) * 3), 1: pytest.approx((70.0,) * 3)}}


def test_disturbed_runs_say_nothing() -> None:
    session = _session({"p0.a": [10.0] * 15 + [400.0] * 15}, [12.0, 90.0], {"p0.a": 0})
    assert session.us == {0: 10.0}
    assert session.added_us() == -2.0


def test_network_that_cannot_be_run_is_named() -> None:
    with pytest.raises(ValueError, match="cannot run network 'broken'"):
        profile({"broken": b"no model"}, SessionSettings())
