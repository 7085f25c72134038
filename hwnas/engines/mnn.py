"""MNN on the CPU: converts the ONNX file, in fp32 or INT8."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwnas.engines import missing


def run(network: nn.Module, path: Path, inputs: Tensor) -> NDArray[Any]:
    """See `hwnas.engines.Engine`. The file's batch must be 1.

    The converter is called in its native module: MNN's own Python around it (``MNN.tools.mnnconvert``)
    installs a package by pip when it is imported, and sends statistics of use.
    """
    try:
        import _tools
        import MNN.expr
        import MNN.nn
    except ImportError as error:
        raise missing("mnn", error) from error
    graph = onnx.load(str(path)).graph
    names = [graph.input[0].name], [graph.output[0].name]
    with tempfile.TemporaryDirectory(prefix="hwnas-") as folder:
        made = str(Path(folder, "net.mnn"))
        arguments = ["-f", "ONNX", "--modelFile", str(path), "--MNNModel", made, "--bizCode", "hwnas"]
        if not _tools.mnnconvert(["mnnconvert", *arguments, "--keepInputFormat"]) or not Path(made).exists():
            raise ValueError(f"MNN cannot convert '{path}'")
        net = MNN.nn.load_module_from_file(made, *names)
        return np.concatenate([_one(MNN.expr, net, part.numpy()) for part in torch.split(inputs, 1)])


def _one(expr: Any, net: Any, image: NDArray[Any]) -> NDArray[Any]:
    given = expr.placeholder(list(image.shape), expr.NCHW)
    given.write(np.ascontiguousarray(image))
    (output,) = net.forward([given])
    return np.array(expr.convert(output, expr.NCHW).read())
