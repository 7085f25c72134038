"""What all mixed operations share: the largest weight is held, and sliced or blended on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.freezing import Freezes
from hwnas.values import Combination, Value, combinations


class MixedOperation(Freezes, nn.Module, ABC):
    """An operation of ``torch.nn`` whose arguments may be values.

    It *is* its ``torch.nn`` class at the largest size (``isinstance`` and weight initialisation work);
    ``values`` holds the arguments that are decided. Without any it is the plain operation.
    """

    values: dict[str, Value]

    @abstractmethod
    def check_can_mix(self) -> None:
        """Raises ``ValueError`` where no blended weight equals the mixture of the options."""

    def _combinations(self) -> list[Combination]:
        return combinations(self.values)


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, Any]]:
    """The arguments that are values, and all of them with each value at its largest."""
    values = {name: value for name, value in arguments.items() if isinstance(value, Value)}
    largest = {name: max(value.all()) for name, value in values.items()}
    return values, {**arguments, **largest}


def blend(indicators: Tensor, found: list[Combination]) -> Tensor:
    """The expectation of 0/1 masks over the outcomes.

    Args:
        indicators: shape ``(outcomes, ...)``.
        found: the outcomes, with their weights.

    Returns:
        Shape ``(...)``.
    """
    weights = torch.stack([c.weight for c in found if c.weight is not None])
    blended: Tensor = torch.tensordot(weights, indicators.to(weights), dims=1)
    return blended
