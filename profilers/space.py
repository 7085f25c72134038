"""What a profiler asks of a search space: its choices, and the sites whose cost can be looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

# One option of a choice: an index, a name, a number, a tuple of indices. Plain data, JSON on disk.
Option = Any
Architecture = dict[str, Option]


@dataclass(frozen=True, eq=False)
class Implied:
    """A label whose option follows from those of other labels.

    What depends on many choices at once, but takes few values (how many nodes of a cell are left over), is a
    table over one such label instead of over all the choices. A chain of them, each of which follows from the
    one before and one more choice, says in small tables how the value comes about.

    Attributes:
        label: its name, that of no choice.
        options: what it can be.
        parents: choices and implied labels, no choice behind two of them.
        numbers: int, one axis a parent: the number of the option that follows.
    """

    label: str
    options: tuple[Option, ...]
    parents: tuple[str, ...]
    numbers: npt.NDArray[np.int64]


Role = Literal["dies", "held", "again", "weight"]


@dataclass(frozen=True)
class Memory:
    """What lies in memory while a part runs, besides what it makes itself.

    Attributes:
        beside_bytes: outputs of other parts, and inputs of the network, that are needed later and are no
            input of this part.
        inputs: for each of the part's inputs, whether it ``"dies"`` here (nothing after the part needs it),
            is ``"held"`` for later, is one of the inputs before it ``"again"``, or is a ``"weight"``, which
            is no activation.
    """

    beside_bytes: int
    inputs: tuple[Role, ...]


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
        memory: what else lies in memory meanwhile, where it was asked for.
    """

    name: str
    key: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    is_free: bool
    memory: Memory | None = None


class Site(Protocol):
    """One place of a space whose cost depends on a few choices.

    ``labels`` are the choices that it depends on: its own, those on the path to it, and those that
    change its input shapes; or labels that these imply, but never a label beside one that implies it.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    def part(self, architecture: Mapping[str, Option]) -> Part | None:
        """The site under ``architecture`` (its options at ``labels``, or at the choices that imply them);
        None where it does not run.
        """
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

    @property
    def implied(self) -> Sequence[Implied]:
        """What follows from the choices and may stand among a site's labels, parents first."""
        ...

    def sites(self, *example_inputs: Tensor) -> Sequence[Site]:
        """Every place that executes something when the space runs on inputs of these shapes."""
        ...

    def memory_sites(self, *example_inputs: Tensor) -> Sequence[Site]:
        """As `sites`; their parts say what lies in memory while they run, free parts are among them."""
        ...

    def parameter_sites(self) -> Sequence[Site]:
        """Parts that hold every parameter of the frozen network exactly once (``inputs`` is empty)."""
        ...

    def canonical(self, architecture: Mapping[str, Option]) -> Architecture:
        """The same network with inactive choices at their default. Raises ``ValueError`` on bad options."""
        ...
