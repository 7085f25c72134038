"""The ShuffleNetV2 space of single-path one-shot search, and the networks that were found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from hwnas.choices import LayerChoice
from hwnas.nn import BatchNorm2d, Conv2d
from hwnas.spaces.blocks import Classifier, ConvNormAct, make_divisible
from hwnas.spaces.published import Published, published_network
from hwnas.values import Value, ValueChoice
from profilers.space import Option

Width = int | Value

_LAYERS = (4, 4, 8, 4)
_WIDTHS = (16, 64, 160, 320, 640, 1024)
_OPTIONS = ("shuffle3", "shuffle5", "shuffle7", "xception")  # in the order of the authors' numbers
_RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)  # in the order of the authors' numbers
_SPOS = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
_BLOCKS = (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2)
_CHANNELS = (6, 5, 3, 5, 2, 6, 3, 4, 2, 5, 7, 5, 4, 6, 7, 4, 4, 5, 4, 3)


def _inside(width: int, ratio: float) -> int:
    """Channels inside a block, by the channels that it returns."""
    return int(width // 2 * ratio)


def _architecture(blocks: Sequence[int], channels: Sequence[int]) -> dict[str, Option]:
    """By the authors' numbers of every layer's block and of the channels inside of it."""
    found: dict[str, Option] = {}
    numbers = iter(zip(blocks, channels, strict=True))
    for stage, (count, width) in enumerate(zip(_LAYERS, _WIDTHS[1:-1], strict=True), start=1):
        for index in range(count):
            label = f"stage{stage}.layer{index + 1}"
            block, ratio = next(numbers)
            found[label] = _OPTIONS[block]
            found[f"{label}.channels"] = _inside(width, _RATIOS[ratio])
    return found


@final
class ShuffleBlock(nn.Module):
    """ShuffleNetV2's unit (arXiv 1807.11164, figure 3c and d) around a chain of convolutions.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``. With stride 1 every
    other channel passes by and the rest goes through the chain; with stride 2 all goes through the chain
    and, beside it, through a depthwise and a 1x1 convolution. Both are concatenated.

    Args:
        channels: inside the chain; may be a value.
        kernel_size: of the depthwise convolutions.
        is_xception: three pairs of a depthwise and a 1x1 convolution, in place of one depthwise convolution
            between two 1x1 convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Width,
        kernel_size: int,
        stride: int,
        is_xception: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        passed = in_channels if stride == 2 else in_channels // 2
        added = out_channels - passed
        self.beside: nn.Module | None = None
        if stride == 2:
            self.beside = nn.Sequential(*_depthwise(passed, kernel_size, stride), *_pointwise(passed, passed))
        if is_xception:
            self.main = nn.Sequential(
                *_depthwise(passed, kernel_size, stride),
                *_pointwise(passed, channels),
                *_depthwise(channels, kernel_size),
                *_pointwise(channels, channels),
                *_depthwise(channels, kernel_size),
                *_pointwise(channels, added),
            )
        else:
            self.main = nn.Sequential(
                *_pointwise(passed, channels),
                *_depthwise(channels, kernel_size, stride),
                *_pointwise(channels, added),
            )

    def forward(self, features: Tensor) -> Tensor:
        if self.beside is not None:
            return torch.cat((self.beside(features), self.main(features)), dim=1)
        return torch.cat((features[:, 0::2], self.main(features[:, 1::2])), dim=1)

    def extra_repr(self) -> str:
        return f"k={self.kernel_size}, s={self.stride}"


def _pointwise(in_channels: Width, out_channels: Width) -> list[nn.Module]:
    convolution = Conv2d(in_channels, out_channels, 1, bias=False)
    return [convolution, BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _depthwise(channels: Width, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    padding = kernel_size // 2
    convolution = Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)
    return [convolution, BatchNorm2d(channels)]


@final
class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 units with searched blocks and channels: the space of SPOS (arXiv 1904.00420, section 4).

    Each layer is a unit of kernel 3, 5 or 7, or one like Xception's, and the channels inside of it are
    searched with it: the options of a layer are sliced from one largest weight, as in the paper. No
    convolution and no linear layer has a bias.

    Source: megvii-model/SinglePathOneShot, ``src/Evaluation/template``, for blocks and widths, which are the
    same in megvii-model/ShuffleNet-Series, ``OneShot/network.py``, the authors' network with searched
    channels: from 0.2 to 1.6 of half of the block's output, in steps of 0.2, rounded down. The first of them
    searches blocks alone, with all ratios 1. Changed: BatchNorm has a scale and a shift in the search, too.
    Weights have torch's own initial values.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``. The resolution is halved five times: 224x224
    in the paper, and any from 32 up. With the defaults there are (4 * 8)^20 networks, and 4^20 with
    ``ratios=(1.0,)``, which searches blocks alone.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        widths: of the first convolution, each stage, and the last convolution.
        layers: of each stage, whose first one halves the resolution.
        ratios: options of the channels inside a block, as multiples of half of its output, rounded down.
        width_multiplier: of all widths but the last, which are rounded to multiples of 8.
        dropout: before the last layer.

    Raises:
        ValueError: not as many widths as stages need.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(ShuffleNetV2()).size == 32**20
    True
    """

    published: ClassVar[Mapping[str, Published]] = {
        "spos": Published(
            _architecture(_SPOS, [_RATIOS.index(1.0)] * sum(_LAYERS)),
            (3, 224, 224),
            322_918_720,
            3_558_464,
            "3.5M parameters, 323M FLOPs, 74.4 % top-1",
            "megvii-model/SinglePathOneShot, README.md and src/Evaluation/template",
        ),
        "spos-block-channel": Published(
            _architecture(_BLOCKS, _CHANNELS),
            (3, 224, 224),
            327_857_920,
            3_432_579,
            "3.4M parameters, 328M FLOPs, 74.6 % top-1",
            "megvii-model/ShuffleNet-Series, OneShot/README.md, network.py and blocks.py",
        ),
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        widths: Sequence[int] = _WIDTHS,
        layers: Sequence[int] = _LAYERS,
        ratios: Sequence[float] = _RATIOS,
        width_multiplier: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(layers) != len(widths) - 2:
            raise ValueError(
                "each stage needs a number of layers, and widths are those of the first convolution, each "
                f"stage, and the last convolution; got {len(layers)} and {len(widths)}"
            )
        stem, *stages = (make_divisible(width * width_multiplier) for width in widths[:-1])
        self.stem = ConvNormAct(in_channels, stem, 3, stride=2, activation=nn.ReLU)
        blocks: list[nn.Module] = []
        previous = stem
        for stage, (width, count) in enumerate(zip(stages, layers, strict=True), start=1):
            channels = [_inside(width, ratio) for ratio in ratios]
            for index in range(count):
                label = f"stage{stage}.layer{index + 1}"
                inside = ValueChoice(dict.fromkeys(channels), label=f"{label}.channels")
                blocks.append(_layer(previous, width, inside, 2 if index == 0 else 1, label))
                previous = width
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNormAct(previous, widths[-1], activation=nn.ReLU)
        self.classifier = Classifier(widths[-1], num_classes, dropout, bias=False)

    @classmethod
    def small(
        cls, num_classes: int = 10, in_channels: int = 1, ratios: Sequence[float] = (0.5, 1.0, 1.5)
    ) -> ShuffleNetV2:
        """Two narrow stages, 28x28 to 4x4: (4 * 3)^5 = 248,832 networks."""
        return cls(num_classes, in_channels, (16, 48, 96, 192), layers=(2, 3), ratios=ratios)

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name, with new weights. Raises ``ValueError`` for another name."""
        return published_network(cls, name, arguments)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.head(self.blocks(self.stem(images))))
        return logits


def _layer(in_channels: int, out_channels: int, channels: Width, stride: int, label: str) -> LayerChoice:
    candidates: dict[str, nn.Module] = {
        f"shuffle{kernel}": ShuffleBlock(in_channels, out_channels, channels, kernel, stride)
        for kernel in (3, 5, 7)
    }
    candidates["xception"] = ShuffleBlock(in_channels, out_channels, channels, 3, stride, is_xception=True)
    return LayerChoice(candidates, label=label)
