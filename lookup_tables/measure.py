"""Times of ONNX models on this machine, by a protocol that holds on a busy one.

What is measured is what one synchronous run costs its caller (``session.run`` of ONNX Runtime, ``infer`` of
OpenVINO), prepared numpy arrays in, numpy arrays out. This holds some 5-10 us of session and Python a run
(with OpenVINO 20-30), which an empty model costs as well.

A latency is the 10th percentile of samples of a millisecond: what a run takes that nothing disturbs. On a
machine of one's own the median lies about 1 % above it. On a shared one the neighbours take cache and
execution units in bursts, also from a machine that runs nothing else: one file of 165 us, measured five
times in two days, had medians of 166 to 198 us and 10th percentiles of 164.6 to 165.7; in one bad minute the
medians of windows of five seconds went from 171 to 188 us, the 10th percentiles from 165.0 to 166.0. Samples
last 1 ms because a longer one is more often interrupted and finds cold caches afterwards.

This file goes into bundles (`lookup_tables.bundle`), so that other devices measure alike: it runs on Python
3.8 and needs numpy and `lookup_tables.session` alone.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, final

import numpy as np

from lookup_tables.session import SessionSettings

if TYPE_CHECKING:
    import numpy.typing as npt

    Progress = Callable[[int, int], None]
    # Opens a model, samples it, closes it; None stands for the reference model.
    Visit = Callable[[str | None], Sequence[float]]

_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_WORKER = Path(__file__).with_name("worker.py")

_CHUNK = 24  # models a worker process
_SEGMENT = 8  # models between two looks at the reference
WARMUPS = 4
SAMPLES = 7  # a session
SAMPLE_SECONDS = 0.001

_REFERENCE_MOVED = 0.04  # a round whose reference is further than this from its median is dropped
_LONGEST = 2  # times the rounds that were asked, while rounds are dropped
_REPEATS = 2  # times that a worker's models are measured again, while the machine is not at its usual pace

_CERTIFICATE_SAMPLES = 24
_CERTIFICATE_PAIRS = 8  # at least; so many make one of the two measurements that are compared
LARGEST_FLOOR_PERCENT = {"thread_cpu": 3.0, "wall": 5.0}


@final
@dataclass(frozen=True)
class Measurement:
    """The time of one run of a model, in microseconds.

    Attributes:
        median_us: median of the samples.
        p10_us, p90_us: between them lie 80 % of the samples; the first is what counts as the latency.
        samples: how many samples were kept, each the mean over a millisecond of runs.
    """

    median_us: float
    p10_us: float
    p90_us: float
    samples: int


@final
@dataclass(frozen=True)
class LatencyReading:
    """The latency of one file, and whether it may be relied on.

    Attributes:
        median_ms: median of the samples.
        p10_ms, p90_ms: between them lie 80 % of the samples; the first is what counts as the latency.
        noise_floor_percent: median absolute difference of two interleaved measurements of the file in
            separate processes, in percent of the latency: of eight sessions each, spread over the time.
        clock: ``thread_cpu`` or ``wall``.
        valid: the noise floor is low enough: 3 %, or 5 % on the wall clock.
        reason: why it is valid or not, in words.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    noise_floor_percent: float
    clock: str
    valid: bool
    reason: str


def measure(
    models: Mapping[str, bytes],
    settings: SessionSettings,
    *,
    rounds: int = 8,
    reference: bytes | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_result: Callable[[str, Measurement], None] | None = None,
) -> dict[str, Measurement]:
    """Measures many small models, in worker processes of 24 models each.

    In each round every model of a worker has one short session, in a new order. The reference model is
    measured between them; a round in which it moved by more than 4 % is dropped and repeated, up to twice
    the rounds that were asked. Models of which not even half of the rounds are left then are measured again
    after all others, up to two times, unless they are most of all: bursts last for ten seconds, and so does a
    worker. If too few rounds are left at last, those with the least movement are taken.

    Args:
        models: ONNX models, by any key.
        settings: of the sessions.
        rounds: sessions a model.
        reference: an ONNX model of some 100 us; a small one of our own where none is given.
        seed: of the order and of the random inputs.
        progress: told how many models are done, and how many there are.
        on_result: called with each key and its measurement as soon as its worker has finished (of the first
            worker, after the second one).

    Raises:
        ValueError: ``rounds`` is not positive, or the runtime cannot run a model, which is named.
        RuntimeError: a worker died; the model that it was at is named.
    """
    if reference is None:
        reference = _reference_model()
    return measure_by(
        lambda chunk: in_worker(chunk, models, reference, settings, seed),
        list(models),
        rounds=rounds,
        seed=seed,
        progress=progress,
        on_result=on_result,
    )


def measure_by(
    visiting: Callable[[Sequence[str]], AbstractContextManager[Visit]],
    keys: Sequence[str],
    *,
    rounds: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    on_result: Callable[[str, Measurement], None] | None = None,
) -> dict[str, Measurement]:
    """The protocol of `measure`, whatever takes the samples.

    Args:
        visiting: makes up to 24 models ready and gives the function that samples one in a fresh session.
        keys: of the models.
        rounds, seed, progress, on_result: as for `measure`.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    results: dict[str, Measurement] = {}
    chunks = [
        _Chunk(keys[first : first + _CHUNK], random.Random(f"{seed} {first}"))
        for first in range(0, len(keys), _CHUNK)
    ]

    def usual_us() -> float:
        return _usual([chunk for chunk in chunks if chunk.references])

    def report(chunk: _Chunk) -> None:
        for key, sessions in chunk.sessions(rounds, usual_us()).items():
            results[key] = _summary(sessions)
            if on_result is not None:
                on_result(key, results[key])

    def take(chunk: _Chunk, most: int) -> None:
        first = sum(len(other.keys) for other in chunks if other.references and other is not chunk)

        def advance(done: int) -> None:
            if progress is not None:
                progress(first + len(chunk.keys) * min(done, rounds) // rounds, len(keys))

        with visiting(chunk.keys) as visit:
            chunk.visit(visit, rounds, most, usual_us() if first else None, advance)

    waiting: list[_Chunk] = []  # not reported yet
    try:
        for chunk in chunks:
            take(chunk, _LONGEST * rounds)
            waiting.append(chunk)
            if chunk is not chunks[0] or len(chunks) == 1:  # one alone does not tell the usual pace
                settled = [other for other in waiting if other.is_settled(rounds, usual_us())]
                waiting = [other for other in waiting if other not in settled]
                for other in settled:
                    report(other)
        for _ in range(_REPEATS):
            if 2 * len(waiting) > len(chunks):
                break  # it is no burst, but how this machine is
            for chunk in [*waiting]:
                take(chunk, rounds)
                if chunk.is_settled(rounds, usual_us()):
                    waiting.remove(chunk)
                    report(chunk)
    except BaseException:
        for chunk in waiting:
            if chunk.is_settled(rounds, usual_us()):  # the others are to be measured again
                report(chunk)
        raise
    for chunk in waiting:
        report(chunk)
    return {key: results[key] for key in keys}


@contextmanager
def in_worker(
    keys: Sequence[str],
    models: Mapping[str, bytes],
    reference: bytes,
    settings: SessionSettings,
    seed: int,
    command: Sequence[str] | None = None,
) -> Iterator[Visit]:
    """A process that samples these models, for `measure_by`; ``command`` starts it in place of our own."""
    scratch = tempfile.TemporaryDirectory(prefix="lookup_tables-")
    with scratch as folder, Worker(settings, seed, command) as worker:
        paths: dict[str | None, Path] = {key: Path(folder, f"{i}.onnx") for i, key in enumerate(keys)}
        paths[None] = Path(folder, "reference.onnx")
        for key, path in paths.items():
            path.write_bytes(reference if key is None else models[key])

        def visit(key: str | None) -> Sequence[float]:
            name = "the reference model" if key is None else f"model '{key}'"
            return worker.measure(paths[key], name, SAMPLES)

        yield visit


def measure_latency(
    model: bytes | str | Path, settings: SessionSettings, *, seconds: float = 6.0
) -> LatencyReading:
    """Measures one file twice at the same time, in two processes whose short sessions alternate.

    Args:
        model: the path of an ONNX file or of one in ONNX Runtime's mobile format, or its bytes.
        settings: of the sessions.
        seconds: how long about; a large model takes longer, for there are at least eight pairs of sessions.

    Raises:
        ValueError: the file is absent, or the runtime cannot run it.
        RuntimeError: a worker died.
    """
    name = "the model" if isinstance(model, bytes) else f"'{model}'"
    if isinstance(model, bytes):
        content = model
    else:
        try:
            content = Path(model).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{name} cannot be read: {error.strerror}; give the path of an ONNX file"
            ) from error
    pairs: list[tuple[list[float], list[float]]] = []
    with tempfile.TemporaryDirectory(prefix="lookup_tables-") as folder:
        # ONNX Runtime tells its mobile format by the name.
        path = Path(folder, "model.ort" if content[4:8] == b"ORTM" else "model.onnx")
        path.write_bytes(content)
        with Worker(settings, 0) as first, Worker(settings, 0) as second:
            deadline = time.monotonic() + seconds
            while len(pairs) < _CERTIFICATE_PAIRS or time.monotonic() < deadline:
                order = (first, second) if len(pairs) % 2 == 0 else (second, first)
                times = {worker: worker.measure(path, name, _CERTIFICATE_SAMPLES) for worker in order}
                pairs.append((times[first], times[second]))
    return _reading(pairs, settings.clock)


def _reference_model() -> bytes:
    """Three 3x3 convolutions with ReLU, 32 channels at 16x16: a model to watch the machine by."""
    # A bundle brings its own reference model, to devices that have no onnx.
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((32, 32, 3, 3)).astype(np.float32) / 17
    names = ["input", "first", "second", "output"]
    nodes = []
    for given, made in itertools.pairwise(names):
        nodes.append(helper.make_node("Conv", [given, "weight"], [f"{made}_conv"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"{made}_conv"], [made]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32, 16, 16]) for name in names[::3]]
    graph = helper.make_graph(
        nodes, "reference", ends[:1], ends[1:], [numpy_helper.from_array(weights, "weight")]
    )
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


def _reading(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], clock: str) -> LatencyReading:
    times = np.array(pairs)  # pair, process, sample
    count = max(1, len(pairs) // _CERTIFICATE_PAIRS)
    groups = [times[first::count] for first in range(count)]  # each from the beginning to the end
    differences = [abs(_latency_us(group[:, 0]) - _latency_us(group[:, 1])) for group in groups]
    whole = _summary([session for pair in pairs for session in pair])
    floor = float(100 * np.median(differences) / whole.p10_us)
    largest = LARGEST_FLOOR_PERCENT[clock]
    valid = floor <= largest
    reason = f"two interleaved measurements differ by {floor:.2f} %, at most {largest:g} % is allowed"
    if not valid:
        reason += "; close other programs and measure again"
    return LatencyReading(
        median_ms=whole.median_us / 1000,
        p10_ms=whole.p10_us / 1000,
        p90_ms=whole.p90_us / 1000,
        noise_floor_percent=floor,
        clock=clock,
        valid=valid,
        reason=reason,
    )


def _summary(sessions: Sequence[Sequence[float]]) -> Measurement:
    samples = np.concatenate([np.asarray(session) for session in sessions])
    low, high = np.percentile(samples, [10, 90])
    return Measurement(float(np.median(samples)), float(low), float(high), len(samples))


def _latency_us(samples: Sequence[float] | npt.NDArray[np.float64]) -> float:
    return float(np.percentile(samples, 10))


@final
class _Chunk:
    """The models of one worker, and the rounds of short sessions that they have had.

    Attributes:
        references: what the reference model took in each round, in microseconds.
    """

    def __init__(self, keys: Sequence[str], generator: random.Random) -> None:
        self.keys = keys
        self.references: list[float] = []
        self._generator = generator
        self._taken: list[dict[str, Sequence[float]]] = []

    def visit(
        self,
        visit: Visit,
        rounds: int,
        most: int,
        expected_us: float | None,
        advance: Callable[[int], None],
    ) -> None:
        """Takes rounds, at most so many, until there are enough in which the machine kept its usual pace."""
        for _ in range(most):
            self._round(visit)
            steady = len(self.steady(self.reference_us if expected_us is None else expected_us))
            advance(steady)
            if steady >= rounds:
                return
        advance(rounds)

    def _round(self, visit: Visit) -> None:
        order = self._generator.sample(self.keys, len(self.keys))
        found: dict[str, Sequence[float]] = {}
        looks: list[float] = []
        for position, key in enumerate(order):
            if position % _SEGMENT == 0:
                looks.append(_latency_us(visit(None)))
            found[key] = visit(key)
        looks.append(_latency_us(visit(None)))
        self.references.append(float(np.mean(looks)))
        self._taken.append(found)

    @property
    def reference_us(self) -> float:
        return float(np.median(self.references))

    def steady(self, usual_us: float) -> list[int]:
        """The rounds in which the reference kept to its usual time."""
        return [i for i, us in enumerate(self.references) if abs(us / usual_us - 1) <= _REFERENCE_MOVED]

    def is_settled(self, rounds: int, usual_us: float) -> bool:
        """Whether half of the rounds are steady ones."""
        return 2 * len(self.steady(usual_us)) >= rounds

    def sessions(self, rounds: int, usual_us: float) -> dict[str, list[Sequence[float]]]:
        """Of each model: those of the steady rounds, or else of those nearest to the usual pace."""
        kept = self.steady(usual_us)
        if len(kept) < rounds:
            kept = sorted(range(len(self._taken)), key=lambda i: abs(self.references[i] - usual_us))[:rounds]
        return {key: [self._taken[i][key] for i in kept] for key in self.keys}


def _usual(chunks: Sequence[_Chunk]) -> float:
    """What the reference takes: a whole worker may fall into a slow minute, so that every one counts.

    The lower of the two in the middle: bursts make nothing faster.
    """
    return sorted(chunk.reference_us for chunk in chunks)[(len(chunks) - 1) // 2]


@final
class Worker:
    """A process that measures on command; a context, at whose end it is gone.

    Args:
        settings: of its sessions.
        seed: of the random inputs.
        command: starts the process, in place of our own.
    """

    def __init__(self, settings: SessionSettings, seed: int, command: Sequence[str] | None = None) -> None:
        self._command: dict[str, Any] = {
            "runtime": settings.runtime,
            "threads": settings.threads,
            "optimisation": settings.optimisation,
            "clock": settings.clock,
            "seed": seed,
            "warmups": WARMUPS,
            "sample_seconds": SAMPLE_SECONDS,
        }
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self.process = subprocess.Popen(
            # -P: our module names must not hide anyone else's
            [*(command or (sys.executable, "-P", str(_WORKER)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._errors.close()

    def measure(self, path: Path, name: str, samples: int) -> list[float]:
        """Microseconds of a run, by sample, in one fresh session."""
        times: list[float] = self._ask({"model": str(path), "samples": samples}, name)["us"]
        return times

    def node_times(
        self, path: Path, name: str, runs: int, samples: int, optimised: Path
    ) -> tuple[dict[str, list[float]], list[float]]:
        """Microseconds of each node under the profiler, by run; and of a run without it, by sample.

        Args:
            path: of the model.
            name: of the model, for errors.
            runs: under the profiler.
            samples: without it.
            optimised: where the model that is run, with these nodes, is written.
        """
        command = {"model": str(path), "runs": runs, "samples": samples, "optimised": str(optimised)}
        answer = self._ask(command, name)
        return answer["nodes"], answer["us"]

    def _ask(self, command: Mapping[str, Any], name: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({**self._command, **command}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip()[-500:] or "nothing"
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise RuntimeError(
                f"the measuring process {how} at {name}; it said: {said}; measure again, and if it dies "
                "again at the same model, the runtime or the memory of this machine cannot take it"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            runtime = _TITLES[self._command["runtime"]]
            raise ValueError(
                f"{runtime} cannot run {name}: {answer['error']}; check the file, or export it again"
            )
        return answer
