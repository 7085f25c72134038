"""From a network with choices to the plain network that an architecture names."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor, nn

from profilers.space import Option

T = TypeVar("T")

_ATOMS = frozenset({type(None), bool, int, float, str})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set, frozenset})

_UNSET = object()

# By which a class says how it is copied or pickled.
_SAYS_HOW = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
# Where torch's say no more than what files of old versions lack.
_TORCHS = {f"torch.nn.modules.{name}" for name in ("activation", "conv", "module", "pooling", "upsampling")}

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

# What comes before the module runs, and what after it: torch has no public way to read them.
_HOOKS_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_pre_hooks")
_HOOKS_AFTER = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
)


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
    attribute, with plain numbers where values stood; so is a dataclass that holds values. Hooks go with
    their modules, those of a choice or mixed operation to what takes its place (a layer that stands in two
    choices takes on the hooks of both).

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
        kind: type[Any] = type(thing)
        if kind in _ATOMS:
            return thing
        if kind in _CONTAINERS and not thing:  # a module has a dozen of them
            return cast("T", kind())
        if id(thing) in self._copies:
            return cast("T", self._copies[id(thing)])
        if isinstance(thing, Freezes):
            plain = self._keep(thing, thing.frozen(self))
            self._carry_hooks(thing, plain)
            return plain
        if isinstance(thing, nn.Module) and not self._is_plain(thing):
            return self._module(thing)
        if isinstance(thing, dict) and type(thing) in (dict, OrderedDict):
            return type(thing)((key, self(item)) for key, item in thing.items())
        if isinstance(thing, list | tuple) and type(thing) in (list, tuple):
            return type(thing)(self(item) for item in thing)
        if not isinstance(thing, nn.Module) and _holds_freezing(thing):
            if is_dataclass(thing):
                return self._dataclass(thing)
            raise TypeError(
                "values and choices are frozen where a module holds them as an attribute, in a plain "
                f"list, tuple or dict, or in a dataclass; got {type(thing).__name__}: {thing}"
            )
        if isinstance(thing, nn.Module):
            copy_empty(thing, self._copies)
        return copy.deepcopy(thing, self._copies)

    def copy_of(self, thing: object) -> Any:
        """The copy that was made of a thing; None where none was."""
        return self._copies.get(id(thing))

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

    def _dataclass(self, thing: T) -> T:
        clone = self._keep(thing, copy.copy(thing))
        # More than the fields: a cached property may have been computed from values.
        for name, held in {**_fields(thing), **getattr(thing, "__dict__", {})}.items():
            object.__setattr__(clone, name, self(held))  # as a frozen dataclass sets its own
        return clone

    def _carry_hooks(self, module: object, plain: object) -> None:
        if not isinstance(module, nn.Module) or not isinstance(plain, nn.Module):
            return  # a value becomes a number
        for name in (*_HOOKS_BEFORE, *_HOOKS_AFTER):
            if given := vars(module)[name]:
                outer, inner = self(OrderedDict(given)), vars(plain)[name]
                # A picked layer has hooks of its own, which are inside.
                both = (outer, inner) if name in _HOOKS_BEFORE else (inner, outer)
                vars(plain)[name] = OrderedDict(item for hooks in both for item in hooks.items())
        if module._backward_hooks:
            plain._is_full_backward_hook = module._is_full_backward_hook

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


def copy_empty(module: nn.Module, copies: dict[int, Any]) -> None:
    """Copies what is empty in a module and those inside: a dozen dictionaries of hooks in each.

    copy.deepcopy takes longer for these than for all else.

    Args:
        module: that is copied next.
        copies: the memo of copy.deepcopy, which gets the copies.
    """
    for child in module.modules():
        for held in vars(child).values():
            if type(held) in (OrderedDict, set) and not held:
                copies.setdefault(id(held), type(held)())


def deep_copy(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """As ``copy.deepcopy(module, copies)``, in half of its time for a module of many modules.

    copy.deepcopy asks of each number in each module how it is to be copied, and of each dictionary.

    Args:
        module: what to copy; modules that say how they are copied or pickled are left to copy.deepcopy.
        copies: the memo of copy.deepcopy, which has copies of all parameters and buffers.
    """
    known: nn.Module | None = copies.get(id(module))
    if known is not None:
        return known
    kind: Any = type(module)  # mypy does not believe that a class can be hashed
    if not _is_usual(kind):
        return copy.deepcopy(module, copies)
    clone: nn.Module = kind.__new__(kind)
    copies[id(module)] = clone
    for name, held in vars(module).items():
        if name == "_compiled_call_impl":  # torch does not copy it
            continue
        if name == "_modules":
            inside = {key: None if child is None else deep_copy(child, copies) for key, child in held.items()}
            vars(clone)[name] = type(held)(inside)
        elif type(held) in _CONTAINERS and not held:
            vars(clone)[name] = type(held)()
        else:
            vars(clone)[name] = held if is_bare(held) else copy.deepcopy(held, copies)
    return clone


@functools.cache
def _is_usual(kind: type[Any]) -> bool:
    """Whether a class is copied attribute by attribute; torch's own fill in what old files lack, no more."""
    said = (vars(base)[name] for base in kind.__mro__ for name in _SAYS_HOW if name in vars(base))
    return all(getattr(how, "__module__", None) in {None, *_TORCHS} for how in said)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has besides what every module has: parameters, children, hooks."""
    return {name: held for name, held in vars(module).items() if name not in _OF_EVERY_MODULE}


def contents(
    thing: object, keys: tuple[str, ...] = (), within: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """What stands in lists, tuples, dictionaries and dataclasses, however deep, with the way to it.

    Numbers, strings and None that they hold are left out, for there are many and nothing is in them.

    Args:
        thing: where to look; anything else is its own only content.
        keys: the way to ``thing``: indices, keys and names of fields.
        within: ids of the containers around it; one that contains itself is not entered again.
    """
    if isinstance(thing, list | tuple):
        items: Mapping[Any, Any] = dict(enumerate(thing))
    elif isinstance(thing, dict):
        items = thing
    elif is_dataclass(thing) and not isinstance(thing, type | Freezes | nn.Module):
        items = _fields(thing)
    else:
        yield keys, thing
        return
    if id(thing) not in within:
        for key, item in items.items():
            if not is_bare(item):
                yield from contents(item, (*keys, str(key)), (*within, id(thing)))


def is_bare(thing: object) -> bool:
    """Whether a thing is a number, a string or None, a tuple of such (a stride), or an empty container."""
    kind = type(thing)
    if kind is tuple:
        return _ATOMS.issuperset(map(type, cast("tuple[Any, ...]", thing)))
    return kind in _ATOMS or (kind in _CONTAINERS and not thing)


def _fields(thing: Any) -> dict[str, Any]:
    """A dataclass's fields that are set."""
    held = {field.name: getattr(thing, field.name, _UNSET) for field in fields(thing)}
    return {name: value for name, value in held.items() if value is not _UNSET}


def _holds_freezing(thing: object) -> bool:
    return any(
        isinstance(found, Freezes)
        or (isinstance(found, set | frozenset) and any(map(_holds_freezing, found)))
        for _, found in contents(thing)
    )
