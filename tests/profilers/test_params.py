from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwnas.space import ModelSpace
from hwnas.spaces import SmallMobileNet
from profilers.params import ParamsProfiler
from tests.contracts.meter import MeterContract


def test_parameters_are_those_of_the_frozen_network() -> None:
    space = ModelSpace(SmallMobileNet())
    profiler = ParamsProfiler(space)
    generator = torch.Generator().manual_seed(0)
    for architecture in (space.default(), *(space.random(generator) for _ in range(8))):
        expected = sum(p.numel() for p in space.freeze(architecture).parameters())
        assert profiler.profile(architecture) == expected
    assert profiler.unit == "parameter"


def test_a_tied_tensor_counts_once() -> None:
    from profilers.params import count_parameters

    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    assert count_parameters(torch.nn.Sequential(first, second)) == 16 + 4 + 4


class TestContract(MeterContract):
    unit = "parameter"

    def profiler(self, space: ModelSpace, inputs: tuple[Tensor, ...]) -> ParamsProfiler:
        return ParamsProfiler(space)

    def truth(self, space: ModelSpace, inputs: tuple[Tensor, ...], architecture: dict[str, Any]) -> float:
        return sum(parameter.numel() for parameter in space.freeze(architecture).parameters())
