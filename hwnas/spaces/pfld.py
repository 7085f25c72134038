"""Facial landmarks: the simplified PFLD whose blocks FBNet's method searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from hwnas.choices import LayerChoice
from hwnas.spaces.published import Published, published_network


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


@final
class GlobalGate(nn.Module):
    """Squeeze and excite in one step (eSE, arXiv 1911.06667), the squeeze learned (``eSEModule``).

    Each channel is weighed by a hard sigmoid of a pointwise convolution of its learned average: a depthwise
    convolution as large as the map.

    Shapes: ``(N, channels, size, size)``, and the same out.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.average = nn.Conv2d(channels, channels, size, groups=channels, bias=False)
        self.excite = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, features: Tensor) -> Tensor:
        gated: Tensor = features * self.gate(self.excite(self.average(features)))
        return gated


@final
class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, project (``MBBlock``); the gate stands before the second ReLU.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``. The input is added
    where ``residual`` is set and ``stride`` is 1; it must have ``out_channels`` then.

    Args:
        hidden: channels between the pointwise convolutions.
        gate_size: side of the map that is gated; None for no gate.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        hidden: int,
        kernel_size: int = 3,
        dilation: int = 1,
        gate_size: int | None = None,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.is_residual = residual and stride == 1
        padding = dilation * (kernel_size // 2)
        self.layers = nn.Sequential(
            conv_bn(in_channels, hidden, 1),
            nn.Conv2d(hidden, hidden, kernel_size, stride, padding, dilation, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Identity() if gate_size is None else GlobalGate(hidden, gate_size),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        made: Tensor = self.layers(features)
        return features + made if self.is_residual else made


@final
class Separable(nn.Sequential):
    """Depthwise and pointwise convolution, each with BatchNorm and ReLU (``SeparableConv``)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, kernel_size: int = 3) -> None:
        super().__init__(
            conv_bn(in_channels, in_channels, kernel_size, stride, kernel_size // 2, groups=in_channels),
            conv_bn(in_channels, out_channels, 1),
        )


@final
class Ghost(nn.Module):
    """Half of the channels by a pointwise convolution, the others from them, depthwise (arXiv 1911.11907).

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel_size: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.primary = conv_bn(in_channels, half, 1, stride)
        self.cheap = conv_bn(half, half, kernel_size, 1, kernel_size // 2, groups=half)

    def forward(self, features: Tensor) -> Tensor:
        primary = self.primary(features)
        return torch.cat([primary, self.cheap(primary)], 1)


@final
class Stem(nn.Module):
    """PeleeNet's stem (arXiv 1804.06882, figure 2) with a separable convolution (``StemBlock``).

    Shapes: images ``(N, in_channels, H, W)`` to features at a half of the first convolution's size, and that
    convolution's output, both of ``channels``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(in_channels, channels, 3, stride, 1)
        self.convolved = nn.Sequential(conv_bn(channels, channels, 1), Separable(channels, channels, 2, 1))
        self.pooled = nn.MaxPool2d(2)
        self.join = conv_bn(2 * channels, channels, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(images)
        return self.join(torch.cat([self.convolved(first), self.pooled(first)], 1)), first


@final
class LandmarkHead(nn.Module):
    """Three scales to the outputs; what is larger is averaged by strided depthwise convolutions first.

    Shapes: ``(N, 64, size, size)``, ``(N, 32, 2 size, 2 size)`` and ``(N, 16, 8 size, 8 size)`` to
    ``(N, outputs)``; the second and third may be smaller by less than one stride.

    Args:
        outputs: how many numbers come out.
        size: side of the smallest map.
        early_size: side of the largest map.
    """

    def __init__(self, outputs: int, size: int, early_size: int) -> None:
        super().__init__()
        padding = max(1, (8 * (size - 1) + 10 - early_size) // 2)  # so that `size` positions come out
        self.average_early = nn.Conv2d(16, 16, 9, 8, padding, groups=16, bias=False)
        self.average_middle = nn.Conv2d(32, 32, 3, 2, 1, groups=32, bias=False)
        self.layers = nn.Sequential(
            nn.Conv2d(64 + 32 + 16, 64, 1, bias=False),
            InvertedResidual(64, 64, 1, hidden=128, gate_size=size),
            Separable(64, 128),
            nn.Conv2d(128, 128, size, groups=128, bias=False),
            nn.Conv2d(128, outputs, 1),
            nn.Flatten(),
        )

    def forward(self, late: Tensor, middle: Tensor, early: Tensor) -> Tensor:
        scales = [late, self.average_middle(middle), self.average_early(early)]
        outputs: Tensor = self.layers(torch.cat(scales, 1))
        return outputs


@final
class PoseNet(nn.Sequential):
    """The stem's features to three Euler angles (``AuxiliaryNet``).

    In training it makes the stem look at the pose; it is no part of what is deployed.

    Shapes: ``(N, 16, 4 size, 4 size)`` to ``(N, 3)``.
    """

    def __init__(self, size: int) -> None:
        super().__init__(
            conv_bn(16, 64, 3, 2, 1),
            conv_bn(64, 64, 3, 1, 1),
            conv_bn(64, 32, 3, 2, 1),
            conv_bn(32, 64, size, 1, 1),
            nn.MaxPool2d(3),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.Linear(32, 3),
        )


# A candidate: channels in and out, stride and side of the map that comes out, to a block.
_Make = Callable[[int, int, int, int], nn.Module]


def _mobile(
    in_channels: int,
    out_channels: int,
    stride: int,
    size: int,
    *,
    kernel_size: int = 3,
    expansion: int = 1,
    dilation: int = 1,
    gated: bool = False,
) -> nn.Module:
    gate_size = size if gated else None
    hidden = in_channels * expansion
    return InvertedResidual(in_channels, out_channels, stride, hidden, kernel_size, dilation, gate_size)


def _separable(in_channels: int, out_channels: int, stride: int, size: int, *, kernel_size: int) -> nn.Module:
    return Separable(in_channels, out_channels, stride, kernel_size)


def _ghost(in_channels: int, out_channels: int, stride: int, size: int, *, kernel_size: int) -> nn.Module:
    return Ghost(in_channels, out_channels, stride, kernel_size)


_STAGE_0: Mapping[str, _Make] = {
    "mb_k3_res": _mobile,
    "mb_k3_e2_res": partial(_mobile, expansion=2),
    "mb_k3_res_d3": partial(_mobile, expansion=2, dilation=3),
    "mb_k5_res": partial(_mobile, kernel_size=5),
    "mb_k5_e2_res": partial(_mobile, kernel_size=5, expansion=2),
    "sep_k3": partial(_separable, kernel_size=3),
    "sep_k5": partial(_separable, kernel_size=5),
    "gh_k3": partial(_ghost, kernel_size=3),
    "gh_k5": partial(_ghost, kernel_size=5),
}
_STAGE_1: Mapping[str, _Make] = {
    "mb_k3_e2_res": partial(_mobile, expansion=2),
    "mb_k3_e4_res": partial(_mobile, expansion=4),
    "mb_k3_e2_res_se": partial(_mobile, expansion=2, gated=True),
    "mb_k3_res_d3": partial(_mobile, expansion=2, dilation=3),
    "mb_k5_res": partial(_mobile, kernel_size=5),
    "mb_k5_e2_res": partial(_mobile, kernel_size=5, expansion=2),
    "mb_k5_res_se": partial(_mobile, kernel_size=5, gated=True),
    "mb_k5_e2_res_se": partial(_mobile, kernel_size=5, expansion=2, gated=True),
    "gh_k5": partial(_ghost, kernel_size=5),
}


@final
class PFLD(nn.Module):
    """A practical facial landmark detector, simplified, its five middle blocks to be chosen.

    The space of NNI's FBNet example (microsoft/nni, ``examples/nas/oneshot/pfld/lib``: ``builder.py`` and
    ``supernet.py``; blocks in ``examples/nas/legacy/oneshot/pfld/lib/ops.py``, whose names the options and
    the docstrings here have), after PFLD (arXiv 1902.10859) and FBNet (arXiv 1812.03443): two blocks at
    14x14 and three at 7x7, each of nine candidates, and a head that reads three scales. So there are
    9^5 = 59,049 networks. Where that example speaks of average pooling it means strided and global
    depthwise convolutions, which learn the average's weights; its stem pools the maximum.

    Changed: ``(N, outputs)`` comes out in place of ``(N, outputs, 1, 1)``; images may have other sizes; the
    auxiliary network for the pose is part of the class.

    Shapes: ``(N, in_channels, image_size, image_size)`` to ``(N, num_classes)``. With ``pose``, in training
    mode only, ``(N, num_classes + 3)``: the last three numbers are Euler angles.

    Args:
        num_classes: how many numbers come out, two for each landmark; named as in every ready-made space.
            The default is for 106 landmarks.
        in_channels: channels of the images.
        image_size: side of the images, an even number; the source has 112.
        stem_stride: of the first convolution. The smallest maps have a side of
            ``image_size / (8 * stem_stride)``, rounded up.
        pose: whether there is an auxiliary network for the pose.

    Raises:
        ValueError: images too small for a map of 3x3 at the end; in ``forward``, images of another size.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(PFLD()).size
    59049
    """

    published: ClassVar[Mapping[str, Published]] = {}
    """Empty: the example's searched network lies in a checkpoint on a file server, not in its text."""

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1, pose: bool = False) -> PFLD:
        """For images of 28x28 to 32x32: the first convolution keeps their size."""
        return cls(num_classes, in_channels, image_size=28, stem_stride=1, pose=pose)

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """Raises ``ValueError``: no architecture of this space was published as text."""
        return published_network(cls, name, arguments)

    def __init__(
        self,
        num_classes: int = 212,
        in_channels: int = 3,
        image_size: int = 112,
        stem_stride: int = 2,
        pose: bool = False,
    ) -> None:
        super().__init__()
        self._size = -(-image_size // (8 * stem_stride))
        if self._size < 3:
            raise ValueError(
                f"images of {image_size}x{image_size} leave maps of {self._size}x{self._size} at the end, "
                f"where 3x3 is the least; give at least {16 * stem_stride + 1}, or a smaller stem_stride"
            )
        size, early_size = self._size, -(-image_size // stem_stride)
        self.stem = Stem(in_channels, 16, stem_stride)
        self.reduce = InvertedResidual(16, 32, 2, hidden=32, residual=False)
        self.stage0 = nn.Sequential(
            _choice(_STAGE_0, 32, 32, 1, 2 * size, "layer1"),
            _choice(_STAGE_0, 32, 32, 1, 2 * size, "layer2"),
        )
        self.stage1 = nn.Sequential(
            _choice(_STAGE_1, 32, 64, 2, size, "layer3"),
            _choice(_STAGE_1, 64, 64, 1, size, "layer4"),
            _choice(_STAGE_1, 64, 64, 1, size, "layer5"),
        )
        self.head = LandmarkHead(num_classes, size, early_size)
        self.pose = PoseNet(size) if pose else None
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        features, early = self.stem(images)
        middle = self.stage0(self.reduce(features))
        late = self.stage1(middle)
        if late.shape[-2:] != (self._size, self._size):
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} leave maps of "
                f"{late.shape[-2]}x{late.shape[-1]} at the end, and this network was made for "
                f"{self._size}x{self._size}: make it with their image_size"
            )
        outputs: Tensor = self.head(late, middle, early)
        if self.pose is None or not self.training:
            return outputs
        return torch.cat([outputs, self.pose(features)], 1)


def _choice(
    candidates: Mapping[str, _Make], in_channels: int, out_channels: int, stride: int, size: int, label: str
) -> LayerChoice:
    made = {name: make(in_channels, out_channels, stride, size) for name, make in candidates.items()}
    return LayerChoice(made, label=label)


def _initialise(module: nn.Module) -> None:
    """The source's initial weights (``supernet.py``, ``init_params``)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(module.bias)
