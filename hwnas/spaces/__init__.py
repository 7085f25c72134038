"""Ready-made spaces: network classes with choices in them."""

from collections.abc import Mapping
from typing import Any

from hwnas.spaces.darts_cells import DARTSCells
from hwnas.spaces.enas_macro import ENASMacro
from hwnas.spaces.enas_micro import ENASMicro
from hwnas.spaces.nas_bench_201 import NASBench201
from hwnas.spaces.published import Conformance, Published, conformance
from hwnas.spaces.small_mobilenet import SmallMobileNet

SPACES: Mapping[str, type[Any]] = {
    "darts-cells": DARTSCells,
    "enas-macro": ENASMacro,
    "enas-micro": ENASMicro,
    "nas-bench-201": NASBench201,
    "small-mobilenet": SmallMobileNet,
}
"""Every ready-made space by the name that the command line knows it by."""

__all__ = [
    "SPACES",
    "Conformance",
    "DARTSCells",
    "ENASMacro",
    "ENASMicro",
    "NASBench201",
    "Published",
    "SmallMobileNet",
    "conformance",
]
