"""Ready-made spaces: network classes with choices in them."""

from collections.abc import Mapping

from hwnas.spaces.autoformer import AutoFormer
from hwnas.spaces.darts_cells import DARTSCells
from hwnas.spaces.enas_macro import ENASMacro
from hwnas.spaces.enas_micro import ENASMicro
from hwnas.spaces.fbnet import FBNet
from hwnas.spaces.mobilenet_v3 import MobileNetV3
from hwnas.spaces.nas_bench_201 import NASBench201
from hwnas.spaces.pfld import PFLD
from hwnas.spaces.proxyless_nas import ProxylessNAS
from hwnas.spaces.published import Conformance, Published, ReadyMadeSpace, conformance
from hwnas.spaces.shufflenet_v2 import ShuffleNetV2
from hwnas.spaces.small_mobilenet import SmallMobileNet

SPACES: Mapping[str, type[ReadyMadeSpace]] = {
    "autoformer": AutoFormer,
    "darts-cells": DARTSCells,
    "enas-macro": ENASMacro,
    "enas-micro": ENASMicro,
    "fbnet": FBNet,
    "mobilenet-v3": MobileNetV3,
    "nas-bench-201": NASBench201,
    "pfld": PFLD,
    "proxylessnas": ProxylessNAS,
    "shufflenet-v2": ShuffleNetV2,
    "small-mobilenet": SmallMobileNet,
}
"""Every ready-made space by the name that the command line knows it by."""

__all__ = [
    "PFLD",
    "SPACES",
    "AutoFormer",
    "Conformance",
    "DARTSCells",
    "ENASMacro",
    "ENASMicro",
    "FBNet",
    "MobileNetV3",
    "NASBench201",
    "ProxylessNAS",
    "Published",
    "ReadyMadeSpace",
    "ShuffleNetV2",
    "SmallMobileNet",
    "conformance",
]
