"""The space of FBNet, and the networks that were found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import Tensor, nn

from hwnas.choices import LayerChoice
from hwnas.spaces.blocks import Classifier, ConvNormAct, InvertedResidual, make_divisible, stages
from hwnas.spaces.published import Published, published_network
from profilers.space import Option

_LAYERS = (1, 4, 4, 4, 4, 4, 1)
_A = """
    skip                       k3_e3 k3_e1 skip skip      k5_e6 k3_e3 k5_e1 k3_e3
    k5_e6 k5_e3 k5_e1_g2 k5_e6    k3_e6 k5_e1_g2 k5_e3 k3_e1_g2
    k5_e6 k5_e6 k5_e3 k5_e6    k5_e6
"""
_B = """
    k3_e1                      k3_e6 k5_e1 k3_e1 k3_e1    k5_e6 k5_e3 k3_e6 k5_e6
    k5_e6 k5_e6 skip k5_e3     k5_e6 k3_e1 k5_e1 k5_e3
    k5_e6 k5_e1 k5_e6 k5_e6    k3_e6
"""
_C = """
    k3_e1                      k3_e6 skip k3_e1 k3_e1     k5_e6 k5_e3 k5_e6 k3_e6
    k5_e6 k5_e3 k5_e6 k5_e6    k5_e6 k5_e6 k5_e6 k5_e3
    k5_e6 k5_e6 k5_e6 k5_e6    k3_e6
"""
_SOURCE = (
    "facebookresearch/mobile-vision, mobile_cv/arch/fbnet_v2/fbnet_modeldef_cls_fbnet.py; figures: README.md"
)
_NOTE = "published are figures of another implementation, in Caffe2; the counts are of the PyTorch one"


def _architecture(options: str) -> dict[str, Option]:
    labels = [f"stage{s}.layer{i + 1}" for s, count in enumerate(_LAYERS, start=1) for i in range(count)]
    return dict(zip(labels, options.split(), strict=True))


@final
class FBNet(nn.Module):
    """Inverted residuals with searched kernels, expansions, groups and depth (arXiv 1812.03443, tables 1, 2).

    A convolution is followed by seven stages of 22 layers. Each layer is an inverted residual of kernel 3
    or 5 and expansion 1, 3 or 6, one of expansion 1 whose 1x1 convolutions have two groups, or is skipped
    where it keeps the shape. Activations are ReLU.

    Blocks are those of facebookresearch/mobile-vision, ``mobile_cv/arch/fbnet_v2/irf_block.py``, whose
    networks are the published ones: every convolution has a bias beside its BatchNorm; where the expansion
    is 1 there is no convolution that expands, which the paper has; with two groups the channels are shuffled
    all the same. The published multiply-adds, of networks in Caffe2, are 4.9 M, 4.6 M and 4.9 M higher than
    those of these networks (A, B, C); the missing convolutions alone do not explain it, for they would have
    5.5 M, 15.2 M and 6.8 M. Changed: a layer that changes the shape cannot be skipped (the authors' code
    puts a 1x1 convolution there), so there are fewer networks than the paper's 9^22. Weights have torch's own
    initial values.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``. The resolution is halved five times: 224x224
    in the paper, and any from 32 up. With the defaults there are 8^6 * 9^16 = 485,758,124,386,377,007,104
    networks.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        widths: of the first convolution, each stage, and the last convolution.
        layers: of each stage.
        strides: of each stage's first layer.
        width_multiplier: of all widths, which are rounded to multiples of 8.
        dropout: before the last layer.

    Raises:
        ValueError: not as many widths and strides as stages need.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(FBNet()).size == 8**6 * 9**16
    True
    """

    published: ClassVar[Mapping[str, Published]] = {
        "a": Published(
            _architecture(_A),
            (3, 224, 224),
            244_452_664,
            4_321_232,
            "4.3M parameters, 249.4M FLOPs, 73.3 % top-1",
            _SOURCE,
            {"widths": (16, 16, 24, 32, 64, 112, 184, 352, 1504)},
            _NOTE,
        ),
        "b": Published(
            _architecture(_B),
            (3, 224, 224),
            291_004_424,
            4_818_216,
            "4.8M parameters, 295.6M FLOPs, 74.1 % top-1",
            _SOURCE,
            note=_NOTE,
        ),
        "c": Published(
            _architecture(_C),
            (3, 224, 224),
            378_136_224,
            5_592_784,
            "5.5M parameters, 383.0M FLOPs, 74.9 % top-1",
            _SOURCE,
            note=_NOTE,
        ),
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 16, 24, 32, 64, 112, 184, 352, 1984),
        layers: Sequence[int] = _LAYERS,
        strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
        width_multiplier: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(layers) == len(strides) == len(widths) - 2:
            raise ValueError(
                "each stage needs a number of layers and a stride, and widths are those of the first "
                f"convolution, each stage, and the last convolution; got {len(layers)}, {len(strides)} and "
                f"{len(widths)}"
            )
        stem, *inner, head = (make_divisible(width * width_multiplier) for width in widths)
        self.stem = ConvNormAct(in_channels, stem, 3, stride=2, bias=True, activation=nn.ReLU)
        self.blocks = stages(stem, inner, layers, strides, _layer)
        self.head = ConvNormAct(inner[-1], head, bias=True, activation=nn.ReLU)
        self.classifier = Classifier(head, num_classes, dropout)

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> FBNet:
        """Three narrow stages, 28x28 to 4x4: 8^2 * 9^5 = 3,779,136 networks."""
        return cls(num_classes, in_channels, (16, 16, 32, 64, 256), layers=(2, 2, 3), strides=(1, 2, 2))

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name, with new weights. Raises ``ValueError`` for another name."""
        return published_network(cls, name, arguments)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.head(self.blocks(self.stem(images))))
        return logits


def _layer(in_channels: int, out_channels: int, stride: int, label: str) -> LayerChoice:
    candidates: dict[str, nn.Module] = {
        f"k{kernel}_e{expansion}" + ("_g2" if groups == 2 else ""): InvertedResidual(
            in_channels,
            out_channels,
            kernel,
            expansion,
            stride,
            groups=groups,
            bias=True,
            activation=nn.ReLU,
        )
        for kernel in (3, 5)
        for expansion, groups in ((1, 1), (1, 2), (3, 1), (6, 1))
    }
    if stride == 1 and in_channels == out_channels:
        candidates["skip"] = nn.Identity()
    return LayerChoice(candidates, label=label)
