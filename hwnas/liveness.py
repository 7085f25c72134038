"""Which tensors lie in memory while each part of a network runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from profilers.space import Memory, Role

_FOREVER = float("inf")


@final
@dataclass(frozen=True)
class Event:
    """One part that ran: with which tensors, and what it made.

    Attributes:
        site: what ran.
        inputs, outputs: the very tensors; a tensor that is handed on is the same object.
        is_free: the outputs are views of the first input.
    """

    site: Any
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    is_free: bool


@dataclass
class _Buffer:
    size: int
    born: int
    last: float = -1


def needed(events: Sequence[Event], outputs: Sequence[Tensor]) -> list[Event]:
    """The events that lead to the network's outputs: an exported graph holds no others."""
    wanted = {id(tensor) for tensor in outputs}
    found = []
    for event in reversed(events):
        if any(id(made) in wanted for made in event.outputs):
            wanted.update(id(given) for given in event.inputs)
            found.append(event)
    return found[::-1]


def liveness(
    events: Sequence[Event], inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: Iterable[Tensor]
) -> list[Memory]:
    """What lies in memory during each event, besides what it makes.

    Args:
        events: in the order in which they ran, those that are `needed`.
        inputs: of the network; they lie in memory until they were used last.
        outputs: of the network; they lie in memory to the end.
        weights: of the network; they are not counted.
    """
    known_weights = {id(weight) for weight in weights}
    buffers: dict[int, _Buffer] = {id(given): _Buffer(_size(given), -1) for given in inputs}
    for index, event in enumerate(events):
        for given in event.inputs:
            buffers.setdefault(id(given), _Buffer(_size(given), -1)).last = index
        for made in event.outputs:
            if event.is_free and event.inputs:
                buffers[id(made)] = buffers[id(event.inputs[0])]
            else:  # in place: it has one already
                buffers.setdefault(id(made), _Buffer(_size(made), index))
    for made in outputs:
        if id(made) in buffers:
            buffers[id(made)].last = _FOREVER
    kept = {id(buffer): buffer for key, buffer in buffers.items() if key not in known_weights}

    def role(event: Event, place: int, index: int) -> Role:
        given = event.inputs[place]
        if id(given) in known_weights:
            return "weight"
        buffer = buffers[id(given)]
        if any(buffers[id(other)] is buffer for other in event.inputs[:place]):
            return "again"
        return "held" if buffer.last > index else "dies"

    found = []
    for index, event in enumerate(events):
        own = {id(buffers[id(given)]) for given in event.inputs}
        beside = sum(
            buffer.size
            for key, buffer in kept.items()
            if buffer.born < index < buffer.last and key not in own
        )
        found.append(Memory(beside, tuple(role(event, n, index) for n in range(len(event.inputs)))))
    return found


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
