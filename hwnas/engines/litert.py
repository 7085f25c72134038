"""LiteRT (formerly TensorFlow Lite) on the CPU: converts the network itself, by litert-torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwnas.engines import missing


def run(network: nn.Module, path: Path, inputs: Tensor) -> NDArray[Any]:
    """See `hwnas.engines.Engine`. The network is converted for a batch of 1; the file is not read.

    litert-torch (0.9) asks for a torch below 2.13.
    """
    try:
        import litert_torch
    except ImportError as error:
        raise missing("litert", error) from error
    converted = litert_torch.convert(network.eval(), (inputs[:1],))
    return np.concatenate([np.asarray(converted(part)) for part in torch.split(inputs, 1)])
