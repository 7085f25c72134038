"""Which parts of a network are alike: equal in all but their weights and the labels of their choices."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hwnas.fold import Fold
from hwnas.freezing import is_bare
from hwnas.values import ValueChoice


def description(module: nn.Module, labels: Sequence[str]) -> bytes | None:
    """What a module is, as bytes: modules with equal ones do the same to inputs of equal shapes.

    It is the module's pickle, with the shape and type in place of each tensor, the place of its label
    among ``labels`` in place of each choice, and one string in place of all the attributes of a module that
    are numbers, strings or empty. So equal bytes mean equal modules; unequal ones need not mean unequal
    modules, since a pickle also tells which of their parts are one object.

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

    def reducer_override(self, thing: Any) -> Any:
        kind: Any = type(thing)
        as_any_object = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
        if not (isinstance(thing, nn.Module) and as_any_object):
            return NotImplemented
        state: dict[str, Any] = kind.__getstate__(thing)
        bare = [item for item in state.items() if is_bare(item[1])]
        rest = {name: held for name, held in state.items() if not is_bare(held)}
        return copyreg.__newobj__, (kind, repr(bare)), rest  # type: ignore[attr-defined]

    def persistent_id(self, thing: Any) -> Any:
        # Final, both; isinstance asks ABCMeta, for each of thousands of things.
        if type(thing) is ValueChoice or (type(thing) is Fold and thing.label in self._labels):
            return "choice", self._labels.index(thing.name()), thing.options
        if isinstance(thing, Tensor):
            number = self._numbers.setdefault(id(thing), len(self._numbers))  # tied weights have one
            return "tensor", type(thing), thing.dtype, tuple(thing.shape), thing.requires_grad, number
        return None
