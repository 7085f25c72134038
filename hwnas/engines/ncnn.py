"""ncnn on the CPU, by way of pnnx, which converts the ONNX file."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hwnas.engines import missing


def run(network: nn.Module, path: Path, inputs: Tensor) -> NDArray[Any]:
    """See `hwnas.engines.Engine`. The file's batch must be 1: ncnn's tensors have none."""
    try:
        import ncnn
        import pnnx
    except ImportError as error:
        raise missing("ncnn", error) from error
    with tempfile.TemporaryDirectory(prefix="hwnas-") as folder:
        shutil.copy(path, Path(folder, "net.onnx"))
        # fp16=0: weights stay in fp32. It leaves a dozen files beside its input.
        command = [str(pnnx.EXEC_PATH), "net.onnx", "fp16=0"]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        net = ncnn.Net()
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, option, False)
        files = [Path(folder, name) for name in ("net.ncnn.param", "net.ncnn.bin")]
        if told.returncode or not all(file.exists() for file in files):
            raise ValueError(f"pnnx cannot convert '{path}': {(told.stderr or told.stdout)[-500:]}")
        if net.load_param(str(files[0])) or net.load_model(str(files[1])):
            raise ValueError(f"ncnn cannot load what pnnx made of '{path}'")
        return np.stack([_one(ncnn, net, image.numpy()) for image in inputs])


def _one(ncnn: Any, net: Any, image: NDArray[Any]) -> NDArray[Any]:
    with net.create_extractor() as extractor:
        extractor.input(net.input_names()[0], ncnn.Mat(np.ascontiguousarray(image)).clone())
        _, output = extractor.extract(net.output_names()[0])
        return np.array(output)
