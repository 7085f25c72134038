"""The cells of DARTS: a normal one and one that halves the resolution, stacked into a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.cell import Cell
from hwnas.spaces.batch_norm import UnscaledBatchNorm2d
from hwnas.spaces.drop_path import DropPath
from hwnas.spaces.published import Published, published_network
from profilers.space import Architecture, Option

Genotype = Mapping[str, Sequence[tuple[str, int]]]
"""``"normal"`` and ``"reduce"``: operation and source of both edges into each node, node after node."""

NODES = range(2, 6)
"""Of a cell; states 0 and 1 are the outputs of the two cells before it."""


@final
class DARTSCells(nn.Module):
    """The convolutional space of DARTS (arXiv 1806.09055, section 3.1.1, appendix A.2).

    A chain of cells, of which the two at one and two thirds of it halve the resolution and double the width.
    A cell takes the outputs of the two before it. Each of its four nodes adds up the outputs of two of seven
    operations (or ``"none"``) on states before it; the nodes are concatenated. Normal cells are one decision,
    labelled ``"normal.…"``, and the others one, ``"reduce.…"`` (see `Cell`).

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``, with H and W multiples of 4 with the stem for
    CIFAR (32; with the auxiliary head 28 to 40) and of 32 with the stem for ImageNet (224). In training with
    ``auxiliary``, a pair: these scores, and those of the auxiliary head. There are (8^8 * 3 * 6 * 10)^2 =
    9,119,789,245,425,254,400 networks; the paper counts 10^18, without ``"none"``.

    The search follows the authors' code (quark0/darts, ``cnn/model_search.py``): 16 channels and 8 cells,
    BatchNorm without learned scale and shift in the cells, and such a BatchNorm behind each pooling. What is
    derived has scale and shift (``cnn/model.py``); the subnet's start at 1 and 0, so that it computes what
    its path computed. For the same reason it keeps what stands behind a pooling, which learns nothing. To
    train an architecture as the authors do, take it from a larger space without that and with their other
    additions::

        larger = ModelSpace(DARTSCells(channels=36, cells=20, pooling_norm=False, auxiliary=True))
        network = larger.freeze(architecture)

    Departures: the auxiliary head averages over windows of 5x5 as theirs, at the stride that leaves 2x2 of
    them (theirs for 8x8 and 7x7, and no other size works there), and the last pooling takes any size. Drop
    path stands behind every operation but the identity, as theirs; `set_drop_path` sets its probability.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        channels: of the first cells' nodes.
        cells: how many.
        stem: ``"cifar"`` keeps the resolution; ``"imagenet"`` divides it by 8.
        pooling_norm: whether BatchNorm stands behind each pooling.
        auxiliary: whether there is an auxiliary head, at two thirds of the chain.
        drop_path: probability that an operation is left out for an image, in training.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(DARTSCells(channels=4, cells=3)).size
    9119789245425254400
    """

    published: ClassVar[Mapping[str, Published]]  # below: it is made of genotypes

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> DARTSCells:
        """Three cells, 8 channels: one normal cell and two that halve the resolution."""
        return cls(num_classes, in_channels, channels=8, cells=3)

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of a paper's cells, with new weights.

        Args:
            name: ``"darts-v1"`` (searched with the first order), ``"darts-v2"`` (second), or these with
                ``"-imagenet"``.
            arguments: of the class, over those of the paper.

        Raises:
            ValueError: there is no network of that name.
        """
        return published_network(cls, name, arguments)

    @staticmethod
    def architecture_of(genotype: Genotype) -> Architecture:
        """The architecture that a genotype, as the authors' code prints it, stands for.

        Raises:
            ValueError: not two edges for each of four nodes, of known operations and earlier states.
        """
        architecture: Architecture = {}
        for cell in ("normal", "reduce"):
            edges = [(str(name), int(source)) for name, source in genotype[cell]]
            for node in NODES:
                pair = {source: name for name, source in edges[2 * node - 4 : 2 * node - 2]}
                is_known = set(pair.values()) <= set(OPERATIONS) and set(pair) <= set(range(node))
                if len(edges) != 8 or len(pair) != 2 or not is_known:
                    raise ValueError(
                        "a genotype has two edges for each of four nodes, from two earlier states, of "
                        f"operations out of {', '.join(OPERATIONS)}; got {edges} in {cell!r}"
                    )
                if node > 2:
                    architecture[f"{cell}.{node}.inputs"] = tuple(sorted(pair))
                for source in range(node):
                    architecture[f"{cell}.{node}.{source}"] = pair.get(source, OPERATIONS[0])
        return architecture

    @staticmethod
    def genotype_of(architecture: Mapping[str, Option]) -> dict[str, list[tuple[str, int]]]:
        """An architecture as the authors' code writes it."""
        return {
            cell: [
                (architecture[f"{cell}.{node}.{source}"], source)
                for node in NODES
                for source in architecture.get(f"{cell}.{node}.inputs", (0, 1))
            ]
            for cell in ("normal", "reduce")
        }

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: int = 16,
        cells: int = 8,
        stem: Literal["cifar", "imagenet"] = "cifar",
        pooling_norm: bool = True,
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if cells < 3 or stem not in ("cifar", "imagenet"):
            raise ValueError(
                "DARTSCells has at least 3 cells, two of which reduce, and the stem 'cifar' or 'imagenet'; "
                f"got {cells} and {stem!r}"
            )
        self.stem = _cifar_stem(in_channels, 3 * channels) if stem == "cifar" else nn.Identity()
        self.stems = None if stem == "cifar" else _imagenet_stems(in_channels, channels)
        self.reductions = (cells // 3, 2 * cells // 3)
        widths = [3 * channels] * 2 if stem == "cifar" else [channels] * 2
        self.cells = nn.ModuleList()
        halved = stem == "imagenet"  # the first state is twice as large as the second
        for index in range(cells):
            reduces = index in self.reductions
            channels *= 2 if reduces else 1
            self.cells.append(
                _cell(widths[-2], widths[-1], channels, reduces, halved, pooling_norm, drop_path)
            )
            widths.append(len(NODES) * channels)
            halved = reduces
        self.auxiliary = (
            AuxiliaryHead(widths[2 + self.reductions[1]], num_classes, stem) if auxiliary else None
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Any:
        if self.stems is None:
            before = last = self.stem(images)
        else:
            before = self.stems[0](images)
            last = self.stems[1](before)
        auxiliary = None
        for index, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            if self.training and self.auxiliary is not None and index == self.reductions[1]:
                auxiliary = self.auxiliary(last)
        scores: Tensor = self.classifier(self.pool(last))
        return scores if auxiliary is None else (scores, auxiliary)


@final
class AuxiliaryHead(nn.Module):
    """A second classifier, on features inside the network: ``(N, channels, H, W)`` to ``(N, num_classes)``.

    H and W are 6 to 10. As the authors trained it, it has one BatchNorm fewer with the stem for ImageNet.
    """

    def __init__(self, channels: int, num_classes: int, stem: str) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768) if stem == "cifar" else nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        # Two windows each way, from edge to edge: 8x8 at stride 3, 7x7 at stride 2.
        pooled = F.avg_pool2d(F.relu(features), 5, stride=features.shape[-1] - 5)
        scores: Tensor = self.classifier(self.features(pooled))
        return scores


# ---- a cell


@final
class Inputs(nn.Module):
    """Both inputs of a cell at its width and resolution.

    Shapes: ``(N, first, H, W)`` and ``(N, second, h, w)`` to ``(N, width, h, w)`` each, with ``H = 2 h``
    where the first is halved, else ``H = h``.
    """

    def __init__(self, first: int, second: int, width: int, halves: bool) -> None:
        super().__init__()
        self.first = FactorizedReduce(first, width) if halves else _point(first, width)
        self.second = _point(second, width)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [self.first(inputs[0]), self.second(inputs[1])]


@final
class FactorizedReduce(nn.Module):
    """Halves the resolution by two convolutions on every second position, one of them shifted by one.

    Shapes: ``(N, in_channels, H, W)``, H and W even, to ``(N, out_channels, H / 2, W / 2)``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.even = nn.Conv2d(in_channels, half, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - half, 1, stride=2, bias=False)
        self.norm = UnscaledBatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(features)
        joined = torch.cat([self.even(features), self.odd(features[:, :, 1:, 1:])], dim=1)
        normalised: Tensor = self.norm(joined)
        return normalised


@final
class Zero(nn.Module):
    """Zeros in the shape that an operation of that stride returns."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :, :: self.stride, :: self.stride] * 0.0


def _cell(
    first: int, second: int, width: int, reduces: bool, halves: bool, pooling_norm: bool, drop_path: float
) -> Cell:
    def candidate(make: _Make, node: int, _: int, source: int) -> nn.Module:
        stride = 2 if reduces and source < 2 else 1
        return make(width, stride, pooling_norm, drop_path)

    return Cell(
        {name: partial(candidate, make) for name, make in _OPERATIONS.items()},
        num_nodes=len(NODES),
        num_predecessors=2,
        preprocessor=Inputs(first, second, width, halves),
        label="reduce" if reduces else "normal",
        edges="strongest",
    )


_Make = Callable[[int, int, bool, float], nn.Module]
"""Width, stride, whether BatchNorm follows a pooling, and the probability of drop path, to an operation."""


def _none(width: int, stride: int, pooling_norm: bool, drop_path: float) -> nn.Module:
    return Zero(stride)


def _skip(width: int, stride: int, pooling_norm: bool, drop_path: float) -> nn.Module:
    if stride == 1:
        return nn.Identity()
    return nn.Sequential(FactorizedReduce(width, width), DropPath(drop_path))


def _pooling(
    kind: type[nn.MaxPool2d | nn.AvgPool2d], width: int, stride: int, pooling_norm: bool, drop_path: float
) -> nn.Module:
    # An average is over what is inside the image.
    inside: dict[str, Any] = {"count_include_pad": False} if kind is nn.AvgPool2d else {}
    pooling: list[nn.Module] = [kind(3, stride=stride, padding=1, **inside)]
    if pooling_norm:
        pooling.append(nn.BatchNorm2d(width, affine=False))
    return nn.Sequential(*pooling, DropPath(drop_path))


def _separable(kernel_size: int, width: int, stride: int, pooling_norm: bool, drop_path: float) -> nn.Module:
    """A depthwise and a pointwise convolution, twice over."""
    twice = (*_depthwise(width, kernel_size, stride, 1), *_depthwise(width, kernel_size, 1, 1))
    return nn.Sequential(*twice, DropPath(drop_path))


def _dilated(kernel_size: int, width: int, stride: int, pooling_norm: bool, drop_path: float) -> nn.Module:
    return nn.Sequential(*_depthwise(width, kernel_size, stride, 2), DropPath(drop_path))


def _depthwise(width: int, kernel_size: int, stride: int, dilation: int) -> tuple[nn.Module, ...]:
    padding = dilation * (kernel_size // 2)
    return (
        nn.ReLU(),
        nn.Conv2d(width, width, kernel_size, stride, padding, dilation, groups=width, bias=False),
        nn.Conv2d(width, width, 1, bias=False),
        UnscaledBatchNorm2d(width),
    )


def _point(in_channels: int, out_channels: int) -> nn.Module:
    convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(nn.ReLU(), convolution, UnscaledBatchNorm2d(out_channels))


def _cifar_stem(in_channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))


def _imagenet_stems(in_channels: int, width: int) -> nn.ModuleList:
    """To an eighth of the resolution: the first cell's inputs are at a quarter and an eighth."""

    def halve(n_in: int, n_out: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(n_out)

    first = nn.Sequential(*halve(in_channels, width // 2), nn.ReLU(inplace=True), *halve(width // 2, width))
    return nn.ModuleList([first, nn.Sequential(nn.ReLU(), *halve(width, width))])


_OPERATIONS: Mapping[str, _Make] = {
    "none": _none,
    "max_pool_3x3": partial(_pooling, nn.MaxPool2d),
    "avg_pool_3x3": partial(_pooling, nn.AvgPool2d),
    "skip_connect": _skip,
    "sep_conv_3x3": partial(_separable, 3),
    "sep_conv_5x5": partial(_separable, 5),
    "dil_conv_3x3": partial(_dilated, 3),
    "dil_conv_5x5": partial(_dilated, 5),
}
OPERATIONS = tuple(_OPERATIONS)


# ---- published


_V1: Genotype = {
    "normal": [
        *(("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1)),
        *(("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)),
    ],
    "reduce": [
        *(("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0)),
        *(("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)),
    ],
}
_V2: Genotype = {
    "normal": [
        *(("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        *(("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)),
    ],
    "reduce": [
        *(("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1)),
        *(("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)),
    ],
}
_SOURCE = "quark0/darts, cnn/genotypes.py, cnn/model.py and cnn/operations.py, without the auxiliary head"
_NOTE = (
    "the authors' counter of the 574 M multiply-adds is not public. Convolutions and the classifier have "
    "529,911,552; with two for each of 4,139,520 numbers behind a BatchNorm and one for each of 5,795,328 "
    "behind a ReLU and 602,112 into a pooling it is 544,588,032, which others count, too (quark0/darts, "
    "issue 46); of the other 29 M nothing is known"
)


def _published(
    genotype: Genotype, macs: int, params: int, reported: str, is_imagenet: bool = False, note: str = ""
) -> Published:
    arguments: dict[str, Any] = {"channels": 36, "cells": 20, "pooling_norm": False}
    if is_imagenet:
        arguments = {
            "channels": 48,
            "cells": 14,
            "pooling_norm": False,
            "stem": "imagenet",
            "num_classes": 1000,
        }
    size = 224 if is_imagenet else 32
    architecture = DARTSCells.architecture_of(genotype)
    return Published(architecture, (3, size, size), macs, params, reported, _SOURCE, arguments, note)


DARTSCells.published = {
    "darts-v1": _published(
        _V1,
        500_987_520,
        3_169_414,
        "3.3 M (table 1)",
        note="the paper has one figure for both; by the authors' code this one has fewer parameters, also "
        "with the auxiliary head (476,426 more, which their own counter leaves out)",
    ),
    "darts-v2": _published(_V2, 528_359_040, 3_349_342, "3.3 M (table 1), 3.349 M (README)"),
    "darts-v1-imagenet": _published(_V1, 505_864_704, 4_510_432, "none", is_imagenet=True),
    "darts-v2-imagenet": _published(
        _V2, 529_911_552, 4_718_752, "574 M, 4.7 M (table 3), 4.719 M (README)", is_imagenet=True, note=_NOTE
    ),
}
