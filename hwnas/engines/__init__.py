"""Other engines that run an exported network: do they compute what torch does?

An engine is one file with one function ``run(network, path, inputs) -> outputs``: the plain network, its ONNX
file (an engine converts whichever it can read), a batch, and what comes out for it as numpy. It runs on the
CPU, in the file's own precision, one input after another where the file's batch is one. The package that it
needs is imported by the function; where that is absent, `MissingEngineError` says which extra brings it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ENGINES = ("openvino", "ncnn", "mnn", "litert")


class Engine(Protocol):
    """What ``hwnas/engines/<name>.py`` has as ``run``."""

    def __call__(self, network: nn.Module, path: Path, inputs: Tensor) -> NDArray[Any]: ...


class MissingEngineError(ImportError):
    """An engine's package is not installed."""


def engine(name: str) -> Engine:
    """The engine of a name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; there are {', '.join(ENGINES)}")
    found: Engine = importlib.import_module(f"hwnas.engines.{name}").run
    return found


def engine_parity(name: str, network: nn.Module, path: str | Path, inputs: Iterable[Tensor]) -> float:
    """The largest absolute difference between torch and an engine over the outputs for ``inputs``.

    Args:
        name: one of ``ENGINES``.
        network: the plain network, in evaluation mode.
        path: its ONNX file.
        inputs: batches.

    Raises:
        ValueError: an unknown engine, or a file that it cannot convert.
        MissingEngineError: the engine is not installed; its extra is named.
    """
    run = engine(name)
    with torch.no_grad():
        return max(
            float(np.abs(network(batch).numpy() - run(network, Path(path), batch)).max()) for batch in inputs
        )


def parity_report(
    names: Iterable[str], network: nn.Module, path: str | Path, inputs: Tensor
) -> dict[str, float | str]:
    """`engine_parity` by name; in place of the number, why there is none."""
    report: dict[str, float | str] = {}
    for name in names:
        try:
            report[name] = engine_parity(name, network, path, [inputs])
        except MissingEngineError as error:
            report[name] = f"skipped: {error}"
    return report


def missing(name: str, error: ImportError) -> MissingEngineError:
    """The error of an engine whose package cannot be imported."""
    return MissingEngineError(f"{error}; pip install hwnas[{name}]")
