"""Runs of a user's step that leave what the user keeps in plain Python as it was."""

from __future__ import annotations

import contextlib
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from hwnas.space import ModelSpace

Restore = Callable[[], object]

_NOT_THE_USERS = frozenset({*vars(pl.LightningModule()), "log", "log_dict"})  # the two are captured
_CONTAINERS = (list, deque, set, dict, defaultdict, OrderedDict, Counter)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_MOST_ELEMENTS = 1_000_000  # of a tensor or an array; a larger one is data, which no step writes to


@contextlib.contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Plain attributes are as before afterwards; see `kept_now`."""
    restore = kept_now(module)
    try:
        yield
    finally:
        restore()


def kept_now(module: nn.Module) -> Restore:
    """What brings plain attributes (a counter, a list of outputs, a meter) back to what they are now.

    They are those of the module and of the modules in it, but for the `ModelSpace` and for metrics, which
    have stand-ins. So are the items of lists, dictionaries, sets and queues, nested ones too, tensors and
    arrays of up to a million elements that are written in place, random generators, metrics in plain
    containers, and the attributes of objects that hold nothing but such things. Other objects are not looked
    into.
    """
    seen: set[int] = set()
    return partial(
        _call_all, [restore for holder in _holders(module) for restore in _of_module(holder, seen)]
    )


def _call_all(restores: Iterable[Restore]) -> None:
    for restore in restores:
        restore()


def _holders(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if not isinstance(child, ModelSpace | Metric | MetricCollection):
            yield from _holders(child)


def _of_module(module: nn.Module, seen: set[int]) -> Iterator[Restore]:
    if id(module) in seen:
        return
    seen.add(id(module))
    before = {name: held for name, held in vars(module).items() if name not in _NOT_THE_USERS}
    yield partial(_set_attributes, module, before)
    for held in before.values():
        yield from _of(held, seen)


def _of(held: Any, seen: set[int]) -> Iterator[Restore]:
    """What brings back the state of a thing, and of what stands in it."""
    kind = type(held)
    if kind in _ATOMS or id(held) in seen:
        return
    if isinstance(held, Metric | MetricCollection):  # in a plain container, where no stand-in is
        for child in held.modules():
            yield from _of_module(child, seen)
        return
    seen.add(id(held))
    if kind in _CONTAINERS:
        yield partial(_refill, held, held.copy())
        for item in held.values() if isinstance(held, dict) else held:
            yield from _of(item, seen)
    elif kind is tuple:
        for item in held:
            yield from _of(item, seen)
    elif isinstance(held, Tensor):
        if held.numel() <= _MOST_ELEMENTS and not held.is_inference():
            yield partial(_rewrite, held, held._version, held.detach().clone())
    elif isinstance(held, np.ndarray):
        if held.size <= _MOST_ELEMENTS and held.flags.writeable:
            yield partial(np.copyto, held, held.copy())
    elif isinstance(held, torch.Generator):
        yield partial(held.set_state, held.get_state())
    elif isinstance(held, random.Random):
        yield partial(held.setstate, held.getstate())
    elif isinstance(held, np.random.RandomState):
        yield partial(held.set_state, held.get_state())
    elif isinstance(held, np.random.Generator):
        yield partial(setattr, held.bit_generator, "state", held.bit_generator.state)
    elif _is_plain(held, set()):
        yield partial(_refill, vars(held), vars(held).copy())
        for item in vars(held).values():
            yield from _of(item, seen)


def _is_plain(held: Any, within: set[int]) -> bool:
    """Whether an object's attributes are plain data, so that they can be put back behind its back."""
    if id(held) in within:
        return True
    within.add(id(held))
    if isinstance(held, type | nn.Module) or callable(held) or not hasattr(held, "__dict__"):
        return False
    return all(
        type(item) in (*_ATOMS, *_CONTAINERS, tuple)
        or isinstance(item, Tensor | np.ndarray | np.generic | _GENERATORS)
        or _is_plain(item, within)
        for item in vars(held).values()
    )


def _set_attributes(module: nn.Module, before: dict[str, Any]) -> None:
    own = vars(module)
    for name in [name for name in own if name not in _NOT_THE_USERS and name not in before]:
        del own[name]
    own.update(before)


def _refill(held: Any, copied: Any) -> None:
    held.clear()
    (held.extend if isinstance(held, list | deque) else held.update)(copied)


def _rewrite(held: Tensor, version: int, copied: Tensor) -> None:
    if held._version != version:  # or a graph that holds it would be spoiled
        with torch.no_grad():
            held.copy_(copied)
