"""The process that measures: stands alone, needs Python, numpy and onnxruntime (or openvino) only.

Started as a script (not as a module of the package, whose other imports would take seconds). Each line on
its standard input is a command, each answer a line of JSON on its standard output; see `answer` and
`node_times`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime

LEVELS: dict[str, onnxruntime.GraphOptimizationLevel] = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

# Events of a profile: a node at work ends in the one, a whole run is called the other.
_KERNEL = "_kernel_time"
_RUN = "SequentialExecutor::Execute"


def session_options(threads: int, optimisation: str) -> onnxruntime.SessionOptions:
    """Fresh options: one operator after another, waiting threads asleep, only errors logged."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = LEVELS[optimisation]
    options.log_severity_level = 3
    # A spinning thread takes the core of whoever else runs, and the next measurement's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def random_inputs(session: onnxruntime.InferenceSession, seed: int) -> dict[str, Any]:
    """Normal numbers of each input's shape, open dimensions 1; zeros for integers, which may be indices."""
    generator = np.random.default_rng(seed)
    inputs: dict[str, Any] = {}
    for given in session.get_inputs():
        if given.type not in _DTYPES:
            raise ValueError(f"input '{given.name}' is of type {given.type}; known are {', '.join(_DTYPES)}")
        shape = [size if isinstance(size, int) else 1 for size in given.shape]
        inputs[given.name] = random_array(shape, _DTYPES[given.type], generator)
    return inputs


def random_array(shape: Sequence[int], dtype: Any, generator: np.random.Generator) -> Any:
    """Normal numbers, or zeros of a type of whole numbers."""
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)


def sample(
    run: Callable[[], object],
    clock: Callable[[], float],
    *,
    warmups: int,
    samples: int,
    sample_seconds: float,
) -> list[float]:
    """Microseconds of one run, by sample: each the mean over as many runs as fill ``sample_seconds``."""
    for _ in range(warmups):
        run()
    started = clock()
    run()
    once = clock() - started
    repeats = max(1, round(sample_seconds / max(once, 1e-7)))
    times = []
    for _ in range(samples):
        started = clock()
        for _ in range(repeats):
            run()
        times.append((clock() - started) / repeats * 1e6)
    return times


def open_onnxruntime(command: dict[str, Any]) -> Callable[[], object]:
    """One run of the model as a call."""
    options = session_options(command["threads"], command["optimisation"])
    session = onnxruntime.InferenceSession(command["model"], options, providers=["CPUExecutionProvider"])
    inputs = random_inputs(session, command["seed"])
    outputs = [output.name for output in session.get_outputs()]
    return lambda: session.run(outputs, inputs)


def open_openvino(command: dict[str, Any]) -> Callable[[], object]:
    """One run of the model as a call.

    ``infer`` is synchronous: one stream of one thread works in the calling thread, whose CPU time is then the
    process's (323 us both, of 366 us of wall time on a busy machine; with ``start_async`` it holds a quarter,
    and of two threads it holds one).
    """
    # Without this module openvino sends no statistics of use, and leaves no file in the home folder.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # "not to be imported"
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; OpenVINO is an extra: pip install hwnas[openvino]") from error
    core = openvino.Core()
    model = core.read_model(command["model"])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": command["threads"],
        # A core that it is bound to may be another program's: ONNX Runtime binds none, either.
        "ENABLE_CPU_PINNING": False,
        # Its own choice is bfloat16 where the CPU has it.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    generator = np.random.default_rng(command["seed"])
    inputs = []
    for given in compiled.inputs:
        shape = [size.get_length() if size.is_static else 1 for size in given.get_partial_shape()]
        inputs.append(random_array(shape, given.get_element_type().to_dtype(), generator))
    request = compiled.create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True)


OPENERS = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


def answer(command: dict[str, Any]) -> dict[str, Any]:
    """Opens a session, warms it up, samples it and closes it.

    Args:
        command: ``model`` (a path), ``runtime``, ``threads``, ``optimisation``, ``clock``, ``seed``,
            ``warmups``, ``samples``, ``sample_seconds``.

    Returns:
        ``us``: microseconds of one run in each sample; or ``error``: what is wrong with it.
    """
    try:
        us = sampled(OPENERS[command["runtime"]](command), command)
    except Exception as error:  # the runtimes' errors share no base but this
        return {"error": " ".join(str(error).split())}
    return {"us": us}


def sampled(run: Callable[[], object], command: dict[str, Any]) -> list[float]:
    """Microseconds of one run, by sample, on the command's clock."""
    is_cpu_time = command["clock"] == "thread_cpu"
    clock = time.thread_time if is_cpu_time else time.perf_counter
    resolution = time.get_clock_info("thread_time" if is_cpu_time else "perf_counter").resolution
    return sample(
        run,
        clock,
        warmups=command["warmups"],
        samples=command["samples"],
        # Windows counts a thread's time in steps of 16 ms.
        sample_seconds=max(command["sample_seconds"], 20 * resolution),
    )


def node_times(command: dict[str, Any]) -> dict[str, Any]:
    """Runs a model under ONNX Runtime's profiler, then without it.

    A profile says when a node began and how long it took, in whole microseconds, rounded down. A node of
    4.9 us so takes 4 in every run; from its beginning to that of the next one it is 4 in some runs and 5 in
    others, and their mean is right. That span also holds what the profiler does for each node.

    Args:
        command: as for `answer`, with ``runs`` besides, and ``optimised``, the path where the optimised model
            is written. The profile goes beside that.

    Returns:
        ``nodes``: by the name of each node of the optimised model, the microseconds from its beginning to the
        next one's, or to the run's end, in each run; ``us``: as `answer`, after the profiler was stopped; or
        ``error``: what is wrong with the model.
    """
    runs: int = command["runs"]
    try:
        options = session_options(command["threads"], command["optimisation"])
        options.optimized_model_filepath = command["optimised"]
        options.enable_profiling = True
        options.profile_file_prefix = command["optimised"]
        session = onnxruntime.InferenceSession(command["model"], options, providers=["CPUExecutionProvider"])
        inputs = random_inputs(session, command["seed"])
        for _ in range(command["warmups"] + runs):
            session.run(None, inputs)
        profile = session.end_profiling()
        us = sampled(lambda: session.run(None, inputs), command)
        with open(profile, encoding="utf-8") as file:
            events = json.load(file)
        os.unlink(profile)
    except Exception as error:  # as above
        return {"error": " ".join(str(error).split())}
    kernels = [event for event in events if event["name"].endswith(_KERNEL)]
    ends = [[event["ts"] + event["dur"]] for event in events if event["name"] == _RUN]
    starts = np.array([event["ts"] for event in kernels]).reshape(len(ends), -1)
    spans = np.diff(np.hstack([starts, ends]))[-runs:]
    names = [event["name"][: -len(_KERNEL)] for event in kernels[: starts.shape[1]]]
    return {"nodes": {name: spans[:, n].tolist() for n, name in enumerate(names)}, "us": us}


def serve() -> None:
    """Answers until the standard input ends."""
    # Answers go where nothing else is printed: what a native library writes to stdout goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.disable()
    for line in sys.stdin:
        command = json.loads(line)
        answers.write(json.dumps(node_times(command) if "runs" in command else answer(command)) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    serve()
