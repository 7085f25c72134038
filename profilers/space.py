"""What a profiler asks of a search space: its choices, and the sites whose cost can be looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

# One option of a choice: an index, a name, a number, a tuple of indices. Plain data, JSON on disk.
Option = Any
Architecture = dict[str, Option]


@dataclass(frozen=True)
class Part:
    """A site at one architecture: a plain module with the inputs that it is called with.

    Attributes:
        name: readable, for messages and tables: ``InvertedResidual(16->24, k=5, e=6) at 1x16x14x14``.
        key: digest of the operators, attributes, shapes and types that the module executes.
            Equal keys cost the same.
        module: plain ``torch.nn``, in evaluation mode, on the ``meta`` device.
        inputs: the positional arguments, tensors on the ``meta`` device.
        is_free: the module executes no operator (a skip): it costs 0 by definition.
    """

    name: str
    key: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    is_free: bool


class Site(Protocol):
    """One place of a space whose cost depends on a few choices.

    ``labels`` are the choices that it depends on: its own, those on the path to it, and those that
    change its input shapes.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    def part(self, architecture: Mapping[str, Option]) -> Part | None:
        """The site under ``architecture`` (read at ``labels`` alone); None where it does not run."""
        ...

    def parts(self, options: Mapping[str, tuple[Option, ...]]) -> Sequence[Part | None]:
        """The site under every combination of the options at ``labels``, the last label's options fastest."""
        ...


class Space(Protocol):
    """What a profiler needs of a space. ``hwnas.ModelSpace`` fulfils it."""

    @property
    def options(self) -> Mapping[str, tuple[Option, ...]]:
        """Every choice's label with its options, in a fixed order."""
        ...

    def sites(self, *example_inputs: Tensor) -> Sequence[Site]:
        """Every place that executes something when the space runs on inputs of these shapes."""
        ...

    def parameter_sites(self) -> Sequence[Site]:
        """Parts that hold every parameter of the frozen network exactly once (``inputs`` is empty)."""
        ...

    def canonical(self, architecture: Mapping[str, Option]) -> Architecture:
        """The same network with inactive choices at their default. Raises ``ValueError`` on bad options."""
        ...
