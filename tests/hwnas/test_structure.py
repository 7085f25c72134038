from __future__ import annotations

import torch
from torch import Tensor, nn

from hwnas import ModelSpace, Repeat, ValueChoice
from hwnas.nn import Conv2d
from hwnas.spaces.mobilenet_v3 import InvertedResidual
from hwnas.structure import structure
from profilers import FlopsProfiler, count_macs


def convolution(label: str, kernels: tuple[int, ...] = (3, 5), bias: bool = True) -> Conv2d:
    kernel = ValueChoice(kernels, label)
    return Conv2d(4, 4, kernel, padding=kernel // 2, bias=bias)


def block(number: int, expansions: tuple[int, ...] = (3, 6)) -> InvertedResidual:
    kernel, expansion = ValueChoice([3, 5], f"k{number}"), ValueChoice(expansions, f"e{number}")
    return InvertedResidual(8, 8, kernel, expansion, 1, "relu", squeeze=True)


def test_what_is_built_alike_has_one_structure_whatever_its_labels_and_weights() -> None:
    assert structure(convolution("a")) == structure(convolution("b"))
    assert structure(block(1)) == structure(block(2))


def test_what_is_built_otherwise_has_another() -> None:
    known = structure(convolution("a"))
    assert structure(convolution("a", (3, 7))) != known
    assert structure(convolution("a", bias=False)) != known
    assert structure(convolution("a").eval()) != known
    assert structure(block(1)) != structure(block(1, (3, 4)))
    assert structure(nn.Sequential(nn.ReLU(), nn.Tanh())) != structure(nn.Sequential(nn.Tanh(), nn.ReLU()))


def test_one_decision_is_not_two_and_tied_layers_are_not_two_layers() -> None:
    both = structure(nn.Sequential(convolution("a"), convolution("a")))
    assert both == structure(nn.Sequential(convolution("b"), convolution("b")))
    assert both != structure(nn.Sequential(convolution("a"), convolution("b")))
    layer = nn.Linear(4, 4)
    assert structure(nn.Sequential(layer, layer)) != structure(nn.Sequential(layer, nn.Linear(4, 4)))


def test_an_object_of_the_users_stands_for_itself() -> None:
    class Scaled(nn.Module):
        def __init__(self, by: object) -> None:
            super().__init__()
            self.by = by

    shared = object()
    assert structure(Scaled(shared)) == structure(Scaled(shared))
    assert structure(Scaled(object())) != structure(Scaled(shared))


def test_layers_of_one_structure_share_their_parts_and_cost_what_each_costs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = Repeat([block(1), block(2), block(3, (3, 4))], 3)

        def forward(self, features: Tensor) -> Tensor:
            found: Tensor = self.blocks(features)
            return found

    space, features = ModelSpace(Net()), torch.zeros(1, 8, 6, 6)
    first, second, third = space.sites(features)
    assert first.part({"k1": 5, "e1": 3}) is second.part({"k2": 5, "e2": 3})
    assert first.part({"k1": 5, "e1": 3}) is not first.part({"k1": 3, "e1": 3})
    assert third.part({"k3": 5, "e3": 3}) is not first.part({"k1": 5, "e1": 3})
    macs = FlopsProfiler(space, features)
    for architecture in [*space.grid()][::13]:
        assert macs.profile(architecture) == count_macs(space.freeze(architecture), [features]).headline
