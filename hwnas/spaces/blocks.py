"""Blocks that several ready-made spaces are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

Width = Any  # a number of channels, or a value
Activation = type[nn.ReLU] | type[nn.ReLU6]


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, but never under 90 % of them, nor 0.

    The rounding of MobileNetV2's authors (tensorflow/models, ``research/slim/nets/mobilenet/mobilenet.py``),
    which most mobile networks have taken over.

    >>> make_divisible(32 * 1.4), make_divisible(11)
    (48, 16)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def stages(
    width: Width,
    widths: Sequence[Width],
    depths: Sequence[int],
    strides: Sequence[int],
    layer: Callable[[Width, Width, int, str], nn.Module],
) -> nn.Sequential:
    """The layers of all stages, one after another.

    Args:
        width: channels that the first stage gets.
        widths: of each stage, which all of its layers return.
        depths: how many layers each stage has.
        strides: of each stage's first layer; the others have 1.
        layer: makes one of channels in, channels out, stride, and a label ``"stage1.layer1"``.
    """
    made: list[nn.Module] = []
    for stage, (out, depth, stride) in enumerate(zip(widths, depths, strides, strict=True), start=1):
        for index in range(depth):
            made.append(layer(width, out, stride if index == 0 else 1, f"stage{stage}.layer{index + 1}"))
            width = out
    return nn.Sequential(*made)


@final
class ConvNormAct(nn.Sequential):
    """A convolution with "same" padding, BatchNorm, and an activation if one is given.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        activation: Activation | None = None,
    ) -> None:
        padding = kernel_size // 2
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias),
            nn.BatchNorm2d(out_channels, eps=eps),
            *([] if activation is None else [activation(inplace=True)]),
        )


@final
class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, project (MobileNetV2, arXiv 1801.04381, table 1), all widths fixed.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``. Where the expansion
    is 1 there is no convolution that expands. The input is added where the shape is kept.

    Args:
        expansion: of the input's channels in between.
        groups: of the 1x1 convolutions; with more than one the channels are shuffled before the depthwise
            convolution.
        bias: of every convolution.
        eps: of every BatchNorm.
        activation: after expansion and depthwise convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        expansion: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        activation: Activation = nn.ReLU6,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.kernel_size = kernel_size
        self.expansion = expansion
        self.stride = stride
        self.groups = groups
        self.is_residual = stride == 1 and in_channels == out_channels
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = ConvNormAct(
                in_channels, hidden, groups=groups, bias=bias, eps=eps, activation=activation
            )
        self.depthwise = ConvNormAct(
            hidden, hidden, kernel_size, stride, groups=hidden, bias=bias, eps=eps, activation=activation
        )
        self.project = ConvNormAct(hidden, out_channels, groups=groups, bias=bias, eps=eps)

    def forward(self, features: Tensor) -> Tensor:
        expanded: Tensor = self.expand(features)
        if self.groups > 1:
            expanded = F.channel_shuffle(expanded, self.groups)
        projected: Tensor = self.project(self.depthwise(expanded))
        return features + projected if self.is_residual else projected

    def extra_repr(self) -> str:
        return f"k={self.kernel_size}, e={self.expansion}, s={self.stride}, g={self.groups}"


@final
class Classifier(nn.Module):
    """The mean over all positions, and a linear layer: ``(N, channels, H, W)`` to ``(N, num_classes)``."""

    def __init__(self, channels: int, num_classes: int, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels, num_classes, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.dropout(features.mean((2, 3))))
        return scores
