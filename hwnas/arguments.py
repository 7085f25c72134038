"""Arguments of a call with their tensors taken out, and put in again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """Stands for the ``index``-th tensor among the arguments."""

    index: int


@final
class Operation(nn.Module):
    """A function, or a module with arguments that are no tensors, as a module of its tensors alone."""

    def __init__(self, function: Callable[..., Any], template: Any, keywords: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.template = template
        self.keywords = keywords

    def forward(self, *tensors: Tensor) -> Any:
        inputs = filled(self.template, tensors)
        return self.function(*inputs, **filled(self.keywords, tensors))


def emptied(thing: Any, tensors: list[Tensor]) -> Any:
    """A container of arguments with every tensor replaced by a slot and added to ``tensors``."""
    if isinstance(thing, Tensor):
        # Detached: a parameter among the arguments is given to the site like any tensor.
        tensors.append(thing.detach())
        return Slot(len(tensors) - 1)
    if isinstance(thing, list | tuple):
        items = [emptied(item, tensors) for item in thing]
        return tuple(items) if isinstance(thing, tuple) else items
    if isinstance(thing, dict):
        return {key: emptied(item, tensors) for key, item in thing.items()}
    return thing


def filled(thing: Any, tensors: Sequence[Tensor]) -> Any:
    """What `emptied` made, with these tensors in the slots."""
    if isinstance(thing, Slot):
        return tensors[thing.index]
    if isinstance(thing, list | tuple):
        items = [filled(item, tensors) for item in thing]
        return tuple(items) if isinstance(thing, tuple) else items
    if isinstance(thing, Mapping):
        return {key: filled(item, tensors) for key, item in thing.items()}
    return thing


def flat(thing: Any) -> Iterator[Any]:
    """What stands in nested containers, in the order of `emptied`."""
    if isinstance(thing, list | tuple):
        for item in thing:
            yield from flat(item)
    elif isinstance(thing, dict):
        yield from flat(list(thing.values()))
    else:
        yield thing


def tensors_in(thing: Any) -> list[Tensor]:
    """Those in nested containers, in the order of `emptied`."""
    return [item for item in flat(thing) if isinstance(item, Tensor)]
