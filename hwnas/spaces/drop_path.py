"""Drop path: whole branches are left out at random in training."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn


@final
class DropPath(nn.Module):
    """Sets a branch to zero for some images of a batch in training (FractalNet, arXiv 1605.07648).

    What is kept is divided by the share that is kept, so that the mean stays. It learns nothing, and is not
    in an exported network.

    Shapes: ``(N, ...)`` to the same.

    Args:
        probability: that an image's branch is left out, from 0 up, below 1.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = _checked(probability)

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return features
        kept = 1.0 - self.probability
        mask = features.new_empty((len(features),) + (1,) * (features.dim() - 1)).bernoulli_(kept)
        return features * (mask / kept)

    def extra_repr(self) -> str:
        return f"{self.probability:g}"


def set_drop_path(network: nn.Module, probability: float) -> None:
    """Sets the probability of every `DropPath` in a network: a schedule calls it before each epoch.

    Raises:
        ValueError: it is below 0, or 1 or more.
    """
    for module in network.modules():
        if isinstance(module, DropPath):
            module.probability = _checked(probability)


def _checked(probability: float) -> float:
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"a branch is dropped with a probability from 0 up, below 1; got {probability}")
    return probability
