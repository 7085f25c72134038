import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from lookup_tables.measure import (
    Measurement,
    Worker,
    _Chunk,
    _reading,
    measure,
    measure_by,
    measure_latency,
)
from lookup_tables.session import SessionSettings
from lookup_tables.worker import random_inputs, sample, session_options

SETTINGS = SessionSettings()
MODULE = sys.modules["lookup_tables.measure"]  # the package has the function under this name


def model(repeats: int = 1, shape: Sequence[int | str] = (1, 64), dtype: int = TensorProto.FLOAT) -> bytes:
    """A chain of additions of the input with itself."""
    names = ["input", *(f"sum{n}" for n in range(repeats - 1)), "output"]
    nodes = [helper.make_node("Add", [names[n], names[n]], [names[n + 1]]) for n in range(repeats)]
    given, made = (helper.make_tensor_value_info(name, dtype, shape) for name in ("input", "output"))
    graph = helper.make_graph(nodes, "chain", [given], [made])
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


def test_longer_chain_takes_longer_and_every_model_is_reported() -> None:
    models = {"short": model(1, (1, 4096)), "long": model(40, (1, 4096))}
    reported: dict[str, Measurement] = {}
    steps: list[tuple[int, int]] = []
    found = measure(
        models,
        SETTINGS,
        rounds=2,
        progress=lambda *step: steps.append(step),
        on_result=lambda key, result: reported.update({key: result}),
    )
    assert found == reported
    assert 0 < 2 * found["short"].p10_us < found["long"].p10_us
    assert found["long"].p10_us <= found["long"].median_us <= found["long"].p90_us
    assert steps[-1] == (2, 2)


def test_results_of_finished_workers_outlive_a_model_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_CHUNK", 1)
    reported: list[str] = []
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot run model 'bad'.*export it again"):
        measure(
            {"good": model(), "bad": model()[:40]},
            SETTINGS,
            rounds=1,
            on_result=lambda k, _: reported.append(k),
        )
    assert reported == ["good"]


def test_bad_reference_is_named() -> None:
    with pytest.raises(ValueError, match="cannot run the reference model"):
        measure({"good": model()}, SETTINGS, rounds=1, reference=b"no model")


def test_no_models_need_no_worker_and_no_rounds_are_refused() -> None:
    assert measure({}, SETTINGS) == {}
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure({}, SETTINGS, rounds=0)


def test_dead_worker_names_the_model_it_was_at(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model())
    with Worker(SETTINGS, 0) as worker:
        assert worker.measure(path, "model 'a'", 1)
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="killed by signal 9 at model 'b'"):
            worker.measure(path, "model 'b'", 1)


def test_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit('no numpy here')")
    monkeypatch.setattr(MODULE, "_WORKER", broken)
    with pytest.raises(RuntimeError, match=r"ended with code 1 at .*it said: no numpy here"):
        measure({"a": model()}, SETTINGS, rounds=1)


def test_worker_is_gone_after_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), Worker(SETTINGS, 0) as worker:
        raise KeyboardInterrupt
    assert worker.process.returncode is not None


def test_worker_imports_neither_torch_nor_this_package(tmp_path: Path) -> None:
    with Worker(SETTINGS, 0) as worker:
        path = tmp_path / "model.onnx"
        path.write_bytes(model())
        worker.measure(path, "the model", 1)
        if sys.platform == "linux":
            loaded = Path(f"/proc/{worker.process.pid}/maps").read_text()
            assert "libtorch" not in loaded


def pace(slow: Callable[[int], float]) -> tuple[Callable[[str | None], list[float]], list[int]]:
    """A machine of which every visit takes 100 us times what its round has; counts the rounds."""
    visits: list[int] = []

    def visit(key: str | None) -> list[float]:
        if key is None:
            visits.append(len(visits) // 2)  # the reference comes first and last
        return [100 * slow(visits[-1])]

    return visit, visits


def rounds_of(visit: Any, rounds: int, expected: float | None = None) -> list[float]:
    chunk = _Chunk(["a"], random.Random(0))
    chunk.visit(visit, rounds, 2 * rounds, expected, lambda done: None)
    sessions = chunk.sessions(rounds, expected or chunk.reference_us)
    return [float(session[0]) for session in sessions["a"]]


def test_rounds_in_which_the_reference_moved_are_dropped_and_repeated() -> None:
    visit, _ = pace(lambda n: 1.3 if n in (1, 3) else 1.0)
    assert rounds_of(visit, 5) == [100.0] * 5


def test_slow_start_of_a_worker_is_known_by_what_earlier_ones_saw() -> None:
    visit, _ = pace(lambda n: 1.3 if n < 3 else 1.0)
    assert rounds_of(visit, 3, expected=100.0) == [100.0] * 3


def test_machine_that_never_settles_gives_its_steadiest_rounds_after_twice_as_many() -> None:
    visit, visits = pace(lambda n: 1 + 0.1 * n)
    times = rounds_of(visit, 3, expected=100.0)
    assert visits[-1] + 1 == 6
    assert sorted(times) == pytest.approx([100, 110, 120])


def test_reference_that_moves_within_a_round_drops_it() -> None:
    looks = iter([100, 150, 100, 100, 100, 100])
    times = rounds_of(lambda key: [float(next(looks))] if key is None else [1.0], 2)
    assert len(times) == 2
    assert next(looks, None) is None


def test_order_differs_between_rounds_and_repeats_by_seed() -> None:
    def order(seed: int) -> list[str]:
        seen: list[str] = []
        chunk = _Chunk(list("abcdef"), random.Random(seed))
        chunk.visit(lambda key: seen.append(key or "") or [1.0], 3, 3, None, lambda done: None)
        return [key for key in seen if key]

    assert order(0) == order(0)
    assert order(0)[:6] != order(0)[6:12]


class Busy:
    """A machine on which some models' first workers fall into a burst of 1.3 times the pace."""

    def __init__(self, bursts: Mapping[str, int]) -> None:
        self.opened: list[str] = []
        self._bursts = bursts

    @contextmanager
    def __call__(self, keys: Sequence[str]) -> Iterator[Callable[[str | None], list[float]]]:
        (name,) = keys
        self.opened.append(name)
        is_slow = self.opened.count(name) <= self._bursts.get(name, 0)
        yield lambda key: [130.0 if is_slow else 100.0]


@pytest.mark.parametrize("disturbed", ["a", "b", "d"])
def test_models_of_a_worker_in_a_burst_are_measured_again_after_all_others(
    disturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_CHUNK", 1)
    machine, steps, reported = Busy({disturbed: 1}), list[int](), list[str]()
    found = measure_by(
        machine,
        [*"abcd"],
        progress=lambda done, total: steps.append(done),
        on_result=lambda key, _: reported.append(key),
    )
    assert "".join(machine.opened) == "abcd" + disturbed
    assert {key: result.p10_us for key, result in found.items()} == dict.fromkeys("abcd", 100.0)
    assert reported[-1] == disturbed
    assert sorted(reported) == [*"abcd"]
    assert steps[-1] == 4


def test_models_that_are_always_in_a_burst_are_measured_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_CHUNK", 1)
    machine = Busy({"c": 9})
    found = measure_by(machine, [*"abc"], rounds=2)
    assert "".join(machine.opened) == "abccc"
    assert (found["c"].p10_us, found["c"].samples) == (130.0, 2)


def test_machine_that_is_always_busy_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_CHUNK", 1)
    looks, opened = itertools.count(), list[str]()

    @contextmanager
    def visiting(keys: Sequence[str]) -> Iterator[Callable[[str | None], list[float]]]:
        opened.extend(keys)
        yield lambda key: [100 * 1.1 ** (next(looks) % 17)]

    assert measure_by(visiting, [*"abc"]).keys() == {*"abc"}
    assert opened == [*"abc"]


@pytest.mark.parametrize(("failing", "kept"), [("b", ["a"]), ("d", ["a", "c"])])
def test_model_that_fails_leaves_what_is_finished_of_others_and_no_burst(
    failing: str, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_CHUNK", 1)
    machine, reported = Busy({"b": 9}), list[str]()

    @contextmanager
    def visiting(keys: Sequence[str]) -> Iterator[Callable[[str | None], list[float]]]:
        if keys == [failing]:
            raise ValueError(f"{failing} cannot be run")
        with machine(keys) as visit:
            yield visit

    with pytest.raises(ValueError, match=f"{failing} cannot"):
        measure_by(visiting, [*"abcd"], on_result=lambda key, _: reported.append(key))
    assert reported == kept


def test_sample_fills_its_time_with_runs_and_gives_the_time_of_one() -> None:
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 100e-6

    times = sample(run, lambda: now, warmups=4, samples=3, sample_seconds=0.002)
    assert times == pytest.approx([100] * 3)
    assert now == pytest.approx((4 + 1 + 3 * 20) * 100e-6)


def test_run_longer_than_a_sample_is_run_once() -> None:
    ticks = iter(np.arange(100.0))
    assert (
        sample(lambda: None, lambda: float(next(ticks)), warmups=0, samples=2, sample_seconds=0.01)
        == [1e6] * 2
    )


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64])
def test_inputs_have_the_models_type_and_one_for_open_dimensions(dtype: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model(shape=("batch", 5), dtype=dtype), session_options(1, "all"), providers=["CPUExecutionProvider"]
    )
    given = random_inputs(session, 0)
    assert given["input"].shape == (1, 5)
    assert session.run(None, given)[0] == pytest.approx(2 * given["input"])
    assert (given["input"] == random_inputs(session, 0)["input"]).all()


def test_latency_of_a_file_is_that_of_its_bytes_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model(20, (1, 4096)))
    one, other = (measure_latency(given, SETTINGS, seconds=0.1) for given in (path, path.read_bytes()))
    assert one.clock == "thread_cpu"
    assert one.p10_ms <= one.median_ms <= one.p90_ms
    assert one.p10_ms == pytest.approx(other.p10_ms, rel=0.5)  # a busy machine


def test_two_threads_are_measured_on_the_wall_clock() -> None:
    assert measure_latency(model(), SessionSettings(threads=2), seconds=0.1).clock == "wall"


OPENVINO = SessionSettings(runtime="openvino")
# Looked for, not imported: that would send statistics of use.
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="pip install hwnas[openvino]")


@needs_openvino
def test_openvino_measures_a_model_and_names_one_that_it_cannot_run() -> None:
    found = measure({"small": model(1, (1, 64)), "large": model(1, (1, 1 << 20))}, OPENVINO, rounds=1)
    assert 0 < 2 * found["small"].p10_us < found["large"].p10_us
    with pytest.raises(ValueError, match="OpenVINO cannot run model 'bad'"):
        measure({"bad": model()[:40]}, OPENVINO, rounds=1)


@needs_openvino
def test_openvino_at_one_thread_works_in_the_thread_that_calls(tmp_path: Path) -> None:
    """In a process of its own: importing it changes what is loaded, and its statistics must stay off."""
    path = tmp_path / "model.onnx"
    path.write_bytes(model(60, (1, 65536)))
    code = (
        "import time; from worker import open_openvino\n"
        f"run = open_openvino({{'model': {str(path)!r}, 'threads': 1, 'seed': 0}})\n"
        "for _ in range(20): run()\n"
        "thread, process = time.thread_time(), time.process_time()\n"
        "for _ in range(100): run()\n"
        "print((time.thread_time() - thread) / (time.process_time() - process))"
    )
    home = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(MODULE._WORKER.parent)}
    said = subprocess.run(
        [sys.executable, "-P", "-c", code], env=home, capture_output=True, text=True, check=True
    )
    assert float(said.stdout) > 0.95
    assert not (tmp_path / "intel").exists()


@pytest.mark.parametrize("content", [b"", b"foreign", model()[:60]], ids=["empty", "foreign", "truncated"])
def test_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot run '.*damaged.onnx'"):
        measure_latency(path, SETTINGS)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*absent.onnx' cannot be read: No such file"):
        measure_latency(tmp_path / "absent.onnx", SETTINGS)


def test_neighbours_that_slow_most_samples_in_bursts_leave_the_latency_and_the_floor_alone() -> None:
    generator = random.Random(0)

    def session() -> list[float]:
        slow = generator.random() < 0.75  # for as long as a session lasts
        return [100.0 + generator.random() + slow * generator.uniform(0, 60) for _ in range(24)]

    reading = _reading([(session(), session()) for _ in range(40)], "thread_cpu")
    assert reading.valid
    assert reading.p10_ms == pytest.approx(0.1, rel=0.01)
    assert reading.median_ms > 0.105


@pytest.mark.parametrize(
    ("clock", "apart", "valid"),
    [("thread_cpu", 2.9, True), ("thread_cpu", 3.2, False), ("wall", 4.8, True), ("wall", 5.3, False)],
)
def test_reading_is_valid_up_to_the_floor_of_its_clock(clock: str, apart: float, valid: bool) -> None:
    reading = _reading([([100.0] * 3, [100.0 + apart] * 3)] * 12, clock)
    assert reading.noise_floor_percent == pytest.approx(apart)
    assert reading.p10_ms == pytest.approx(0.1)
    assert reading.valid is valid
    assert ("close other programs" in reading.reason) is not valid
