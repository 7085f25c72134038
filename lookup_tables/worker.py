"""The process that measures: stands alone, needs Python, numpy and onnxruntime only.

Started as a script (not as a module of the package, whose other imports would take seconds). Each line on
its standard input is a command, each answer a line of JSON on its standard output; see `answer`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
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
        dtype = _DTYPES[given.type]
        is_float = np.issubdtype(dtype, np.floating)
        inputs[given.name] = (
            generator.standard_normal(shape).astype(dtype) if is_float else np.zeros(shape, dtype)
        )
    return inputs


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


def answer(command: dict[str, Any]) -> dict[str, Any]:
    """Opens a session, warms it up, samples it and closes it.

    Args:
        command: ``model`` (a path), ``threads``, ``optimisation``, ``clock``, ``seed``, ``warmups``,
            ``samples``, ``sample_seconds``.

    Returns:
        ``us``: microseconds of one ``session.run`` in each sample; or ``error``: what is wrong with it.
    """
    is_cpu_time = command["clock"] == "thread_cpu"
    clock = time.thread_time if is_cpu_time else time.perf_counter
    resolution = time.get_clock_info("thread_time" if is_cpu_time else "perf_counter").resolution
    try:
        options = session_options(command["threads"], command["optimisation"])
        session = onnxruntime.InferenceSession(command["model"], options, providers=["CPUExecutionProvider"])
        inputs = random_inputs(session, command["seed"])
        outputs = [output.name for output in session.get_outputs()]
        us = sample(
            lambda: session.run(outputs, inputs),
            clock,
            warmups=command["warmups"],
            samples=command["samples"],
            # Windows counts a thread's time in steps of 16 ms.
            sample_seconds=max(command["sample_seconds"], 20 * resolution),
        )
    except Exception as error:  # ONNX Runtime's errors share no base but this
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
