"""Which parts of a network are alike: equal in all but their weights and the labels of their choices."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hwnas.fold import Fold
from hwnas.values import ValueChoice


def description(module: nn.Module, labels: Sequence[str]) -> bytes | None:
    """What a module is, as bytes: modules with equal ones do the same to inputs of equal shapes.

    It is the module's pickle, with the shape and type in place of each tensor, and the place of its label
    among ``labels`` in place of each choice. So equal bytes mean equal modules; unequal ones need not
    mean unequal modules, since a pickle also tells which of their parts are one object.

    Args:
        module: without branches.
        labels: of its choices, in their order.

    Returns:
        None where it cannot be pickled.

    >>> description(nn.Linear(4, 8), []) == description(nn.Linear(4, 8), [])
    True
    >>> description(nn.Linear(4, 8), []) == description(nn.Linear(4, 8, bias=False), [])
    False
    """
    file = io.BytesIO()
    try:
        _Describer(file, labels).dump(module)
    except (pickle.PicklingError, AttributeError, TypeError):  # what an object raises that has no pickle
        return None
    return file.getvalue()


class _Describer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, labels: Sequence[str]) -> None:
        super().__init__(file)
        self._labels = labels
        self._numbers: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> Any:
        # Final, both; isinstance asks ABCMeta, for each of thousands of things.
        if type(thing) is ValueChoice or (type(thing) is Fold and thing.label in self._labels):
            return "choice", self._labels.index(thing.name()), thing.options
        if isinstance(thing, Tensor):
            number = self._numbers.setdefault(id(thing), len(self._numbers))  # tied weights have one
            return "tensor", type(thing), thing.dtype, tuple(thing.shape), thing.requires_grad, number
        return None
