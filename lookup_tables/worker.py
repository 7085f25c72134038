"""The process that measures: stands alone, needs Python, numpy and onnxruntime only.

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
    try:
        options = session_options(command["threads"], command["optimisation"])
        session = onnxruntime.InferenceSession(command["model"], options, providers=["CPUExecutionProvider"])
        us = sampled(session, random_inputs(session, command["seed"]), command)
    except Exception as error:  # ONNX Runtime's errors share no base but this
        return {"error": " ".join(str(error).split())}
    return {"us": us}


def sampled(
    session: onnxruntime.InferenceSession, inputs: dict[str, Any], command: dict[str, Any]
) -> list[float]:
    """Microseconds of one ``session.run``, by sample, on the command's clock."""
    is_cpu_time = command["clock"] == "thread_cpu"
    clock = time.thread_time if is_cpu_time else time.perf_counter
    resolution = time.get_clock_info("thread_time" if is_cpu_time else "perf_counter").resolution
    outputs = [output.name for output in session.get_outputs()]
    return sample(
        lambda: session.run(outputs, inputs),
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
        us = sampled(session, inputs, command)
        with open(profile, encoding="utf-8") as file:
            events = json.load(file)
        os.unlink(profile)
    except Exception as error:  # as above
        return {"error": " ".join(str(error).split())}
    kernels = [event for event in events if event["name"].endswith(_KERNEL)]
    ends = [[event["ts"] + event["dur"]] for event in events if event["name"] == _RUN]
    starts = np.array([event["ts"] for event in kernels]).reshape(len(ends), -1)
    spans = np.diff(np.hstack([starts, ends]))[-runs:]
    names = [event["name"].removesuffix(_KERNEL) for event in kernels[: starts.shape[1]]]
    return {"nodes": {name: spans[:, n].tolist() for n, name in enumerate(names)}, "us": us}


def main() -> None:
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
    main()
