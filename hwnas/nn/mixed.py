"""What all mixed operations share: the largest weight is held, and sliced or blended on the way."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hwnas.freezing import Freezer, Freezes
from hwnas.values import (
    Combination,
    Value,
    as_value,
    combinations,
    live_options,
    values_in,
    weights_of,
)

# The end of an error that says what cannot be blended.
ONE_PATH = "search with a strategy that runs one path (RandomOneShot, ENAS)"

# The sizes of each operation by its values, the options that run and its fixed arguments, with the values,
# whose ids are in the key: to work them out in every step takes a noticeable part of it.
_RUNNING: WeakKeyDictionary[nn.Module, dict[Any, tuple[list[Value], dict[str, Any]]]] = WeakKeyDictionary()
_MOST_KNOWN = 256

# Arguments that are no sizes: any number will do.
_FRACTIONS = {"eps", "momentum", "p", "dropout"}


class MixedOperation(Freezes, nn.Module, ABC):
    """An operation of ``torch.nn`` whose arguments may be values.

    It *is* its ``torch.nn`` class at the largest size (``isinstance`` and weight initialisation work);
    ``values`` holds the arguments that are decided. Without any it is the plain operation.

    An operation of your own inherits from this and from the plain one. Its ``__init__`` hands what `split`
    found to the plain ``__init__``, then sets ``values``; its ``forward`` runs on the `parts` of the
    `running_sizes`. The test case in ``tests/contracts/mixed_operation.py`` holds it to what is promised
    here::

        class PReLU(MixedOperation, nn.PReLU):
            elastic = ("num_parameters",)

            def __init__(self, num_parameters: int | Value = 1, init: float = 0.25) -> None:
                values, largest = split({"num_parameters": num_parameters}, {"init": init})
                super().__init__(**largest)
                self.values = values

            def forward(self, input: Tensor) -> Tensor:
                return F.prelu(input, self.parts(self.running_sizes())["weight"])

            def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
                return nn.PReLU(**sizes, device="meta")

            def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
                return {"weight": self.weight[: sizes["num_parameters"]]}

            def check_can_mix(self) -> None:
                pass  # each channel by itself: the widest holds all others

    What runs under mixing weights keeps to one rule: the input has the largest width and is not masked yet,
    the output has the largest width and is not masked either. An operation that sums over its input's
    channels masks them, by the expected presence of each (`blend`), so that what it returns is the mixture
    of the sliced paths. Masking the producer's output too would square the weights.
    """

    elastic: ClassVar[tuple[str, ...]]
    """The arguments that may be values; attributes of these names hold the largest."""

    values: dict[str, Value]

    @abstractmethod
    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        """The ``torch.nn`` operation of these sizes, on the ``meta`` device."""

    @abstractmethod
    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every parameter and buffer of `plain` by its name there, cut out of the largest."""

    @abstractmethod
    def check_can_mix(self) -> None:
        """Raises ``ValueError`` where no blended weight equals the mixture of the options."""

    def sizes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments that may be values, as ``chosen`` has them, else as they are fixed."""
        return {name: chosen.get(name, getattr(self, name)) for name in self.elastic}

    def live(self, found: Sequence[Combination]) -> list[dict[str, Any]]:
        """The sizes of every outcome that this forward pass computes; one where nothing is mixed."""
        return [self.sizes(combination.values) for combination in found]

    def running_sizes(self) -> dict[str, Any]:
        """The sizes of this forward pass: of the one path, or the largest of those that are mixed.

        Not to be changed: the next pass over these options gets the same ones.
        """
        known = _RUNNING.setdefault(self, {})
        # The arguments as text: an operation of the user's own may hold lists.
        fixed = repr([*map(vars(self).get, self.elastic)])
        key = tuple(map(id, self.values.values())), live_options(self.values), fixed
        if key not in known:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            sizes = self.sizes({name: greatest(self.live_sizes(name)) for name in self.values})
            known[key] = [*self.values.values()], sizes
        return known[key][1]

    def live_sizes(self, name: str) -> list[Any]:
        """What one argument that is a value can be in this forward pass."""
        return [combination.values[name] for combination in combinations({name: self.values[name]})]

    def undecided(self) -> dict[str, Value]:
        """The arguments that can take more than one value."""
        return {name: value for name, value in self.values.items() if len(value.all()) > 1}

    @final
    def frozen(self, freezer: Freezer) -> nn.Module:
        sizes = self.sizes({name: value.of(freezer.architecture) for name, value in self.values.items()})
        plain = self.plain(sizes)
        for name, part in self.parts(sizes).items():
            path, _, attribute = name.rpartition(".")
            holder = plain.get_submodule(path)
            if attribute not in holder._parameters:
                holder._buffers[attribute] = part.detach().clone()
                continue
            whole = self.get_submodule(path)._parameters.get(attribute)
            if whole is None:  # put together of several
                asks = any(parameter.requires_grad for parameter in self.parameters())
                holder._parameters[attribute] = nn.Parameter(part.detach().clone(), requires_grad=asks)
            else:
                holder._parameters[attribute] = freezer.part(whole, part)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        chosen = (f"{name}={value!r}" for name, value in self.values.items())
        return ", ".join(filter(None, (super().extra_repr(), *chosen)))


def uninitialised(kind: type[nn.Module], **arguments: Any) -> nn.Module:
    """A module of ``torch.nn`` on ``meta``, without the initialisation that takes most of the time.

    Args:
        kind: its class, whose ``reset_parameters`` is left out.
        arguments: of the class.
    """
    bare = _bare(kind)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    module = bare(**arguments, device="meta")
    module.__class__ = kind
    return module


@functools.cache
def _bare(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})


def split(
    elastic: Mapping[str, Any], fixed: Mapping[str, Any] | None = None
) -> tuple[dict[str, Value], dict[str, Any]]:
    """The arguments that are values, and all of them with each value at its largest.

    Args:
        elastic: those that may be values, or lists and tuples of values.
        fixed: those that may not.

    Raises:
        TypeError: a fixed argument is a value.
        ValueError: an option of a size is not a whole number, or too small.
    """
    fixed = fixed or {}
    for name, given in fixed.items():
        if next(values_in(given), None) is not None:
            raise TypeError(f"{name} cannot be a value; {', '.join(elastic)} can. Got {name}={given!r}")
    given = {name: as_value(argument) for name, argument in elastic.items()}
    values = {name: argument for name, argument in given.items() if isinstance(argument, Value)}
    for name, value in values.items():
        if name not in _FRACTIONS:
            _check_sizes(name, value)
    largest = {name: greatest(value.all()) for name, value in values.items()}
    return values, {**given, **largest, **fixed}


def _check_sizes(name: str, value: Value) -> None:
    least = 0 if "padding" in name else 1
    for size in value.all():
        axes = size if isinstance(size, tuple) else (size,)
        is_named = isinstance(size, str) and "padding" in name
        if not is_named and not all(isinstance(n, Integral) and int(n) >= least for n in axes):
            raise ValueError(
                f"{name} must be whole, and from {least} up, under every option; {value!r} can be {size!r}. "
                "Divide by //, or round with hwnas.to_int"
            )


def greatest(sizes: Sequence[Any]) -> Any:
    """The largest number, or the largest of each axis where one of the sizes is a tuple; None is left out."""
    sizes = [size for size in sizes if size is not None]  # BatchNorm's momentum may be None
    if not sizes:
        return None
    if any(isinstance(size, str) for size in sizes):  # padding by name
        return sizes[0]
    axes = next((len(size) for size in sizes if isinstance(size, tuple)), None)
    if axes is None:
        return max(sizes)
    return tuple(map(max, zip(*(on_axes(size, axes) for size in sizes), strict=True)))


def on_axes(size: Any, axes: int) -> Any:
    """A size as one number for each axis; padding by name as it is."""
    return size if isinstance(size, tuple | str) else (size,) * axes


def blend(indicators: Tensor, found: Sequence[Combination]) -> Tensor:
    """The expectation of 0/1 masks over the outcomes.

    Args:
        indicators: shape ``(outcomes, ...)``.
        found: the outcomes, with their weights.

    Returns:
        Shape ``(...)``.
    """
    weights = weights_of(found)
    if indicators.ndim == 2:  # tensordot is written in Python
        return weights @ indicators.to(weights)
    blended: Tensor = torch.tensordot(weights, indicators.to(weights), dims=1)
    return blended


def presence(widths: Sequence[int], found: Sequence[Combination]) -> Tensor | None:
    """The expected presence of each channel, shape ``(largest width,)``; None where nothing is masked.

    Args:
        widths: of each outcome.
        found: the outcomes, with their weights.
    """
    if not found[0].is_mixed or len(set(widths)) == 1:
        return None
    weights = found[0].factors[0][0]
    return blend(_narrower(tuple(widths), weights.device, weights.dtype), found)


@functools.lru_cache(maxsize=1024)
def _narrower(widths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 for each channel that a width has, shape ``(widths, largest)``; every layer asks, in each step."""
    with torch.inference_mode(False):  # or no backward pass could keep it
        channels = torch.arange(max(widths), device=device)
        return (torch.tensor(widths, device=device)[:, None] > channels).to(dtype)
