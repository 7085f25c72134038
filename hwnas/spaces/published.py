"""Networks that were published, as architectures of the spaces that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, cast, final

import torch
from torch import Tensor, nn

from hwnas.space import ModelSpace
from profilers import count_macs
from profilers.space import Option


@final
@dataclass(frozen=True)
class Published:
    """One published network: where it stands in its space, and what was said and counted of it.

    Attributes:
        architecture: its options in the space that the class makes with ``arguments``.
        input_shape: of one image, channels x height x width, for which it was counted.
        macs: multiply-adds of its convolutions and linear layers, biases apart, counted on the authors' code;
            where that could not be had, on ours, and the note or the source says so.
        params: its learnable parameters, counted likewise.
        reported: the published figures, as they are printed.
        source: where the architecture and the counts come from.
        arguments: of the class, where they are not the defaults: widths, stems, resolutions.
        note: why the published figures are not those that were counted, where they are not.
    """

    architecture: Mapping[str, Option]
    input_shape: tuple[int, int, int]
    macs: int
    params: int
    reported: str
    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class ReadyMadeSpace(Protocol):
    """What every class of `hwnas.spaces` has besides being a network with choices."""

    published: ClassVar[Mapping[str, Published]]
    """By the paper's name, in lower case."""

    def __init__(self, *, num_classes: int, in_channels: int) -> None: ...

    @classmethod
    def small(cls, num_classes: int = 10, in_channels: int = 1) -> Self:
        """The same choices at a size for images of 28x28 to 32x32."""
        ...

    @classmethod
    def from_published(cls, name: str, **arguments: Any) -> nn.Module:
        """The plain network of that name, with new weights."""
        ...


def published_network(space: type[ReadyMadeSpace], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The plain network that a class has under ``published[name]``, with new weights.

    Args:
        space: a class of `hwnas.spaces`.
        name: of the network. Case and punctuation do not matter, and the space's name may stand before it:
            ``"proxyless_mobile_14"`` is ``"mobile-14"``.
        arguments: of the class, over those that the network was published with: ``num_classes`` and such.

    Raises:
        ValueError: there is no network of that name.
    """
    found = space.published[known_as(space, name)]
    made = ModelSpace(cast("nn.Module", space(**{**found.arguments, **arguments})))
    return made.freeze(made.validate(found.architecture))


def known_as(space: type[ReadyMadeSpace], name: str) -> str:
    """The name in ``space.published`` that is meant.

    Args:
        space: a class of `hwnas.spaces`.
        name: as `published_network` takes it.

    Raises:
        ValueError: there is no network of that name.

    >>> from hwnas.spaces import FBNet
    >>> known_as(FBNet, "fbnet_a"), known_as(FBNet, "FBNet-C")
    ('a', 'c')
    """
    if name in space.published:
        return name
    own, wanted = _plain(space.__name__), _plain(name)
    # "darts" or "proxyless" are enough of a space's name, single letters are not.
    before = ["", *(own[:end] for end in range(4, len(own) + 1))]
    for known in space.published:
        if any(wanted == start + _plain(known) or start + wanted == _plain(known) for start in before):
            return known
    has = ", ".join(space.published) or "none"
    raise ValueError(f"{space.__name__} has no published network {name!r}; it has {has}")


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


@final
@dataclass(frozen=True)
class Conformance:
    """A published network, counted here.

    Attributes:
        space: name of the space.
        name: of the network.
        macs, params: as counted here.
        published: what they have to equal.
    """

    space: str
    name: str
    macs: int
    params: int
    published: Published

    @property
    def is_equal(self) -> bool:
        return (self.macs, self.params) == (self.published.macs, self.published.params)


def conformance(space_name: str, space: type[ReadyMadeSpace], name: str) -> Conformance:
    """Builds a published network on the ``meta`` device and counts it."""
    published = space.published[name]
    with torch.device("meta"):
        network = published_network(space, name, {})
        image: Tensor = torch.empty(1, *published.input_shape)
    params = sum(parameter.numel() for parameter in network.parameters())
    return Conformance(space_name, name, count_macs(network, [image]).headline, params, published)
