"""AutoFormer: vision transformers with elastic width, depth, heads and MLPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.choices import Repeat
from hwnas.nn import Conv2d, Embedding, LayerNorm, Linear
from hwnas.spaces.published import Published, published_network
from hwnas.values import Value, ValueChoice, to_int
from profilers.space import Architecture

Size = int | Value


@final
class Tokens(nn.Module):
    """Images as tokens: one a patch, and one for the class in front, each with its position.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, 1 + grid**2, width)``, where ``grid * patch`` is the largest
    H and W; around smaller images there is black (0).
    """

    places: Tensor

    def __init__(self, in_channels: int, width: Size, patch: int, grid: int) -> None:
        super().__init__()
        self.side = patch * grid
        self.patches = Conv2d(in_channels, width, patch, stride=patch)
        self.class_token = Embedding(1, width)
        self.positions = Embedding(1 + grid**2, width)
        self.register_buffer("places", torch.arange(1 + grid**2), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if max(height, width) > self.side:
            raise ValueError(
                f"images must be of at most {self.side}x{self.side}; got {height}x{width}. "
                "Give AutoFormer their image_size"
            )
        if (height, width) != (self.side, self.side):
            top, left = (self.side - height) // 2, (self.side - width) // 2
            images = F.pad(images, (left, self.side - width - left, top, self.side - height - top))
        patches = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_token(self.places[:1]).expand(len(images), 1, -1)
        tokens: Tensor = torch.cat([first, patches], dim=1) + self.positions(self.places)
        return tokens


@final
class RelativePositions(nn.Module):
    """A vector for how far apart two tokens are, vertically plus horizontally (AutoFormer, section 3.1).

    Shapes: ``(tokens, tokens, features)``. Pairs with the class have a row of their own.

    Args:
        apart: (2, tokens, tokens), the row of every pair in either table; see `_apart`.
        features: of a vector.
        rows: of either table.
    """

    apart: Tensor

    def __init__(self, apart: Tensor, features: int, rows: int) -> None:
        super().__init__()
        self.register_buffer("apart", apart, persistent=False)
        self.vertical = nn.Embedding(rows, features)
        self.horizontal = nn.Embedding(rows, features)

    def forward(self) -> Tensor:
        vectors: Tensor = self.vertical(self.apart[0]) + self.horizontal(self.apart[1])
        return vectors


def _apart(grid: int, furthest: int) -> Tensor:
    """Rows of the tables: 0 for pairs with the class, else the distance from ``-furthest`` up, plus 1."""
    places = torch.arange(grid**2)
    apart = [at - at[:, None] for at in (places // grid, places % grid)]
    rows = [distance.clamp(-furthest, furthest) + furthest + 1 for distance in apart]
    return F.pad(torch.stack(rows), (1, 0, 1, 0)).int()


@final
class Attention(nn.Module):
    """Attention with relative positions, after a normalisation and added to what goes in.

    Shapes: ``(N, tokens, width)`` to the same. Heads have one size, however many there are, and are together
    as wide as they are, whatever ``width`` is. Each is computed by itself, so that the largest number holds
    all others: under mixing weights the projection masks them by their expected presence.
    """

    def __init__(self, width: Size, heads: Size, head_width: int, apart: Tensor, furthest: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = head_width
        self.norm = LayerNorm(width)
        self.query = Linear(width, heads * head_width)
        self.key = Linear(width, heads * head_width)
        self.value = Linear(width, heads * head_width)
        self.key_positions = RelativePositions(apart, head_width, 2 * furthest + 2)
        self.value_positions = RelativePositions(apart, head_width, 2 * furthest + 2)
        self.project = Linear(heads * head_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        query, key, value = (self._split(of(normed)) for of in (self.query, self.key, self.value))
        query = query * self.head_width**-0.5
        scores = query @ key.transpose(-2, -1) + torch.einsum("nhqd,qkd->nhqk", query, self.key_positions())
        weights = scores.softmax(-1)
        mixed = weights @ value + torch.einsum("nhqk,qkd->nhqd", weights, self.value_positions())
        output: Tensor = tokens + self.project(mixed.transpose(1, 2).flatten(2))
        return output

    def _split(self, features: Tensor) -> Tensor:
        return features.reshape(*features.shape[:2], -1, self.head_width).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


@final
class MLP(nn.Module):
    """Two linear layers, after a normalisation and added to what goes in.

    Shapes: ``(N, tokens, width)`` to the same; ``ratio`` times as many features are in between.
    """

    def __init__(self, width: Size, ratio: float | Value) -> None:
        super().__init__()
        hidden = to_int(width * ratio)
        self.ratio = ratio
        self.norm = LayerNorm(width)
        self.widen = Linear(width, hidden)
        self.narrow = Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = tokens + self.narrow(F.gelu(self.widen(self.norm(tokens))))
        return output

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}"


@final
class Head(nn.Module):
    """The mean over all patches, normalised before, and a linear layer: ``(N, tokens, width)`` to classes."""

    def __init__(self, width: Size, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.linear = Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.norm(tokens)[:, 1:].mean(1))
        return scores


@final
class AutoFormer(nn.Module):
    """A vision transformer whose width, depth, heads and MLPs are elastic (arXiv 2107.00651).

    The width and the number of blocks are one choice each; every block has heads and an MLP ratio of its own.
    The defaults are the tiny supernet; ``AutoFormer(**SMALL)`` and ``AutoFormer(**BASE)`` are the others.

    Shapes: ``(N, in_channels, H, W)``, H and W up to ``image_size``, to ``(N, num_classes)``. With the
    defaults there are 3 * (4^12 + 4^13 + 4^14) = 1,056,964,608 networks; 7.7e13 in `SMALL`, 6.2e15 in `BASE`.

    For strategies that run one path, unless ``widths`` has one option: a `LayerNorm` cannot be mixed over
    widths. Heads, ratios and depth alone can be searched under mixing weights, too.

    As in microsoft/Cream, AutoFormer (``supernet_transformer.py`` with ``--gp --change_qk
    --relative_position``), heads have 64 features and the classifier gets the mean over all patches.
    Differences: queries, keys and values are layers of their own, whose features are taken from the front;
    images that are smaller are framed with black, where the original takes one size; there is no drop path
    and no dropout.

    Args:
        num_classes: how many classes.
        in_channels: channels of the images.
        widths: options of a token's features.
        heads: options of every block's number of heads.
        ratios: options of every block's MLP, in multiples of the width.
        depths: options of the number of blocks.
        image_size: the largest side of an image, a multiple of ``patch``.
        patch: side of a patch, which becomes a token.
        head_width: features of a head.
        furthest: distance in patches from which on all relative positions are one.

    >>> from hwnas import ModelSpace
    >>> ModelSpace(AutoFormer()).size
    1056964608
    """

    published: ClassVar[Mapping[str, Published]]  # below

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        widths: Sequence[int] = (192, 216, 240),
        heads: Sequence[int] = (3, 4),
        ratios: Sequence[float] = (3.5, 4),
        depths: Sequence[int] = (12, 13, 14),
        image_size: int = 224,
        patch: int = 16,
        head_width: int = 64,
        furthest: int = 14,
    ) -> None:
        if image_size % patch:
            raise ValueError(f"image_size must be a multiple of patch; got {image_size} and {patch}")
        super().__init__()
        width = _choice(widths, "width")
        grid = image_size // patch
        self.tokens = Tokens(in_channels, width, patch, grid)
        apart = _apart(grid, furthest)
        layers: list[nn.Module] = []
        for block in range(1, max(depths) + 1):
            own_heads = _choice(heads, f"block{block}.heads")
            layers.append(Attention(width, own_heads, head_width, apart, furthest))
            layers.append(MLP(width, _choice(ratios, f"block{block}.ratio")))
        # Two layers a block: each is a site, whose costs are tables of its own choices.
        self.blocks = Repeat(layers, _choice(depths, "depth") * 2)
        self.head = Head(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.tokens(images)))
        return scores

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> AutoFormer:
        """Two or three narrow blocks on the 64 patches of an image of up to 32x32."""
        return cls(
            num_classes,
            in_channels,
            widths=(48, 64),
            heads=(2, 3),
            ratios=(2, 3),
            depths=(2, 3),
            image_size=32,
            patch=4,
            head_width=16,
            furthest=7,
        )

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name in `published`, with new weights.

        Raises:
            ValueError: there is none of that name.
        """
        return published_network(cls, name, arguments)


def _choice(options: Sequence[Any], label: str) -> Any:
    """What has one option is no choice."""
    return ValueChoice(options, label) if len(options) > 1 else options[0]


SMALL: Mapping[str, Any] = {"widths": (320, 384, 448), "heads": (5, 6, 7), "ratios": (3, 3.5, 4)}
"""Arguments of the small supernet (AutoFormer, table 1)."""

BASE: Mapping[str, Any] = {
    "widths": (528, 576, 624),
    "heads": (8, 9, 10),
    "ratios": (3, 3.5, 4),
    "depths": (14, 15, 16),
}
"""Arguments of the base supernet (AutoFormer, table 1)."""


def _published(
    name: str,
    width: int,
    heads: Sequence[int],
    ratios: Sequence[float],
    deepest: int,
    macs: int,
    params: int,
    reported: str,
    arguments: Mapping[str, Any],
    note: str,
) -> Published:
    architecture: Architecture = {"width": width, "depth": len(heads)}
    for block in range(deepest):
        runs = min(block, len(heads) - 1)  # blocks that do not run have options, too
        architecture[f"block{block + 1}.heads"] = heads[runs]
        architecture[f"block{block + 1}.ratio"] = ratios[runs]
    source = f"microsoft/Cream: AutoFormer/experiments/subnet/{name}.yaml; arXiv 2107.00651, table 4"
    return Published(architecture, (3, 224, 224), macs, params, reported, source, arguments, note)


_COUNTS = (
    "the products of attention and of relative positions are counted as they are computed; convolution and "
    "linear layers alone have {}, and the authors' own formula (get_complexity), which also counts "
    "normalisations and takes 14 multiply-adds for a pair of relative positions, has {}"
)

AutoFormer.published = {
    "t": _published(
        "AutoFormer-T",
        192,
        (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3),
        (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5),
        deepest=14,
        macs=1_481_938_432,
        params=5_867_944,
        reported="1.3G, 5.7M",
        arguments={"ratios": (3, 3.5, 4)},
        note="its MLPs have ratios of 3, which the tiny supernet of the paper has not; "
        + _COUNTS.format("1,084,534,272", "1,344,034,362"),
    ),
    "s": _published(
        "AutoFormer-S",
        384,
        (6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7),
        (3, 3.5, 3, 3.5, 4, 4, 4, 4, 4, 4, 4, 3.5, 4),
        deepest=14,
        macs=5_161_400_832,
        params=22_891_432,
        reported="5.1G, 22.9M",
        arguments=SMALL,
        note=_COUNTS.format("4,386,462,720", "4,892,144,730"),
    ),
    "b": _published(
        "AutoFormer-B",
        576,
        (9, 9, 9, 9, 9, 10, 9, 9, 10, 9, 10, 9, 9, 10),
        (3.5, 3.5, 4, 3.5, 4, 3.5, 3.5, 3, 4, 4, 3, 4, 3, 3.5),
        deepest=16,
        macs=11_691_179_008,
        params=53_691_688,
        reported="11G, 53.7M",
        arguments=BASE,
        note=_COUNTS.format("10,399,615,488", "11,236,929,660"),
    ),
}
