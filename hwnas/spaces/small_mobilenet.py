"""The default space: a small mobile network for images of 28x28 to 64x64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import Tensor, nn

from hwnas.choices import LayerChoice
from hwnas.nn import BatchNorm2d, Conv2d
from hwnas.spaces.blocks import Classifier, stages
from hwnas.spaces.published import Published, published_network
from hwnas.values import Value, ValueChoice

Width = int | Value


@final
class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, project (MobileNetV2, arXiv 1801.04381, table 1), with ReLU.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``. The input is added
    where ``stride`` is 1 and the widths are one and the same.
    """

    def __init__(
        self, in_channels: Width, out_channels: Width, kernel_size: int, expansion: int, stride: int = 1
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.kernel_size = kernel_size
        self.expansion = expansion
        self.stride = stride
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.is_residual = stride == 1 and in_channels is out_channels
        self.expand = nn.Sequential(
            Conv2d(in_channels, hidden, 1, bias=False), BatchNorm2d(hidden), nn.ReLU(inplace=True)
        )
        self.depthwise = nn.Sequential(
            Conv2d(hidden, hidden, kernel_size, stride, kernel_size // 2, groups=hidden, bias=False),
            BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
        )
        self.project = nn.Sequential(Conv2d(hidden, out_channels, 1, bias=False), BatchNorm2d(out_channels))

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.project(self.depthwise(self.expand(features)))
        return features + projected if self.is_residual else projected

    def extra_repr(self) -> str:
        widths = f"{self.in_channels}->{self.out_channels}"
        return f"{widths}, k={self.kernel_size}, e={self.expansion}, s={self.stride}"


@final
class SmallMobileNet(nn.Module):
    """Mobile inverted residuals with searched kernels, expansions, depth and width.

    The blocks are those of ProxylessNAS (arXiv 1812.00332, section 4.2): kernel 3, 5 or 7, expansion 3 or
    6, and a skip where the shape is kept. Widths are elastic, one choice a stage, shared by its layers.
    Differences: three stages for small images (the stem and the last two stages halve the resolution),
    ReLU in place of ReLU6, expansion counted from the block's input width.

    Shapes: ``(N, in_channels, H, W)`` with H and W from 28 to 64, to ``(N, num_classes)``.
    With the defaults there are 6^3 * 7^4 * 3^3 = 14,002,632 networks.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        widths: the options of each stage's width.
        depths: how many layers each stage has at most; layers after the first can be skipped.
        head: channels before the pooling.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(SmallMobileNet(num_classes=10)).size
    14002632
    """

    published: ClassVar[Mapping[str, Published]] = {}  # it is ours: nobody published networks of it

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> SmallMobileNet:
        """It is small as it is."""
        return cls(num_classes, in_channels)

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """Raises ``ValueError``: no network of this space was published."""
        return published_network(cls, name, arguments)

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[Sequence[int]] = ((8, 16, 24), (16, 32, 48), (32, 64, 96)),
        depths: Sequence[int] = (2, 2, 3),
        head: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths):
            raise ValueError(f"each stage needs widths and a depth; got {len(widths)} and {len(depths)}")
        stem = 16
        self.stem = nn.Sequential(
            Conv2d(in_channels, stem, 3, stride=2, padding=1, bias=False),
            BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        searched = [
            ValueChoice(options, label=f"stage{stage}.width") for stage, options in enumerate(widths, start=1)
        ]
        strides = [1] + [2] * (len(depths) - 1)
        self.layers = stages(stem, searched, depths, strides, _layer)
        self.head = nn.Sequential(
            Conv2d(searched[-1], head, 1, bias=False),
            BatchNorm2d(head),
            nn.ReLU(inplace=True),
        )
        self.classifier = Classifier(head, num_classes, dropout)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.head(self.layers(self.stem(images))))
        return logits


def _layer(in_channels: Width, out_channels: Width, stride: int, label: str) -> LayerChoice:
    candidates: dict[str, nn.Module] = {
        f"k{kernel}_e{expansion}": InvertedResidual(in_channels, out_channels, kernel, expansion, stride)
        for expansion in (3, 6)
        for kernel in (3, 5, 7)
    }
    if in_channels is out_channels:
        candidates["skip"] = nn.Identity()
    return LayerChoice(candidates, label=label)
