"""The space of ProxylessNAS in the size that suits the images."""

from __future__ import annotations

from hwnas import ModelSpace
from hwnas.data import DataFacts
from hwnas.spaces import ProxylessNAS


def make_space(facts: DataFacts, smoke: bool) -> ModelSpace:
    """The paper's space for images from 64x64 up, its small variant below; three layers for a smoke test."""
    channels, height, width = facts.input_shape
    if smoke:
        sizes = {"widths": (8, 8, 16, 32, 64), "layers": (1, 2), "strides": (2, 2)}
        return ModelSpace(ProxylessNAS(facts.num_classes, channels, **sizes))
    make = ProxylessNAS if min(height, width) >= 64 else ProxylessNAS.small
    return ModelSpace(make(facts.num_classes, channels))
