"""The micro space of ENAS: a normal cell and a reduction cell, stacked into a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from hwnas.choices import BranchCall, Branching, Condition, LayerChoice
from hwnas.fold import Fold
from hwnas.freezing import Freezer, Freezes
from hwnas.nn import Conv2d
from hwnas.nn import Linear as ElasticLinear
from hwnas.spaces.drop_path import DropPath
from hwnas.spaces.enas_macro import FactorizedReduce, Projection
from hwnas.spaces.published import Published, published_network
from hwnas.values import Expression, Value, ValueChoice
from profilers.space import Architecture, Option

OPERATIONS = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "identity")
"""In the order of the numbers in the authors' scripts."""

Width = int | Value


@final
class ENASMicro(nn.Module):
    """The micro space of ENAS (arXiv 1802.03268, section 2.4, appendix C.2).

    A chain of cells, each of which takes the outputs of the two before it. Each of a cell's nodes adds up two
    operations on states before it, which may be one and the same state: ``"normal.<node>.inputs"`` are the
    two states, ``"….first"`` and ``"….second"`` the operations on them; states 0 and 1 are the cell's inputs.
    States that no node takes make the cell's output. The cells at one and two thirds reduce: they have the
    resolution halved and the width doubled, and decisions of their own (``"reduce.…"``).

    Shapes: ``(N, in_channels, H, W)``, any H and W from 8 up (32 for CIFAR), to ``(N, num_classes)``. With
    five nodes there are (3 * 6 * 10 * 15 * 21 * 5^10)^2 = 3.1 * 10^23 networks; the two inputs of a node have
    no order.

    The authors search one network and train another (melodyguan/enas, ``src/cifar10/micro_child.py``:
    ``_enas_layer`` and ``_fixed_layer``). ``derived=True`` is the second one, for the same architectures:

    - a cell's output is the concatenation of the states that are left; here it is as wide as a node: the sum
      of a ReLU and a 1x1 convolution of each of them;
    - a cell that reduces has operations of stride 2 on its inputs; here it stands behind a reduction;
    - a cell's second input goes through one more 1x1 convolution.

    Neither can be searched with mixing weights, for which states are left has no mixture. Departures:
    BatchNorm's epsilon is torch's (theirs: 1e-3), and its statistics are kept; there is no auxiliary head.

    The paper's 4.6 M parameters (table 1) are not those of the authors' script, which stacks 15 cells. With
    ``cells=18``, six before, between and behind the reductions, the same network has 4,587,372.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        channels: of the first cells' nodes.
        cells: how many besides the two that reduce, at least 3.
        nodes: of each cell.
        derived: see above.
        drop_path: probability that the operations of the last cell are left out for an image, in training;
            less before it, in proportion (`hwnas.spaces.drop_path.set_drop_path` sets one for all).
        dropout: before the classifier.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(ENASMicro(channels=4, cells=3)).size == (3 * 6 * 10 * 15 * 21 * 5**10) ** 2
    True
    """

    published: ClassVar[Mapping[str, Published]]  # below: it is made of the authors' notation

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> ENASMicro:
        """Five cells of three nodes, 8 channels."""
        return cls(num_classes, in_channels, channels=8, cells=3, nodes=3)

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name (``"micro"``), with new weights.

        Args:
            name: of the network.
            arguments: of the class, over those of the paper.

        Raises:
            ValueError: there is no network of that name.
        """
        return published_network(cls, name, arguments)

    @staticmethod
    def architecture_of(numbers: str | Sequence[int]) -> Architecture:
        """The architecture that the authors' notation stands for.

        Args:
            numbers: for each node of the normal and then of the reduction cell: a state, the number of the
                operation on it, and both once more.

        Raises:
            ValueError: not four for each node of both cells, or a state or operation that does not exist.
        """
        given = [int(number) for number in (numbers.split() if isinstance(numbers, str) else numbers)]
        architecture: Architecture = {}
        quadruples = [given[start : start + 4] for start in range(0, len(given), 4)]
        nodes = len(quadruples) // 2
        for index, quadruple in enumerate(quadruples):
            cell, node = ("normal", index + 2) if index < nodes else ("reduce", index - nodes + 2)
            states, operations = quadruple[::2], quadruple[1::2]
            is_known = set(states) <= set(range(node)) and set(operations) <= set(range(len(OPERATIONS)))
            if len(given) % 8 or not is_known:
                raise ValueError(
                    "a node is a state before it, the number of an operation, 0 to 4, and both once more, "
                    "for as many nodes of one cell as of the other; "
                    f"got {quadruple} for node {node} of {cell!r}"
                )
            (first, one), (second, other) = sorted(zip(states, operations, strict=True))
            architecture[f"{cell}.{node}.inputs"] = (first, second)
            architecture[f"{cell}.{node}.first"] = OPERATIONS[one]
            architecture[f"{cell}.{node}.second"] = OPERATIONS[other]
        return architecture

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: int = 20,
        cells: int = 6,
        nodes: int = 5,
        derived: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if cells < 3 or nodes < 1 or channels % 2:
            raise ValueError(
                "ENASMicro has at least 3 cells, a node, and an even number of channels; got "
                f"{cells}, {nodes} and {channels}"
            )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 3 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(3 * channels)
        )
        inputs = {
            name: [
                ValueChoice(itertools.combinations_with_replacement(range(node), 2), f"{name}.{node}.inputs")
                for node in range(2, nodes + 2)
            ]
            for name in ("normal", "reduce")
        }
        reductions = (cells // 3, 2 * (cells // 3) + 1)
        self.cells = nn.ModuleList()
        widths: list[Width] = [3 * channels, 3 * channels]
        halved = False  # the first input is twice as large as the second
        for index in range(cells + 2):
            name = "reduce" if index in reductions else "normal"
            dropped = drop_path * (index + 1) / (cells + 2)
            if index in reductions:
                channels *= 2
            kind = DerivedCell if derived else SearchedCell
            cell = kind(name, widths, channels, inputs[name], halved, dropped)
            self.cells.append(cell)
            widths = [widths[-1], cell.width]
            halved = index in reductions
            if halved and not derived:
                # What a searched cell takes behind its reduction is what the next one takes first.
                widths, halved = [channels, channels], False
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.classifier = ElasticLinear(widths[-1], num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        before = last = self.stem(images)
        for cell in self.cells:
            before, last = cell(before, last)
        scores: Tensor = self.classifier(self.head(last))
        return scores


@final
class SearchedCell(nn.Module):
    """As it is searched: every cell returns its node's width.

    Shapes: ``(N, *, H, W)`` twice, to what is the first input of the next cell, and this one's output.
    """

    def __init__(
        self,
        name: str,
        widths: Sequence[Width],
        channels: int,
        inputs: Sequence[ValueChoice],
        halved: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        before, last = (cast("int", width) for width in widths)
        self.width = channels
        self.reduce = FactorizedReduce(last, channels) if name == "reduce" else nn.Identity()
        reduced = channels if name == "reduce" else last
        self.first = _resized(before, channels, halves=name == "reduce")
        self.second = nn.Identity() if reduced == channels else _resized(reduced, channels, halves=False)
        self.nodes = _nodes(name, channels, inputs, 1, drop_path)
        self.left = SumOfLeft(channels, inputs)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, before: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        last = self.reduce(last)
        states = [self.first(before), self.second(last)]
        for node in self.nodes:
            states.append(node(states))
        return last, self.norm(self.left(states))


@final
class DerivedCell(nn.Module):
    """As it is trained: every cell returns the concatenation of what is left.

    Shapes: as those of `SearchedCell`.
    """

    def __init__(
        self,
        name: str,
        widths: Sequence[Width],
        channels: int,
        inputs: Sequence[ValueChoice],
        halved: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        stride = 2 if name == "reduce" else 1
        self.first = _resized(widths[0], channels, halves=True) if halved else Calibrate(widths[0], channels)
        self.second = nn.Sequential(
            Calibrate(widths[1], channels), *_resized(channels, channels, halves=False)
        )
        self.nodes = _nodes(name, channels, inputs, stride, drop_path)
        self.left = JoinOfLeft(channels, inputs, stride)
        self.width = Expression("width of {}", partial(_width_of, channels), (self.left.left,))

    def forward(self, before: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        states = [self.first(before), self.second(last)]
        for node in self.nodes:
            states.append(node(states))
        return last, self.left(states)


@final
class Calibrate(Freezes, nn.Module):
    """Brings an input to a cell's width, where it has another one.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, channels, H, W)``.
    """

    def __init__(self, in_channels: Width, channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.channels = channels
        self.resize = _resized(in_channels, channels, halves=False)

    def forward(self, features: Tensor) -> Tensor:
        resized: Tensor = features if features.shape[1] == self.channels else self.resize(features)
        return resized

    def frozen(self, freezer: Freezer) -> nn.Module:
        width = self.in_channels
        width = width.of(freezer.architecture) if isinstance(width, Value) else width
        return nn.Identity() if width == self.channels else freezer(self.resize)


@final
class Node(Branching):
    """The sum of an operation on one state before it and an operation on another, or on the same."""

    def __init__(
        self, label: str, index: int, channels: int, inputs: ValueChoice, stride: int, drop_path: float
    ) -> None:
        super().__init__()
        self.inputs: Value = inputs
        for place in ("first", "second"):
            choices = (
                LayerChoice(_operations(channels, stride if state < 2 else 1, drop_path), f"{label}.{place}")
                for state in range(index)
            )
            self.add_module(place, nn.ModuleList(choices))

    def forward(self, states: Sequence[Tensor]) -> Any:
        first, second = self.inputs.now()
        return self._places()[0][first](states[first]) + self._places()[1][second](states[second])

    def _places(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        return cast("tuple[nn.ModuleList, nn.ModuleList]", (self.first, self.second))

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        labels = tuple(leaf.name() for leaf in self.inputs.leaves())
        for place, choices in enumerate(self._places()):
            for state, choice in enumerate(choices):
                yield f"{place}.{state}", choice, Condition(labels, partial(_takes, labels[0], place, state))

    def run_all(self, call: BranchCall, states: Sequence[Tensor]) -> Any:
        outputs = [
            call(*branch, state) for branch, state in zip(self.branches(), (*states, *states), strict=True)
        ]
        return outputs[0] + outputs[len(states)]

    def check_can_mix(self) -> None:
        """Raises ``ValueError``: its cell's output has no mixture."""
        raise ValueError(_NO_MIXTURE)

    def frozen(self, freezer: Freezer) -> nn.Module:
        sources = self.inputs.of(freezer.architecture)
        pairs = zip(self._places(), sources, strict=True)
        chosen = ChosenNode(sources, [freezer(choices[state]) for choices, state in pairs])
        chosen.training = self.training  # not train(), which would reach the operations
        return chosen


@final
class ChosenNode(nn.Module):
    """What a `Node` becomes in a subnet."""

    def __init__(self, sources: tuple[int, int], operations: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sources = sources
        self.operations = nn.ModuleList(operations)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        first, second = (
            operation(states[source]) for operation, source in zip(self.operations, self.sources, strict=True)
        )
        return cast("Tensor", first + second)


@final
class SumOfLeft(Branching):
    """The sum of a projection of each state that no node takes; the last one is always left."""

    def __init__(self, channels: int, inputs: Sequence[ValueChoice]) -> None:
        super().__init__()
        self.taken = [
            Fold(
                f"whether state {state} is taken",
                False,
                [(c, partial(_takes_it, state)) for c in later],
                bool,
            )
            for state in range(len(inputs) + 1)
            for later in [inputs[max(0, state - 1) :]]
        ]
        self.last = Projection(channels)
        self.joins = nn.ModuleList(JoinProjected(channels) for _ in range(len(inputs) + 1))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        total: Tensor = self.last(states[-1])
        for state, taken, join in zip(states, self.taken, self.joins, strict=False):  # the last has none
            if not taken.now():
                total = join(total, state)
        return total

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        yield "last", self.last, Condition((), _always)
        for state, (taken, join) in enumerate(zip(self.taken, self.joins, strict=True)):
            labels = tuple(leaf.name() for leaf in taken.leaves())
            yield str(state), join, Condition(labels, partial(_is_left, taken), taken)

    def run_all(self, call: BranchCall, states: Sequence[Tensor]) -> Any:
        first, *others = self.branches()
        total = call(*first, states[-1])
        for state, branch in enumerate(others):
            total = call(*branch, total, states[state])
        return total

    def check_can_mix(self) -> None:
        """Raises ``ValueError``: which states are left has no mixture."""
        raise ValueError(_NO_MIXTURE)

    def frozen(self, freezer: Freezer) -> nn.Module:
        left = [state for state, taken in enumerate(self.taken) if not taken.of(freezer.architecture)]
        joins = {state: freezer(self.joins[state]) for state in left}
        chosen = ChosenSum(freezer(self.last), joins)
        chosen.training = self.training
        return chosen


@final
class ChosenSum(nn.Module):
    """What a `SumOfLeft` becomes in a subnet."""

    def __init__(self, last: nn.Module, joins: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.last = last
        self.states = tuple(joins)
        self.joins = nn.ModuleList(joins.values())

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        total: Tensor = self.last(states[-1])
        for state, join in zip(self.states, self.joins, strict=True):
            total = join(total, states[state])
        return total


@final
class JoinProjected(nn.Module):
    """The sum of a tensor and the projection of another."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = Projection(channels)

    def forward(self, total: Tensor, other: Tensor) -> Tensor:
        joined: Tensor = total + self.project(other)
        return joined


@final
class JoinOfLeft(Freezes, nn.Module):
    """The concatenation of the states that no node takes; inputs of the cell are halved where it reduces."""

    def __init__(self, channels: int, inputs: Sequence[ValueChoice], stride: int) -> None:
        super().__init__()
        # From the last node back: what takes a node is known when its turn comes.
        steps = [(choice, partial(_passed, node)) for node, choice in enumerate(inputs, start=2)][::-1]
        self.left = Fold("states that are left", (frozenset(), ()), steps, _inputs_passed)
        self.resize = nn.ModuleList(
            FactorizedReduce(channels, channels) if stride == 2 else nn.Identity() for _ in range(2)
        )

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        left = self.left.now()
        return torch.cat([self.resize[s](states[s]) if s < 2 else states[s] for s in left], dim=1)

    def check_can_mix(self) -> None:
        """Raises ``ValueError``: which states are left has no mixture."""
        raise ValueError(_NO_MIXTURE)

    def frozen(self, freezer: Freezer) -> nn.Module:
        left = self.left.of(freezer.architecture)
        chosen = ChosenJoin(left, {state: freezer(self.resize[state]) for state in left if state < 2})
        chosen.training = self.training
        return chosen


@final
class ChosenJoin(nn.Module):
    """What a `JoinOfLeft` becomes in a subnet."""

    def __init__(self, left: tuple[int, ...], resize: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.left = left
        self.resize = nn.ModuleDict({str(state): module for state, module in resize.items()})

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [self.resize[str(s)](states[s]) if str(s) in self.resize else states[s] for s in self.left], dim=1
        )


_NO_MIXTURE = (
    "a cell of ENASMicro returns other states for other inputs of its nodes, which have no weighted sum; "
    "search with a strategy that runs one path (RandomOneShot, ENAS)"
)


def _nodes(
    name: str, channels: int, inputs: Sequence[ValueChoice], stride: int, drop_path: float
) -> nn.ModuleList:
    return nn.ModuleList(
        Node(f"{name}.{index}", index, channels, choice, stride, drop_path)
        for index, choice in enumerate(inputs, start=2)
    )


def _resized(in_channels: Width, channels: int, halves: bool) -> nn.Sequential:
    """ReLU, then a convolution (or a factorized reduction) to a cell's width, and BatchNorm."""
    if not halves:
        return nn.Sequential(
            nn.ReLU(), Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
    if isinstance(in_channels, int):
        return nn.Sequential(nn.ReLU(), FactorizedReduce(in_channels, channels))
    return nn.Sequential(nn.ReLU(), ElasticReduce(in_channels, channels))


@final
class ElasticReduce(nn.Module):
    """A `FactorizedReduce` whose input width is a value."""

    def __init__(self, in_channels: Value, out_channels: int) -> None:
        super().__init__()
        self.even = Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.odd = Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        shifted = nn.functional.pad(features, (0, 1, 0, 1))[:, :, 1:, 1:]
        reduced: Tensor = self.norm(torch.cat([self.even(features), self.odd(shifted)], dim=1))
        return reduced


def _operations(channels: int, stride: int, drop_path: float) -> dict[str, nn.Module]:
    average = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    return {
        "sep_conv_3x3": _separable(channels, 3, stride, drop_path),
        "sep_conv_5x5": _separable(channels, 5, stride, drop_path),
        "avg_pool_3x3": nn.Sequential(average, DropPath(drop_path)),
        "max_pool_3x3": nn.Sequential(nn.MaxPool2d(3, stride, padding=1), DropPath(drop_path)),
        "identity": nn.Identity() if stride == 1 else FactorizedReduce(channels, channels),
    }


def _separable(channels: int, size: int, stride: int, drop_path: float) -> nn.Module:
    """A depthwise and a pointwise convolution, twice over."""
    layers: list[nn.Module] = []
    for step in (stride, 1):
        layers += [
            nn.ReLU(),
            nn.Conv2d(channels, channels, size, step, size // 2, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
    return nn.Sequential(*layers, DropPath(drop_path))


# ---- what is left: functions that `partial` binds, not lambdas, for a space must survive pickling


Passed = tuple[frozenset[int], tuple[int, ...]]
"""From a node on: which states before it are taken, and which are left."""


def _passed(node: int, state: Passed, inputs: tuple[int, int]) -> Passed:
    taken, left = state
    return (taken - {node}).union(inputs), left if node in taken else (node, *left)


def _inputs_passed(state: Passed) -> tuple[int, ...]:
    taken, left = state
    return (*(source for source in (0, 1) if source not in taken), *left)


def _width_of(channels: int, left: tuple[int, ...]) -> int:
    return channels * len(left)


def _takes_it(state: int, taken: bool, inputs: tuple[int, int]) -> bool:
    return taken or state in inputs


def _is_left(taken: Fold, architecture: Mapping[str, Option]) -> bool:
    return not taken.read(architecture)


def _takes(label: str, place: int, state: int, architecture: Mapping[str, Option]) -> bool:
    return bool(architecture[label][place] == state)


def _always(architecture: Mapping[str, Option]) -> bool:
    return True


_MICRO = "0 2 0 0 0 4 0 1 0 4 1 1 1 0 0 1 0 2 1 1 1 0 1 0 0 3 0 2 1 1 3 1 1 0 0 4 0 3 1 1"
ENASMicro.published = {
    "micro": Published(
        ENASMicro.architecture_of(_MICRO),
        (3, 32, 32),
        620_907_552,
        3_894_372,
        "4.6 M (table 1)",
        "melodyguan/enas, scripts/cifar10_micro_final.sh and src/cifar10/micro_child.py",
        {"channels": 36, "cells": 15, "derived": True, "drop_path": 0.4, "dropout": 0.2},
        "counted on our network, which follows that source; it was not run. It stacks 15 cells; with 18 it "
        "has 4,587,372 parameters, the paper's 4.6 M. The auxiliary head (494,848) is left out, as in "
        "the number that the source prints",
    )
}
