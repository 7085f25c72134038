"""The macro space of ENAS: the operation of every layer, and which earlier layers it also sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from hwnas.choices import BranchCall, Branching, Condition, LayerChoice, run_child
from hwnas.freezing import Freezer
from hwnas.gate import mixture
from hwnas.spaces.published import Published, published_network
from hwnas.values import ValueChoice, combinations, weights_of
from profilers.space import Architecture, Option

OPERATIONS = ("conv_3x3", "sep_conv_3x3", "conv_5x5", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3")
"""In the order of the numbers in the authors' scripts."""


@final
class ENASMacro(nn.Module):
    """The macro space of ENAS (arXiv 1802.03268, section 2.3, appendix C.1).

    A chain of layers, each with one of six operations on the output of the layer before it
    (``"layer<l>.op"``), and a switch for each output before that one (``"layer<l>.skip<i>"``, where 0 is the
    stem's), which is added where the switch is on. After one and two thirds of the layers everything so far
    is halved in resolution.

    Shapes: ``(N, in_channels, H, W)``, any H and W from 4 up (32 for CIFAR), to ``(N, num_classes)``. With 12
    layers there are 6^12 * 2^66 = 1.6 * 10^29 networks, as the paper says.

    The authors search one network and train another (melodyguan/enas, ``src/cifar10/general_child.py``:
    ``_enas_layer`` and ``_fixed_layer``). ``derived=True`` is the second one, for the same architectures:

    - its operations begin with the ReLU, not end with it, and a separable convolution is a full one;
    - what a layer sees is concatenated, and goes through a ReLU and a 1x1 convolution; here it is summed;
    - the width is doubled where the resolution is halved.

    Departures: the convolution of a concatenation is written as the sum of one convolution each, which is the
    same, with as many multiply-adds and parameters. Poolings, which their derived network has no code for,
    stand behind a 1x1 convolution there as well. BatchNorm's epsilon is torch's (theirs: 1e-3). Where the
    resolution is halved, an output that no layer sees later is left out and costs nothing; they keep
    parameters for it (in the published network every output is seen).

    The paper's 21.3 M and 38.0 M parameters (table 1) are of another network than the authors released: of
    12 layers, drawn in figure 7 and not written down, with 512 channels in its last ones where it has 38.0 M.
    The released one has 24 layers of 96 to 384 channels. By the same code 12 layers of 128 to 512 channels
    have from 16,507,776 parameters (3x3 convolutions, no skips) to 50,029,440 (5x5, all skips).

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        channels: of all layers (with ``derived``, of the first ones).
        layers: how many, at least 3.
        derived: see above.
        dropout: before the classifier.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(ENASMacro(channels=4)).size == 6**12 * 2**66
    True
    """

    published: ClassVar[Mapping[str, Published]]  # below: it is made of the authors' notation

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> ENASMacro:
        """Six layers of 16 channels."""
        return cls(num_classes, in_channels, channels=16, layers=6)

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name (``"macro"``), with new weights.

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
            numbers: for each layer the number of its operation and a 0 or 1 for each earlier output but the
                last.

        Raises:
            ValueError: they do not end with a layer, or an operation or switch does not exist.
        """
        left = [int(number) for number in (numbers.split() if isinstance(numbers, str) else numbers)]
        architecture: Architecture = {}
        layer = 0
        while left:
            (operation, *skips), left = left[: layer + 1], left[layer + 1 :]
            if len(skips) != layer or not {*skips} <= {0, 1} or not 0 <= operation < len(OPERATIONS):
                raise ValueError(
                    f"layer {layer} is the number of an operation, 0 to {len(OPERATIONS) - 1}, and {layer} "
                    f"times 0 or 1; got {[operation, *skips]}"
                )
            architecture[f"layer{layer}.op"] = OPERATIONS[operation]
            architecture |= {f"layer{layer}.skip{i}": bool(skip) for i, skip in enumerate(skips)}
            layer += 1
        return architecture

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: int = 36,
        layers: int = 12,
        derived: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if layers < 3 or channels % 2:
            raise ValueError(
                f"ENASMacro has at least 3 layers and an even number of channels; got {layers} and {channels}"
            )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        switches = [
            [ValueChoice([False, True], f"layer{layer}.skip{i}") for i in range(layer)]
            for layer in range(layers)
        ]
        third = layers // 3
        self.layers = nn.ModuleList()
        self.reductions = nn.ModuleDict()
        for index in range(layers):
            self.layers.append(Layer(index, channels, switches[index], derived))
            if index in (third - 1, 2 * third - 1):
                before, channels = channels, channels * 2 if derived else channels
                seen_by = [[of[i] for of in switches[index + 1 :]] for i in range(index + 1)]
                self.reductions[str(index)] = Reductions(before, channels, seen_by)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        outputs = [self.stem(images)]
        for index, layer in enumerate(self.layers):
            outputs.append(layer(outputs))
            if str(index) in self.reductions:
                outputs = self.reductions[str(index)](outputs)
        scores: Tensor = self.classifier(self.head(outputs[-1]))
        return scores


@final
class Layer(nn.Module):
    """One operation, and the earlier outputs that are added to it.

    Shapes: a list of ``index + 1`` tensors ``(N, channels, H, W)`` to one of them.
    """

    def __init__(self, index: int, channels: int, switches: Sequence[ValueChoice], derived: bool) -> None:
        super().__init__()
        make = _derived_operation if derived else _operation
        self.op = LayerChoice({name: make(name, channels) for name in OPERATIONS}, label=f"layer{index}.op")
        self.is_first = index == 0
        if index > 0:
            self.own = Projection(channels) if derived else nn.Identity()
            self.skips = Skips(channels, switches, derived)
            self.norm = nn.BatchNorm2d(channels)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        output: Tensor = self.op(outputs[-1])
        if not self.is_first:
            output = self.norm(self.skips(self.own(output), outputs[:-1]))
        return output


@final
class Skips(Branching):
    """Adds those of some tensors that are switched on.

    Shapes: ``(N, channels, H, W)`` and a list of such tensors, one for each switch, to one.
    """

    def __init__(self, channels: int, switches: Sequence[ValueChoice], derived: bool) -> None:
        super().__init__()
        self.switches = list(switches)
        self.joins = nn.ModuleList(Join(channels, derived) for _ in switches)

    def forward(self, output: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        for switch, join, other in zip(self.switches, self.joins, earlier, strict=True):
            found = combinations({"is_on": switch})
            outputs = [
                run_child(join, one.is_picked, (output, other), {}) if one.values["is_on"] else output
                for one in found
            ]
            mixes = found[0].is_mixed
            output = mixture(weights_of(found), outputs, f"skips of {switch!r}") if mixes else outputs[0]
        return output

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        for index, (switch, join) in enumerate(zip(self.switches, self.joins, strict=True)):
            yield str(index), join, _any_is_on([switch])

    def run_all(self, call: BranchCall, output: Tensor, earlier: Sequence[Tensor]) -> Any:
        for branch, other in zip(self.branches(), earlier, strict=True):
            output = call(*branch, output, other)
        return output

    def check_can_mix(self) -> None:
        """Always possible."""

    def frozen(self, freezer: Freezer) -> nn.Module:
        is_on = [switch.of(freezer.architecture) for switch in self.switches]
        chosen = ChosenSkips({i: freezer(join) for i, join in enumerate(self.joins) if is_on[i]})
        chosen.training = self.training  # not train(), which would reach the joins
        return chosen

    def extra_repr(self) -> str:
        return f"switches={self.switches!r}"


@final
class ChosenSkips(nn.Module):
    """What `Skips` become in a subnet."""

    def __init__(self, joins: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.sources = tuple(joins)
        self.joins = nn.ModuleList(joins.values())

    def forward(self, output: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        for source, join in zip(self.sources, self.joins, strict=True):
            output = join(output, earlier[source])
        return output


@final
class Reductions(Branching):
    """Halves the resolution of all outputs that a later layer sees.

    Shapes: a list of tensors ``(N, in_channels, H, W)`` to a list of ``(N, out_channels, H / 2, W / 2)``,
    with None in place of those that none sees.

    Args:
        in_channels, out_channels: of each output.
        seen_by: for each output but the last one, which the next layer takes, the switches of later layers.
    """

    def __init__(self, in_channels: int, out_channels: int, seen_by: Sequence[Sequence[ValueChoice]]) -> None:
        super().__init__()
        self.seen_by = [list(switches) for switches in seen_by]
        self.reduce = nn.ModuleList(
            FactorizedReduce(in_channels, out_channels) for _ in range(len(seen_by) + 1)
        )

    def forward(self, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        is_seen = [
            any(one.values["is_on"] for switch in switches for one in combinations({"is_on": switch}))
            for switches in self.seen_by
        ]
        pairs = zip(self.reduce, [*is_seen, True], outputs, strict=True)
        return [reduce(output) if seen else None for reduce, seen, output in pairs]

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        for index, (switches, reduce) in enumerate(zip(self.seen_by, self.reduce, strict=False)):
            yield str(index), reduce, _any_is_on(switches)
        yield str(len(self.seen_by)), self.reduce[-1], _any_is_on([], always=True)

    def run_all(self, call: BranchCall, outputs: Sequence[Tensor]) -> Any:
        return [call(*branch, output) for branch, output in zip(self.branches(), outputs, strict=True)]

    def check_can_mix(self) -> None:
        """Always possible: what may be seen is there."""

    def frozen(self, freezer: Freezer) -> nn.Module:
        is_seen = [any(switch.of(freezer.architecture) for switch in switches) for switches in self.seen_by]
        chosen = ChosenReductions(
            [freezer(r) if seen else None for r, seen in zip(self.reduce, [*is_seen, True], strict=True)]
        )
        chosen.training = self.training
        return chosen


@final
class ChosenReductions(nn.Module):
    """What `Reductions` become in a subnet."""

    def __init__(self, reduce: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.is_seen = [module is not None for module in reduce]
        self.reduce = nn.ModuleDict({str(i): module for i, module in enumerate(reduce) if module is not None})

    def forward(self, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        return [self.reduce[str(i)](output) if self.is_seen[i] else None for i, output in enumerate(outputs)]


@final
class Join(nn.Module):
    """The sum of two tensors; with ``derived`` the second is projected first."""

    def __init__(self, channels: int, derived: bool) -> None:
        super().__init__()
        self.project = Projection(channels) if derived else nn.Identity()

    def forward(self, total: Tensor, other: Tensor) -> Tensor:
        joined: Tensor = total + self.project(other)
        return joined


@final
class Projection(nn.Module):
    """ReLU and a 1x1 convolution that keeps the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.convolution(features.relu())
        return projected


@final
class FactorizedReduce(nn.Module):
    """Halves the resolution by two convolutions on every second position, one of them shifted by one.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 2, W / 2)``, rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        shifted = nn.functional.pad(features, (0, 1, 0, 1))[:, :, 1:, 1:]
        reduced: Tensor = self.norm(torch.cat([self.even(features), self.odd(shifted)], dim=1))
        return reduced


def _operation(name: str, channels: int) -> nn.Module:
    point = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    if name.endswith("pool_3x3"):
        return nn.Sequential(*point, _pooling(name))
    size = int(name[-1])
    convolutions: list[nn.Module] = [nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)]
    if name.startswith("sep"):
        depthwise = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
        convolutions = [depthwise, nn.Conv2d(channels, channels, 1, bias=False)]
    return nn.Sequential(*point, *convolutions, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _derived_operation(name: str, channels: int) -> nn.Module:
    point = nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
    if name.endswith("pool_3x3"):
        return nn.Sequential(*point, _pooling(name))
    size = int(name[-1])
    convolution = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
    return nn.Sequential(*point, nn.ReLU(inplace=True), convolution, nn.BatchNorm2d(channels))


def _pooling(name: str) -> nn.Module:
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride=1, padding=1)
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _any_is_on(switches: Sequence[ValueChoice], always: bool = False) -> Condition:
    labels = tuple(switch.name() for switch in switches)
    return Condition(labels, partial(_is_any, labels, always))


# Bound by `partial`, not by a lambda: a space must survive pickling.
def _is_any(labels: Sequence[str], always: bool, architecture: Mapping[str, Option]) -> bool:
    return always or any(architecture[label] for label in labels)


_MACRO = """
    0
    3 0
    0 1 0
    2 0 0 1
    2 0 0 0 0
    3 1 1 0 1 0
    2 0 0 0 0 0 1
    2 0 1 1 0 1 1 1
    1 0 1 1 1 0 1 0 1
    0 0 0 0 0 0 0 0 0 0
    2 0 0 0 0 0 1 0 0 0 0
    0 1 0 0 1 1 0 0 0 0 1 1
    2 0 1 0 0 0 0 0 1 0 1 1 0
    1 0 0 1 0 0 0 1 1 1 0 1 0 1
    0 1 1 0 1 0 1 0 0 0 0 0 1 0 0
    2 0 0 1 0 0 0 0 0 0 0 1 0 1 0 1
    2 0 1 0 0 0 1 0 0 1 1 1 1 0 0 1 0
    2 0 0 0 0 1 0 1 0 1 0 0 1 0 1 0 0 1
    3 0 1 1 0 1 0 0 0 0 0 1 0 1 0 1 0 0 0
    3 0 1 1 0 0 0 0 0 0 0 0 0 1 1 0 0 0 0 1
    0 1 0 0 1 0 1 1 0 0 0 1 0 0 0 0 0 1 1 0 0
    3 0 1 0 1 1 0 0 1 0 1 1 0 1 1 0 1 0 0 1 0 0
    0 1 0 1 0 1 0 0 0 0 0 0 0 0 1 0 1 0 0 1 0 0 0
    0 1 1 0 0 0 1 1 1 0 1 0 0 0 1 0 1 0 0 1 1 0 0 0
"""
ENASMacro.published = {
    "macro": Published(
        ENASMacro.architecture_of(_MACRO),
        (3, 32, 32),
        5_646_094_080,
        42_559_392,
        "21.3 M, with more channels 38.0 M (table 1)",
        "melodyguan/enas, scripts/cifar10_macro_final.sh and src/cifar10/general_child.py",
        {"channels": 96, "layers": 24, "derived": True, "dropout": 0.5},
        "counted on our network, which follows that source; it was not run. The paper's figures are of "
        "another network, of 12 layers, which it draws (figure 7) and does not write down",
    )
}
