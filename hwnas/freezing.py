"""From a network with choices to the plain network that an architecture names."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor, nn

from profilers.space import Option

T = TypeVar("T")

_ATOMS = (type(None), bool, int, float, str)


class Freezes(ABC):
    """What does not stay in a subnet as it is: choices, values, mixed operations."""

    @abstractmethod
    def frozen(self, freezer: Freezer) -> Any:
        """The plain counterpart under ``freezer.architecture``."""


@final
class Freezer:
    """Copies a network with every choice resolved.

    Modules that hold no choice are deep-copied, so that tied weights stay tied; only picked options are
    ever copied. A class that holds choices keeps its class: its instance is rebuilt attribute by
    attribute, with plain numbers where values stood.

    Args:
        architecture: one option for each choice that is reached.
    """

    def __init__(self, architecture: Mapping[str, Option]) -> None:
        self.architecture = architecture
        self._copies: dict[int, Any] = {}  # the memo of copy.deepcopy
        self._originals: list[object] = []  # an id in the memo stays valid while its object lives
        self._plain: dict[int, bool] = {}
        self._parts: dict[tuple[int, int, torch.Size], nn.Parameter] = {}

    def __call__(self, thing: T) -> T:
        """The plain copy of a module, a value, a container of them, or anything else."""
        if type(thing) in _ATOMS:
            return thing
        if id(thing) in self._copies:
            return cast("T", self._copies[id(thing)])
        if isinstance(thing, Freezes):
            return self._keep(thing, thing.frozen(self))
        if isinstance(thing, nn.Module) and not self._is_plain(thing):
            return self._module(thing)
        if isinstance(thing, dict) and type(thing) in (dict, OrderedDict):
            return type(thing)((key, self(item)) for key, item in thing.items())
        if isinstance(thing, list | tuple) and type(thing) in (list, tuple):
            return type(thing)(self(item) for item in thing)
        if not isinstance(thing, nn.Module) and _holds_freezing(thing):
            raise TypeError(
                "values and choices are frozen where a module holds them as an attribute or in a plain "
                f"list, tuple or dict; got {type(thing).__name__}: {thing}"
            )
        return copy.deepcopy(thing, self._copies)

    def part(self, whole: Tensor, part: Tensor) -> nn.Parameter:
        """A copied slice of a parameter; equal slices of one parameter are one, so they stay tied."""
        if isinstance(whole, nn.Parameter) and part.shape == whole.shape:
            return self(whole)
        key = (id(whole), int(part.storage_offset()), part.shape)
        if key not in self._parts:
            self._parts[key] = nn.Parameter(part.detach().clone(), requires_grad=whole.requires_grad)
            self._originals.append(whole)
        return self._parts[key]

    def _module(self, module: T) -> T:
        clone = type(module).__new__(type(module))
        self._keep(module, clone)
        clone.__dict__ = {name: self(value) for name, value in module.__dict__.items()}
        return clone

    def _keep(self, thing: T, copied: Any) -> T:
        self._copies[id(thing)] = copied
        self._originals.append(thing)
        return cast("T", copied)

    def _is_plain(self, module: nn.Module) -> bool:
        known = self._plain.get(id(module))
        if known is None:
            known = (
                not isinstance(module, Freezes)
                and not _holds_freezing(vars(module))
                and all(self._is_plain(child) for child in module.children())
            )
            self._plain[id(module)] = known
        return known


def _holds_freezing(thing: object) -> bool:
    if isinstance(thing, Freezes):
        return True
    if isinstance(thing, list | tuple):
        return any(_holds_freezing(item) for item in thing)
    if isinstance(thing, dict):
        return any(_holds_freezing(item) for item in thing.values())
    return False
