"""NAS-Bench-201: one cell of six edges, all of whose 15,625 networks others have trained."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from hwnas.choices import BranchCall, Branching, Condition, reduce_inputs, run_child
from hwnas.freezing import Freezer
from hwnas.gate import mixture
from hwnas.space import ModelSpace
from hwnas.spaces.batch_norm import UnscaledBatchNorm2d
from hwnas.spaces.published import Published, published_network
from hwnas.values import Combination, ValueChoice, combinations, weights_of
from profilers.space import Architecture, Option

Edge = tuple[int, int]

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES: tuple[Edge, ...] = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""From node to node: node 0 is the cell's input, node 3 its output."""

NONE = "none"
_LAST = 3


@final
class SearchedCell(Branching):
    """Four nodes, each the sum of one operation on every node before it.

    Shapes: ``(N, channels, H, W)`` to the same.

    An edge runs where it is *live*: its operation is not ``"none"``, something feeds its source, and its
    target leads to the cell's output. What is not live is not in the subnet and costs nothing. What would be
    computed twice (the pooling of one tensor on two edges, or the same sum) is computed, and costs, once, as
    in runtimes for graphs. A cell whose input does not reach its output returns zeros. Under mixing weights
    an edge is the weighted sum of its operations.

    Args:
        channels: of input and output.
        choices: the decision on each of `EDGES`, between names of `OPERATIONS`.
    """

    def __init__(self, channels: int, choices: Mapping[Edge, ValueChoice]) -> None:
        super().__init__()
        self.choices = dict(choices)
        self.operations = nn.ModuleDict(
            {_label(edge): _operations(channels, choice.options) for edge, choice in choices.items()}
        )
        self.add = Add()

    def forward(self, features: Tensor) -> Tensor:
        found = {edge: combinations({"operation": choice}) for edge, choice in self.choices.items()}
        live = _live([edge for edge, of in found.items() if any(_name(one) != NONE for one in of)])
        states = {0: features}
        for node in range(1, _LAST + 1):
            into = [edge for edge in live if edge[1] == node]
            if into:
                states[node] = reduce_inputs([self._run(e, found[e], states[e[0]]) for e in into], "sum")
        return states[_LAST] if _LAST in states else features * 0.0

    def _run(self, edge: Edge, found: Sequence[Combination], state: Tensor) -> Tensor:
        outputs = [
            torch.zeros_like(state)
            if _name(combination) == NONE
            else run_child(self._operation(edge, _name(combination)), combination.is_picked, (state,), {})
            for combination in found
        ]
        if not found[0].is_mixed:
            return cast("Tensor", outputs[0])
        return mixture(weights_of(found), outputs, f"operations of {self.choices[edge]!r}")

    def _operation(self, edge: Edge, name: str) -> nn.Module:
        return cast("nn.ModuleDict", self.operations[_label(edge)])[name]

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        names = tuple(choice.name() for choice in self.choices.values())
        for edge, choice in self.choices.items():
            for name in choice.options:
                if name != NONE:
                    yield f"{_label(edge)}.{name}", self._operation(edge, name), _runs(names, edge, name)
        for edge in self.choices:
            if edge[0] > 0:
                yield f"{_label(edge)}.add", self.add, _adds(names, edge)

    def run_all(self, call: BranchCall, features: Tensor) -> Any:
        state = features
        for branch in self.branches():
            state = call(*branch, *((state, state) if branch[1] is self.add else (features,)))
        return state

    def check_can_mix(self) -> None:
        """Always possible."""

    def frozen(self, freezer: Freezer) -> nn.Module:
        chosen = {edge: choice.of(freezer.architecture) for edge, choice in self.choices.items()}
        work = _work(tuple(chosen.values()))
        operations = {
            edge: freezer(self._operation(edge, chosen[edge]))
            for edge, first in work.first.items()
            if edge == first
        }
        cell = ChosenCell(operations, work.first)
        cell.training = self.training  # not train(), which would reach the operations
        return cell

    def extra_repr(self) -> str:
        return ", ".join(f"{_label(edge)}={choice!r}" for edge, choice in self.choices.items())


@final
class ChosenCell(nn.Module):
    """What a `SearchedCell` becomes in a subnet: the operations on its live edges, none of them twice.

    Args:
        operations: those that are computed, by edge.
        edges: each live edge, in the order of `EDGES`, with the edge that computes what it gives.
    """

    def __init__(self, operations: Mapping[Edge, nn.Module], edges: Mapping[Edge, Edge]) -> None:
        super().__init__()
        self.edges = dict(edges)
        self.operations = nn.ModuleDict({_label(edge): found for edge, found in operations.items()})

    def forward(self, features: Tensor) -> Tensor:
        states, outputs = {0: features}, dict[Edge, Tensor]()
        for edge, first in self.edges.items():
            source, target = edge
            if first not in outputs:
                outputs[first] = self.operations[_label(first)](states[source])
            states[target] = states[target] + outputs[first] if target in states else outputs[first]
        return states[_LAST] if _LAST in states else features * 0.0


@final
class Add(nn.Module):
    """The sum of two tensors."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


@final
class Reduction(nn.Module):
    """The residual block between stages (arXiv 1512.03385).

    Shapes: ``(N, channels, H, W)`` to ``(N, 2 * channels, H / 2, W / 2)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, 2 * channels, 3, nn.BatchNorm2d(2 * channels), stride=2)
        self.second = _convolution(2 * channels, 2 * channels, 3, nn.BatchNorm2d(2 * channels))
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(channels, 2 * channels, kernel_size=1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.shortcut(features) + self.second(self.first(features))
        return output


@final
class NASBench201(nn.Module):
    """The topology space of NAS-Bench-201 and NATS-Bench (arXiv 2001.00326, section 2.1; 2009.00437).

    Three stages of equal cells; between them a residual block halves the resolution and doubles the width.
    All cells share six decisions, labelled ``"0-1"`` to ``"2-3"``: the operation on the edge from one node to
    another. Any cell, written as in the benchmark, names a network for `from_published`; `architecture_of`
    and `cell_of` go from that notation to architectures and back.

    Shapes: ``(N, in_channels, H, W)`` with H and W multiples of 4 (32 for CIFAR, 16 for ImageNet16-120), to
    ``(N, num_classes)``. There are 5^6 = 15,625 networks, of which many compute the same.

    From the authors' code (D-X-Y/AutoDL-Projects, ``cell_operations.py``, ``tiny_network.py``) it differs in
    this:

    - Edges that cannot reach the cell's output, or that only zeros feed, are left out and cost nothing. The
      benchmark runs and counts them, so that its figures are higher for such cells. A convolution that only
      zeros feed gives a constant there, the shift of its BatchNorm; here it gives nothing.
    - The benchmark's FLOPs are the multiply-adds that are counted here, and one more a class: the bias of the
      last layer.
    - BatchNorm in the cells has no learned scale and shift while searched, as in the authors' search code,
      and both in a subnet, as in the benchmark. Their search code also gives its convolutions a bias, which
      BatchNorm takes out again, and keeps no running statistics; here convolutions have none, and statistics
      are kept, for they are what is recalibrated.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        channels: of the first stage.
        cells: in each stage.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(NASBench201()).size
    15625
    """

    published: ClassVar[Mapping[str, Published]]  # below: it is made of architectures

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> NASBench201:
        """One cell a stage, 8 channels."""
        return cls(num_classes, in_channels, channels=8, cells=1)

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of any cell, with new weights.

        Args:
            name: ``"|nor_conv_3x3~0|+|none~0|skip_connect~1|+|..."``
            arguments: of the class.

        Raises:
            ValueError: it is no cell.
        """
        if "|" not in name:
            return published_network(cls, name, arguments)
        return ModelSpace(cls(**arguments)).freeze(cls.architecture_of(name))

    @staticmethod
    def architecture_of(cell: str) -> Architecture:
        """The architecture that a cell in the benchmark's notation names.

        Raises:
            ValueError: it is no cell.

        >>> NASBench201.architecture_of("|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|")["0-3"]
        'skip_connect'
        """
        nodes = [re.findall(r"([^|~]+)~(\d)", node) for node in cell.split("+")]
        found = {
            (int(source), target): name for target, node in enumerate(nodes, start=1) for name, source in node
        }
        if tuple(found) != EDGES or not set(found.values()) <= set(OPERATIONS) or _written(found) != cell:
            example = _written(dict.fromkeys(EDGES, "nor_conv_3x3"))
            raise ValueError(
                f"a cell of NAS-Bench-201 is written like {example!r}, with operations out of "
                f"{', '.join(OPERATIONS)}; got {cell!r}"
            )
        return {_label(edge): name for edge, name in found.items()}

    @staticmethod
    def cell_of(architecture: Mapping[str, Option]) -> str:
        """An architecture in the benchmark's notation."""
        return _written({edge: architecture[_label(edge)] for edge in EDGES})

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, channels: int = 16, cells: int = 5
    ) -> None:
        super().__init__()
        choices = {edge: ValueChoice(OPERATIONS, label=_label(edge)) for edge in EDGES}
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        layers: list[nn.Module] = []
        for stage in range(3):
            width = channels * 2**stage
            if stage > 0:
                layers.append(Reduction(width // 2))
            layers += [SearchedCell(width, choices) for _ in range(cells)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(
            nn.BatchNorm2d(4 * channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(4 * channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.last(self.layers(self.stem(images))))
        return logits


def _operations(channels: int, names: Iterable[str]) -> nn.ModuleDict:
    found: dict[str, nn.Module] = {
        "skip_connect": nn.Identity(),
        "nor_conv_1x1": _convolution(channels, channels, 1, UnscaledBatchNorm2d(channels)),
        "nor_conv_3x3": _convolution(channels, channels, 3, UnscaledBatchNorm2d(channels)),
        "avg_pool_3x3": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    }
    return nn.ModuleDict({name: found[name] for name in names if name != NONE})


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, norm: nn.Module, stride: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), convolution, norm)


def _label(edge: Edge) -> str:
    return f"{edge[0]}-{edge[1]}"


def _name(combination: Combination) -> str:
    return cast("str", combination.values["operation"])


def _written(names: Mapping[Edge, str]) -> str:
    nodes = ["".join(f"|{names[edge]}~{edge[0]}" for edge in EDGES if edge[1] == node) for node in (1, 2, 3)]
    return "+".join(f"{node}|" for node in nodes)


# ---- which edges are live


def _live(running: Sequence[Edge]) -> list[Edge]:
    """Those that lie on a path from the cell's input to its output; in the order of `EDGES`."""
    fed, used = {0}, {_LAST}
    for source, target in running:
        if source in fed:
            fed.add(target)
    for source, target in reversed(running):
        if target in used:
            used.add(source)
    return [(source, target) for source, target in running if source in fed and target in used]


@final
@dataclass(frozen=True)
class _Work:
    """What a cell computes.

    Attributes:
        first: each live edge, with the first edge that gives the same: itself, but where a tensor is pooled
            again.
        adds: the edges whose sum with those before them, into one node, is computed.
    """

    first: dict[Edge, Edge]
    adds: frozenset[Edge]


@functools.cache
def _work(operations: tuple[str, ...]) -> _Work:
    """What a cell of these operations, in the order of `EDGES`, computes."""
    chosen = dict(zip(EDGES, operations, strict=True))
    first: dict[Edge, Edge] = {}
    adds = set[Edge]()
    # Each value by how it came about: equal ones are one tensor.
    states: dict[int, Any] = {0: "input"}
    pooled: dict[Any, Edge] = {}
    summed = set[Any]()
    for edge in _live([edge for edge, name in chosen.items() if name != NONE]):
        source, target = edge
        first[edge], value = edge, cast("Any", edge)
        if chosen[edge] == "skip_connect":
            value = states[source]
        elif chosen[edge] == "avg_pool_3x3":
            first[edge] = pooled.setdefault(states[source], edge)
            value = first[edge]
        if target in states:
            value = (states[target], value)
            if value not in summed:
                adds.add(edge)
            summed.add(value)
        states[target] = value
    return _Work(first, frozenset(adds))


def _deciding(edge: Edge) -> tuple[Edge, ...]:
    """The edges whose operations say whether this one is live: itself, those before it, those after it."""
    source, target = edge
    return tuple(other for other in EDGES if other == edge or other[1] <= source or other[0] >= target)


Names = tuple[str, ...]
"""The labels of the choices, in the order of `EDGES`."""


@functools.cache
def _runs(names: Names, edge: Edge, operation: str) -> Condition:
    """The edge computes that operation. Equal cells share the condition."""
    # What was pooled before depends on all edges.
    deciding = EDGES if operation == "avg_pool_3x3" and edge != EDGES[0] else _deciding(edge)
    return Condition(_labels(names, deciding), partial(_is_running, names, edge, operation))


@functools.cache
def _adds(names: Names, edge: Edge) -> Condition:
    """The edge's sum with those before it, into its node, is computed."""
    return Condition(names, partial(_is_adding, names, edge))


def _labels(names: Names, edges: Iterable[Edge]) -> tuple[str, ...]:
    among = set(edges)
    return tuple(name for edge, name in zip(EDGES, names, strict=True) if edge in among)


# Bound by `partial`, not by a lambda: a space must survive pickling.
def _is_running(names: Names, edge: Edge, operation: str, architecture: Mapping[str, Option]) -> bool:
    if architecture[names[EDGES.index(edge)]] != operation:
        return False
    return _work(_chosen(names, architecture)).first.get(edge) == edge


def _is_adding(names: Names, edge: Edge, architecture: Mapping[str, Option]) -> bool:
    return edge in _work(_chosen(names, architecture)).adds


def _chosen(names: Names, architecture: Mapping[str, Option]) -> tuple[str, ...]:
    """The operations in the order of `EDGES`; what the architecture does not name is none."""
    return tuple([cast("str", architecture.get(name, NONE)) for name in names])


# ---- some cells whose figures stand in public records of the benchmark; macs are its FLOPs less 10


def _published(cell: str, macs: int, params: int, reported: str, source: str) -> dict[str, Published]:
    note = "the FLOPs hold one for each class: the bias of the last layer"
    return {
        cell: Published(
            NASBench201.architecture_of(cell), (3, 32, 32), macs, params, reported, source, note=note
        )
    }


NASBench201.published = {
    **_published(
        "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|",
        15_647_360,
        129_306,
        "15.64737 MFLOPs (index 0)",
        "D-X-Y/NATS-Bench issue 24; parameters counted on the code of D-X-Y/AutoDL-Projects",
    ),
    **_published(
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|",
        113_951_360,
        802_426,
        "113.95 MFLOPs, 0.802 M (index 1)",
        "D-X-Y/NATS-Bench issue 18",
    ),
    **_published(
        "|skip_connect~0|+|none~0|nor_conv_3x3~1|+|avg_pool_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
        113_951_360,
        802_426,
        "113.95137 MFLOPs, 0.802426 M",
        "D-X-Y/NATS-Bench issue 36",
    ),
}
