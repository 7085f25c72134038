"""How a module is built, as a text that modules share which compute the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, final

import torch
from torch import Tensor, nn

from hwnas.values import Case, Expression, ValueChoice

_ATOMS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def structure(module: nn.Module) -> str:
    """A text for a module; two with one text compute the same on equal inputs, but for their weights' values.

    In it are the classes of the module and of all that it holds, their attributes, the shapes and types of
    their tensors, and their value choices: options, and which of them are one decision, but not the labels.
    What is nothing of this kind (a function, an object of the user's) stands for itself alone.

    >>> first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> structure(first) == structure(second), structure(first) == structure(nn.Linear(2, 4))
    (True, False)
    """
    return _Writer().written(module)


@final
class _Writer:
    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # of modules and tensors: one that is held twice is one
        self._labels: dict[str | int, int] = {}

    def written(self, thing: Any) -> str:
        kind = type(thing)
        if isinstance(thing, Tensor | nn.Module):
            is_known = id(thing) in self._numbers
            number = self._numbers.setdefault(id(thing), len(self._numbers))
            if is_known:
                return f"#{number}"
            if isinstance(thing, nn.Module):
                return f"#{number} {id(kind)}({self._items(vars(thing))})"
            asks = thing.requires_grad
            return f"#{number} {id(kind)} {tuple(thing.shape)} {thing.dtype} {asks}"
        if isinstance(thing, ValueChoice):
            label = thing.label if thing.label is not None else id(thing)
            return f"choice{self._labels.setdefault(label, len(self._labels))}{thing.options!r}"
        if isinstance(thing, Expression | Case):
            return f"{id(kind)}({self._items({f.name: getattr(thing, f.name) for f in fields(thing)})})"
        if isinstance(thing, _ATOMS):
            return f"{kind.__name__} {thing!r}"
        if isinstance(thing, list | tuple):
            return f"{id(kind)}[{', '.join(map(self.written, thing))}]"
        if isinstance(thing, dict):
            return f"{id(kind)}({self._items(thing)})"
        if isinstance(thing, set | frozenset) and all(isinstance(item, str) for item in thing):
            return f"{id(kind)}{sorted(thing)}"
        return f"object {id(thing)}"

    def _items(self, items: dict[Any, Any]) -> str:
        return ", ".join(f"{self.written(key)}: {self.written(value)}" for key, value in items.items())
