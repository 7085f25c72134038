"""OpenVINO on the CPU: reads the ONNX file, in fp32 or INT8."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwnas.engines import missing


def run(network: nn.Module, path: Path, inputs: Tensor) -> NDArray[Any]:
    """See `hwnas.engines.Engine`."""
    return opened(path)(inputs)


def opened(path: Path) -> Callable[[Tensor], NDArray[Any]]:
    """What runs a file, ready to be called with batches.

    Raises:
        ValueError: OpenVINO cannot read the file.
        MissingEngineError: it is not installed.
    """
    # Without this module openvino sends no statistics of use, and leaves no file in the home folder.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # "not to be imported"
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino", error) from error
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot read '{path}': {error}") from error
    dimension = compiled.inputs[0].get_partial_shape()[0]

    def outputs(inputs: Tensor) -> NDArray[Any]:
        size = dimension.get_length() if dimension.is_static else len(inputs)
        parts = []
        for part in torch.split(inputs, size):
            # The last part is filled up by repeating, and the surplus dropped.
            filled = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
            parts.append(compiled([filled.numpy()])[0][: len(part)])
        return np.concatenate(parts)

    return outputs
