"""Ready-made spaces: network classes with choices in them."""

from collections.abc import Mapping
from typing import Any

from hwnas.spaces.pfld import PFLD
from hwnas.spaces.published import Conformance, Published, conformance
from hwnas.spaces.small_mobilenet import SmallMobileNet

SPACES: Mapping[str, type[Any]] = {
    "pfld": PFLD,
    "small-mobilenet": SmallMobileNet,
}
"""Every ready-made space by the name that the command line knows it by."""

__all__ = ["PFLD", "SPACES", "Conformance", "Published", "SmallMobileNet", "conformance"]
