"""The space of SPOS in the size that suits the images."""

from __future__ import annotations

from hwnas import ModelSpace
from hwnas.data import DataFacts
from hwnas.spaces import ShuffleNetV2


def make_space(facts: DataFacts, search: str, smoke: bool) -> ModelSpace:
    """The paper's space for images from 64x64 up, its small variant below; two layers for a smoke test.

    ``search`` is ``"both"``, or ``"blocks"`` alone, with the channels of the published network.
    """
    channels, height, width = facts.input_shape
    ratios = {} if search == "both" else {"ratios": (1.0,)}
    if smoke:
        sizes = {"widths": (8, 16, 24, 32), "layers": (1, 1), "ratios": (0.5, 1.0), **ratios}
        return ModelSpace(ShuffleNetV2(facts.num_classes, channels, **sizes))
    make = ShuffleNetV2 if min(height, width) >= 64 else ShuffleNetV2.small
    return ModelSpace(make(facts.num_classes, channels, **ratios))
