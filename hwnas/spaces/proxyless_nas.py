"""The space of ProxylessNAS, and the networks that were found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import Tensor, nn

from hwnas.choices import LayerChoice
from hwnas.spaces.blocks import Classifier, ConvNormAct, InvertedResidual, make_divisible, stages
from hwnas.spaces.published import Published, published_network
from profilers.space import Option

_EPS = 1e-3
_LAYERS = (4, 4, 4, 4, 4, 1)
_MOBILE = """
    k5_e3 k3_e3 skip skip    k7_e3 k3_e3 k5_e3 k5_e3    k7_e6 k5_e3 k5_e3 k5_e3
    k5_e6 k5_e3 k5_e3 k5_e3  k7_e6 k7_e6 k7_e3 k7_e3    k7_e6
"""
_CPU = """
    k3_e6 k3_e3 k3_e3 k3_e3  k3_e6 k3_e3 k3_e3 k5_e3    k3_e6 skip skip k3_e3
    k5_e6 k3_e3 k3_e3 k3_e3  k5_e6 k5_e3 k5_e3 k3_e3    k5_e6
"""
_GPU = """
    k5_e3 skip skip skip     k7_e3 skip skip k3_e3      k7_e6 skip skip k5_e3
    k5_e6 skip k3_e3 k5_e3   k7_e6 k7_e6 k7_e6 k5_e6    k7_e6
"""
_LOGS = "mit-han-lab/proxylessnas, logs/imagenet_{}_log.txt"
_CONFIG = "han-cai/files, proxylessnas/proxyless_{}.config"


def _architecture(options: str) -> dict[str, Option]:
    labels = [f"stage{s}.layer{i + 1}" for s, count in enumerate(_LAYERS, start=1) for i in range(count)]
    return dict(zip(labels, options.split(), strict=True))


@final
class ProxylessNAS(nn.Module):
    """Mobile inverted residuals with searched kernels, expansions and depth (arXiv 1812.00332, section 4.2).

    A convolution and a block of expansion 1, both fixed, are followed by six stages. Each layer is an
    inverted residual of kernel 3, 5 or 7 and expansion 3 or 6, or is skipped where it keeps the shape.
    BatchNorm has an epsilon of 1e-3, activations are ReLU6, no convolution has a bias.

    Source: mit-han-lab/proxylessnas, ``search/models/super_nets/super_proxyless.py``, with the widths and
    strides of ``search/imagenet_arch_search.py``. The published networks have other widths; they stand in
    ``published[name].arguments``. Changed: weights have torch's own initial values.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``. The resolution is halved five times: 224x224
    in the paper, and any from 32 up. With the defaults there are 6^6 * 7^15 = 221,502,229,807,900,608
    networks.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        widths: of the first convolution, the fixed block, each stage, and the last convolution.
        layers: of each stage; all but the first of a stage can be skipped, and that one too where its stage
            changes neither width nor resolution.
        strides: of each stage's first layer.
        width_multiplier: of all widths, which are rounded to multiples of 8; the last convolution is never
            made narrower.
        dropout: before the last layer, as in the authors' code.

    Raises:
        ValueError: not as many widths and strides as stages need.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(ProxylessNAS()).size == 6**6 * 7**15
    True
    """

    published: ClassVar[Mapping[str, Published]] = {
        "mobile": Published(
            _architecture(_MOBILE),
            (3, 224, 224),
            320_427_584,
            4_080_512,
            "4.08M parameters, 320.4M FLOPs, 78 ms on a Pixel 1, 74.6 % top-1",
            f"{_CONFIG.format('mobile')}; figures: {_LOGS.format('mobile')}",
            {"widths": (32, 16, 32, 40, 80, 96, 192, 320, 1280)},
        ),
        "cpu": Published(
            _architecture(_CPU),
            (3, 224, 224),
            439_243_864,
            4_361_648,
            "4.36M parameters, 439.2M FLOPs, 138.7 ms on a CPU, 75.3 % top-1",
            f"{_CONFIG.format('cpu')} as osmr/imgclsmob, pytorch/pytorchcv/models/proxylessnas.py, has it; "
            f"figures: {_LOGS.format('cpu')}",
            {"widths": (40, 24, 32, 48, 88, 104, 216, 360, 1432)},
        ),
        "gpu": Published(
            _architecture(_GPU),
            (3, 224, 224),
            465_260_160,
            7_119_848,
            "7.12M parameters, 465.3M FLOPs, 5.1 ms on a V100, 75.1 % top-1",
            f"{_CONFIG.format('gpu')}; figures: {_LOGS.format('gpu')}",
            {"widths": (40, 24, 32, 56, 112, 128, 256, 432, 1728)},
        ),
        "mobile-14": Published(
            _architecture(_MOBILE),
            (3, 224, 224),
            580_883_408,
            6_857_568,
            "6,857,568 parameters, 597.10M FLOPs, 77.0 % top-1",
            f"{_CONFIG.format('mobile_14')} as osmr/imgclsmob, pytorch/pytorchcv/models/proxylessnas.py, "
            "has it; figures: its README.md",
            {"widths": (48, 24, 40, 56, 112, 136, 256, 448, 1792)},
            "that README counts more than convolutions and linear layers: 332.46M where mobile has 320.4M",
        ),
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        widths: Sequence[int] = (32, 16, 24, 40, 80, 96, 192, 320, 1280),
        layers: Sequence[int] = _LAYERS,
        strides: Sequence[int] = (2, 2, 2, 1, 2, 1),
        width_multiplier: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(layers) == len(strides) == len(widths) - 3:
            raise ValueError(
                "each stage needs a number of layers and a stride, and widths are those of the first "
                "convolution, the fixed block, each stage, and the last convolution; got "
                f"{len(layers)}, {len(strides)} and {len(widths)}"
            )
        stem, fixed, *inner = (make_divisible(width * width_multiplier) for width in widths[:-1])
        head = make_divisible(widths[-1] * max(1.0, width_multiplier))
        self.stem = ConvNormAct(in_channels, stem, 3, stride=2, eps=_EPS, activation=nn.ReLU6)
        self.first = InvertedResidual(stem, fixed, 3, expansion=1, eps=_EPS)
        self.blocks = stages(fixed, inner, layers, strides, _layer)
        self.head = ConvNormAct(inner[-1], head, eps=_EPS, activation=nn.ReLU6)
        self.classifier = Classifier(head, num_classes, dropout)

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> ProxylessNAS:
        """Three narrow stages, 28x28 to 4x4: 6^3 * 7^5 = 3,630,312 networks."""
        widths = (16, 16, 24, 40, 80, 256)
        return cls(num_classes, in_channels, widths, layers=(2, 3, 3), strides=(1, 2, 2))

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name, with new weights. Raises ``ValueError`` for another name."""
        return published_network(cls, name, arguments)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.head(self.blocks(self.first(self.stem(images)))))
        return logits


def _layer(in_channels: int, out_channels: int, stride: int, label: str) -> LayerChoice:
    candidates: dict[str, nn.Module] = {
        f"k{kernel}_e{expansion}": InvertedResidual(
            in_channels, out_channels, kernel, expansion, stride, eps=_EPS
        )
        for kernel in (3, 5, 7)
        for expansion in (3, 6)
    }
    if stride == 1 and in_channels == out_channels:
        candidates["skip"] = nn.Identity()
    return LayerChoice(candidates, label=label)
