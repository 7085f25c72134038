"""Ready-made spaces: network classes with choices in them."""

from collections.abc import Mapping
from typing import Any

from hwnas.spaces.autoformer import AutoFormer
from hwnas.spaces.mobilenet_v3 import MobileNetV3
from hwnas.spaces.published import Conformance, Published, conformance
from hwnas.spaces.small_mobilenet import SmallMobileNet

SPACES: Mapping[str, type[Any]] = {
    "autoformer": AutoFormer,
    "mobilenet-v3": MobileNetV3,
    "small-mobilenet": SmallMobileNet,
}
"""Every ready-made space by the name that the command line knows it by."""

__all__ = ["SPACES", "AutoFormer", "Conformance", "MobileNetV3", "Published", "SmallMobileNet", "conformance"]
