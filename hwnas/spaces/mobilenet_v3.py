"""MobileNetV3, and the elastic space around it in which once-for-all networks are trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.choices import Repeat
from hwnas.nn import BatchNorm2d, Conv2d
from hwnas.space import ModelSpace
from hwnas.spaces.blocks import make_divisible
from hwnas.spaces.published import Published, published_network
from hwnas.values import Expression, Value, ValueChoice
from profilers.space import Architecture

Size = int | Value
Activation = Literal["relu", "relu6", "h_swish"]
_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "h_swish": nn.Hardswish}


@final
@dataclass(frozen=True)
class Stage:
    """A chain of inverted residuals of one width.

    Attributes:
        width: output channels of every layer, before the width multiplier.
        stride: of the first layer.
        activation: of every layer.
        squeeze: whether every layer squeezes and excites.
        depths: how many layers it may have; None: as many as the network's other stages.
    """

    width: int
    stride: int
    activation: Activation
    squeeze: bool = False
    depths: tuple[int, ...] | None = None


@final
@dataclass(frozen=True)
class Design:
    """What is not searched of a mobile network.

    Attributes:
        stem: channels of the first convolution, 3x3.
        first: a layer of depthwise and pointwise convolution alone, before the searched ones.
        stages: the searched layers.
        activation: of the stem and the head.
        head: channels of the convolution before the pooling and, where there is one, of the layer after it.
        head_squeeze: whether the convolution before the pooling squeezes and excites.
        stem_stride: of the first convolution.
        stem_bias: whether the first convolution has a bias beside its BatchNorm.
    """

    stem: int
    first: Stage
    stages: tuple[Stage, ...]
    activation: Activation
    head: tuple[int, ...]
    head_squeeze: bool = False
    stem_stride: int = 2
    stem_bias: bool = False


LARGE = Design(
    stem=16,
    first=Stage(16, 1, "relu"),
    stages=(
        Stage(24, 2, "relu"),
        Stage(40, 2, "relu", squeeze=True),
        Stage(80, 2, "h_swish"),
        Stage(112, 1, "h_swish", squeeze=True),
        Stage(160, 2, "h_swish", squeeze=True),
    ),
    activation="h_swish",
    head=(960, 1280),
)
"""MobileNetV3-Large's widths (1905.02244, table 1), which are once-for-all's, too."""

SMALL = Design(
    stem=16,
    first=Stage(16, 2, "relu", squeeze=True),
    stages=(
        Stage(24, 2, "relu"),
        Stage(40, 2, "h_swish", squeeze=True),
        Stage(48, 1, "h_swish", squeeze=True),
        Stage(96, 2, "h_swish", squeeze=True),
    ),
    activation="h_swish",
    head=(576, 1024),
    head_squeeze=True,
)
"""MobileNetV3-Small's widths (1905.02244, table 2)."""

PROXYLESS = Design(
    stem=32,
    first=Stage(16, 1, "relu6"),
    stages=(
        Stage(24, 2, "relu6"),
        Stage(40, 2, "relu6"),
        Stage(80, 2, "relu6"),
        Stage(96, 1, "relu6"),
        Stage(192, 2, "relu6"),
        Stage(320, 1, "relu6", depths=(1,)),
    ),
    activation="relu6",
    head=(1280,),
)
"""Once-for-all's second space (``ofa_proxyless``): MobileNetV2's layers in ProxylessNAS's widths."""

_SMALL_IMAGES = Design(
    stem=16,
    first=Stage(16, 1, "relu"),
    stages=(Stage(24, 2, "relu"), Stage(40, 1, "h_swish", squeeze=True), Stage(64, 2, "h_swish")),
    activation="h_swish",
    head=(192, 256),
)


def _divisible(width: float | Value) -> Size:
    if isinstance(width, Value):
        return Expression("make_divisible({})", make_divisible, (width,))
    return make_divisible(width)


@final
class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels have in the mean (1905.02244, section 5.3).

    Shapes: ``(N, channels, H, W)`` to the same. A quarter of the channels is in between, a multiple of 8.
    """

    def __init__(self, channels: Size) -> None:
        super().__init__()
        squeezed = _divisible(channels // 4)
        self.reduce = Conv2d(channels, squeezed, 1)
        self.expand = Conv2d(squeezed, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean((2, 3), keepdim=True)
        return features * F.hardsigmoid(self.expand(F.relu(self.reduce(mean))))


@final
class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, squeeze and excite, project (1905.02244, figure 4).

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``. The input is added
    where ``stride`` is 1 and the widths are equal.

    Args:
        in_channels, out_channels, stride: as above.
        kernel: of the depthwise convolution.
        expansion: inner width over ``in_channels``, rounded to a multiple of 8; None: nothing is expanded.
        activation: after expanding and after the depthwise convolution.
        squeeze: whether there is a `SqueezeExcite`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        expansion: float | Value | None,
        stride: int,
        activation: Activation,
        squeeze: bool,
    ) -> None:
        super().__init__()
        hidden = in_channels if expansion is None else _divisible(in_channels * expansion)
        self.widths = f"{in_channels}->{out_channels}"
        self.kernel = kernel
        self.expansion = expansion
        self.stride = stride
        self.is_residual = stride == 1 and in_channels == out_channels
        expanding = _convolution(in_channels, hidden, 1, 1, activation)
        self.expand = nn.Identity() if expansion is None else expanding
        self.depthwise = _convolution(hidden, hidden, kernel, stride, activation, groups=hidden)
        self.squeeze = SqueezeExcite(hidden) if squeeze else nn.Identity()
        self.project = _convolution(hidden, out_channels, 1, 1, None)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.project(self.squeeze(self.depthwise(self.expand(features))))
        return features + projected if self.is_residual else projected

    def extra_repr(self) -> str:
        return f"{self.widths}, k={self.kernel}, e={self.expansion}, s={self.stride}"


def _convolution(
    in_channels: Size,
    out_channels: Size,
    kernel: Size,
    stride: int,
    activation: Activation | None,
    groups: Size = 1,
    bias: bool = False,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias),
        BatchNorm2d(out_channels),
    ]
    if activation is not None:
        layers.append(_ACTIVATIONS[activation](inplace=True))
    return nn.Sequential(*layers)


@final
class Resize(nn.Module):
    """Images ``(N, channels, H, W)`` at another resolution, by bilinear interpolation."""

    def __init__(self, resolution: Size) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, images: Tensor) -> Tensor:
        side = int(self.resolution)
        if images.shape[2:] == (side, side):
            return images
        return F.interpolate(images, (side, side), mode="bilinear")


@final
class MobileNetV3(nn.Module):
    """MobileNetV3 with elastic kernels, expansions, depth and resolution.

    The layers are those of MobileNetV3 (arXiv 1905.02244); what is elastic is once-for-all's (1908.09791,
    section 4.1, and mit-han-lab/once-for-all: ``ofa_mbv3``): every layer's kernel 3, 5 or 7 and expansion
    3, 4 or 6, every stage's depth 2, 3 or 4. ``design=PROXYLESS, width=1.3`` is its other space
    (``ofa_proxyless``); ``SMALL`` has the widths of MobileNetV3-Small.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``; H and W of 128 to 224, in steps of 4.
    With the defaults there are 7371^5, about 2.2e19 networks.

    The resolution belongs to the deployed input and not to a network. So there is no choice of it where
    ``resolutions`` is None, and a published network's stands in ``input_shape``. With ``resolutions`` the
    images are interpolated first, to a side that is one more choice: multiply-adds and latency follow it. It
    is for strategies that run one path.

    Differences: kernels of 3 and 5 are the centre of the one of 7, without once-for-all's learned
    transformations between them; channels are taken from the front and not sorted by importance.
    BatchNorm's ``eps`` and ``momentum`` are torch's. Under mixing weights squeeze-excite is computed once,
    with blended weights.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        design: what is not searched.
        width: a factor on all widths, which are then rounded to multiples of 8.
        kernels: options of every layer's depthwise kernel.
        expansions: options of every layer's inner width over its input width.
        depths: options of every stage's number of layers.
        resolutions: options of the side to which images are resized; None: images stay as they are.
        dropout: before the last layer.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(MobileNetV3()).size == (9**2 + 9**3 + 9**4) ** 5
    True
    """

    published: ClassVar[Mapping[str, Published]]  # below

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        design: Design = LARGE,
        width: float = 1.0,
        kernels: Sequence[int] = (3, 5, 7),
        expansions: Sequence[float] = (3, 4, 6),
        depths: Sequence[int] = (2, 3, 4),
        resolutions: Sequence[int] | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.resize = nn.Identity() if resolutions is None else Resize(_choice(resolutions, "resolution"))
        stem, first = make_divisible(design.stem * width), design.first
        self.stem = _convolution(
            in_channels, stem, 3, design.stem_stride, design.activation, bias=design.stem_bias
        )
        previous = make_divisible(first.width * width)
        self.first = InvertedResidual(stem, previous, 3, None, first.stride, first.activation, first.squeeze)
        stages: list[nn.Module] = []
        for number, stage in enumerate(design.stages, start=1):
            options = stage.depths or depths
            layers: list[nn.Module] = []
            for index in range(max(options)):
                layer = f"stage{number}.layer{index + 1}"
                layers.append(
                    InvertedResidual(
                        previous,
                        make_divisible(stage.width * width),
                        _choice(kernels, f"{layer}.kernel"),
                        _choice(expansions, f"{layer}.expansion"),
                        stage.stride if index == 0 else 1,
                        stage.activation,
                        stage.squeeze,
                    )
                )
                previous = make_divisible(stage.width * width)
            stages.append(Repeat(layers, _choice(options, f"stage{number}.depth")))
        self.stages = nn.Sequential(*stages)
        pooled, *mixed = (make_divisible(channels * width) for channels in design.head)
        self.head = _convolution(previous, pooled, 1, 1, design.activation)
        if design.head_squeeze:
            self.head.append(SqueezeExcite(pooled))
        layers = [nn.Dropout(dropout), nn.Linear([pooled, *mixed][-1], num_classes)]
        for channels in mixed:
            # Between the pooling and the classifier there is no BatchNorm.
            layers = [nn.Linear(pooled, channels, bias=False), _ACTIVATIONS[design.activation](), *layers]
        self.classifier = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(self.first(self.stem(self.resize(images))))
        logits: Tensor = self.classifier(self.head(features).mean((2, 3)))
        return logits

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name in `published`, with new weights.

        Raises:
            ValueError: there is none of that name.
        """
        return published_network(cls, name, arguments)

    @classmethod
    def from_ofa_config(
        cls, config: str | os.PathLike[str] | Mapping[str, Any], **arguments: Any
    ) -> nn.Module:
        """The plain network that a configuration of once-for-all's describes, with new weights.

        Args:
            config: a dictionary or a file, as `hwnas.spaces.ofa_config.read_ofa_config` reads them.
            arguments: of the class, over those that were read.

        Raises:
            ValueError: as `read_ofa_config`.

        >>> config = {"ks": [3] * 20, "e": [4] * 20, "d": [2] * 5}
        >>> len(MobileNetV3.from_ofa_config(config, num_classes=10).stages[0])
        2
        """
        from hwnas.spaces.ofa_config import read_ofa_config  # it reads into what stands here

        read = read_ofa_config(config, **arguments)
        return ModelSpace(cls(**read.arguments)).freeze(read.architecture)

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> MobileNetV3:
        """Three stages of one or two layers, which see 7x7 to 4x4 positions of an image of 28x28."""
        return cls(num_classes, in_channels, _SMALL_IMAGES, depths=(1, 2))


def _choice(options: Sequence[Any], label: str) -> Any:
    """What has one option is no choice."""
    return ValueChoice(options, label) if len(options) > 1 else options[0]


def _elastic(*stages: str, depths: Sequence[int] = (2, 3, 4)) -> Architecture:
    """An architecture by the kernels and expansions of each stage's layers: ``"5x3 3x6"`` are two layers."""
    architecture: Architecture = {}
    for number, stage in enumerate(stages, start=1):
        layers = stage.split()
        is_deep = len(layers) > 1
        if is_deep:
            architecture[f"stage{number}.depth"] = len(layers)
        # Layers that do not run have options, too.
        for index, layer in enumerate([*layers, *["3x3"] * (max(depths) - len(layers) if is_deep else 0)]):
            kernel, expansion = map(float, layer.split("x"))
            architecture[f"stage{number}.layer{index + 1}.kernel"] = int(kernel)
            architecture[f"stage{number}.layer{index + 1}.expansion"] = expansion
    return architecture


_MOBILE_CV = "facebookresearch/mobile-vision: mobile_cv/arch/fbnet_v2/fbnet_modeldef_cls_mnv3.py"
_SPECIALIZED = "han-cai/files: ofa/ofa_specialized/{}/net.config; mit-han-lab/once-for-all: README.md"

MobileNetV3.published = {
    "large": Published(
        _elastic("3x4 3x3", "5x3 5x3 5x3", "3x6 3x2.5 3x2.3 3x2.3", "3x6 3x6", "5x6 5x6 5x6"),
        (3, 224, 224),
        macs=216_589_760,
        params=5_481_768,
        reported="219M, 5.4M",
        source=f"arXiv 1905.02244, table 1; {_MOBILE_CV}, mnv3",
        arguments={"design": replace(LARGE, stem_bias=True), "expansions": (2.3, 2.5, 3, 4, 6)},
        note="counted on mobile_cv's, whose first convolution has a bias (16) and whose layer after the "
        "pooling has none (1,280): torchvision's, the other way round, has 5,483,032 parameters",
    ),
    "small": Published(
        _elastic("3x4.5 3x3.67", "5x4 5x6 5x6", "5x3 5x3", "5x6 5x6 5x6"),
        (3, 224, 224),
        macs=56_676_288,
        params=2_708_456,
        reported="56M, 2.5M",
        source=f"arXiv 1905.02244, table 2; {_MOBILE_CV}, mnv3_small",
        arguments={"design": replace(SMALL, stem_bias=True), "expansions": (3, 3.67, 4, 4.5, 6)},
        note="counted on mobile_cv's, which squeezes and excites before the pooling (166,608), as the "
        "paper's table does, has a bias in the first convolution (16) and none after the pooling (1,024): "
        "torchvision's is without the first two and has the third, and 2,542,856 parameters",
    ),
    "ofa-595m": Published(
        _elastic("3x3 5x4 3x3", "5x4 5x4 3x6 5x3", "7x6 5x6 3x3 5x4", "3x6 5x6 7x6 3x4", "3x6 3x6 5x6 3x3"),
        (3, 236, 236),
        macs=595_189_032,
        params=9_135_928,
        reported="595M, 9.1M",
        source=_SPECIALIZED.format("flops-595M_top1-80.0_finetune-75"),
        arguments={"width": 1.2},
    ),
    "ofa-lg-8": Published(
        _elastic("3x3 3x3", "5x4 5x3", "5x3 3x3 3x3", "3x6 7x4", "3x6 7x4"),
        (3, 144, 144),
        macs=73_471_032,
        params=4_112_176,
        reported="74M, 4.1M",
        source=_SPECIALIZED.format("LG-G8_lat-8ms_top1-71.1_finetune-25"),
    ),
    "ofa-note10-22": Published(
        _elastic("3x3 3x3", "5x3 3x4 3x4", "7x4 5x4 5x4", "5x4 3x6 3x4", "3x6 3x6 3x6 3x3"),
        (3, 224, 224),
        macs=237_063_424,
        params=5_863_056,
        reported="237M, 5.9M",
        source=_SPECIALIZED.format("note10_lat-22ms_top1-76.6_finetune-25"),
    ),
    "ofa-pixel1-58": Published(
        _elastic("3x3 3x3", "7x4 5x3 3x3", "5x6 5x4 5x3", "3x4 7x4 5x3", "5x6 7x6 3x6 3x4"),
        (3, 220, 220),
        macs=229_846_296,
        params=5_809_576,
        reported="230M, 5.8M",
        source=_SPECIALIZED.format("pixel1_lat-58ms_top1-76.9_finetune-75"),
    ),
    "ofa-cpu-10": Published(
        _elastic("5x4 3x3", "3x3 3x3", "7x3 3x3 7x3", "5x3 5x4", "5x3 3x4", "3x4"),
        (3, 144, 144),
        macs=143_192_752,
        params=4_158_272,
        reported="143M, 4.2M",
        source=_SPECIALIZED.format("cpu_lat-10ms_top1-71.1_finetune-25"),
        arguments={"design": PROXYLESS, "width": 1.3},
    ),
}
