"""How many parameters each architecture's frozen network has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from profilers.profile import Profiler, build_cost
from profilers.space import Space


def count_parameters(module: nn.Module, inputs: Sequence[Tensor] = ()) -> int:
    """All numbers that a module can learn, those of normalisation and biases too; a shared one counts once.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in module.parameters())


@final
class ParamsProfiler(Profiler):
    """The parameters of every architecture's frozen network.

    Args:
        space: whose ``parameter_sites`` hold every parameter of a frozen network exactly once.
    """

    def __init__(self, space: Space) -> None:
        super().__init__(build_cost(space, space.parameter_sites(), count_parameters, "parameter"))
