"""The process that measures: stands alone, needs Python, numpy and onnxruntime (or openvino) only.

Started as a script (not as a module of the package, whose other imports would take seconds). Each line on
its standard input is a command, each answer a line of JSON on its standard output; see `answer`.
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
    is_cpu_time = command["clock"] == "thread_cpu"
    clock = time.thread_time if is_cpu_time else time.perf_counter
    resolution = time.get_clock_info("thread_time" if is_cpu_time else "perf_counter").resolution
    try:
        us = sample(
            OPENERS[command["runtime"]](command),
            clock,
            warmups=command["warmups"],
            samples=command["samples"],
            # Windows counts a thread's time in steps of 16 ms.
            sample_seconds=max(command["sample_seconds"], 20 * resolution),
        )
    except Exception as error:  # the runtimes' errors share no base but this
        return {"error": " ".join(str(error).split())}
    return {"us": us}


def serve() -> None:
    """Answers until the standard input ends."""
    # Answers go where nothing else is printed: what a native library writes to stdout goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.disable()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    serve()
