"""Choices between layers, between inputs, and of depth."""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast, final, runtime_checkable

import torch
from torch import Tensor, nn

from hwnas.fold import Fold
from hwnas.freezing import Freezer, Freezes
from hwnas.gate import Gate, mixture
from hwnas.values import (
    Expression,
    Value,
    ValueChoice,
    combinations,
    described,
    installed,
    named,
    weights_of,
)
from profilers.space import Option


@runtime_checkable
class Choice(Protocol):
    """One named decision. `LayerChoice`, `InputChoice` and `ValueChoice` fulfil it."""

    label: str | None
    gate: Gate | None

    @property
    def options(self) -> tuple[Option, ...]: ...


@dataclass(frozen=True)
class Condition:
    """When a part of the network runs: where ``holds`` is true of the options at ``labels``.

    Attributes:
        labels: of choices.
        holds: of an architecture; where there is a fold, also of its option alone.
        fold: what alone decides, where that takes few values and the choices have many combinations.
    """

    labels: tuple[str, ...]
    holds: Callable[[Mapping[str, Option]], bool]
    fold: Fold | None = None

    def deciding(self) -> tuple[str, ...]:
        """The labels of the choices, or that of the fold."""
        return self.labels if self.fold is None else (self.fold.name(),)


class BranchCall(Protocol):
    """Runs one child of a `Branching` on its inputs and returns its output."""

    def __call__(
        self, name: str, child: nn.Module, when: Condition, *inputs: Any, **keywords: Any
    ) -> Any: ...


@runtime_checkable
class Mixes(Protocol):
    """A module that mixes inputs, or the values that it holds, under mixing weights, or refuses to."""

    def check_can_mix(self) -> None:
        """Raises ``ValueError`` where no weighted sum is the mixture of the options."""


@runtime_checkable
class Derives(Protocol):
    """A module whose choices are not derived by the probabilities of their own options alone."""

    def derived_probabilities(self, probabilities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What takes the place of some labels' probabilities when an architecture is derived."""
        ...


class Branching(Freezes, nn.Module, ABC):
    """A module whose children run only under some options."""

    @abstractmethod
    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        """Each child's name, the child, and when it runs."""

    @abstractmethod
    def run_all(self, call: BranchCall, *inputs: Any, **keywords: Any) -> Any:
        """Run every child once, each by ``call``, and return what the installed gate picks.

        For who wants to see all that could run (`hwnas.survey`), not for training.
        """


@final
class LayerChoice(Branching):
    """One layer out of several.

    Shapes: what goes in goes to the picked layer; what it returns comes out. Strategies that mix need
    layers with equally shaped outputs.

    Args:
        candidates: layers in a list (options are indices) or in a dictionary (options are names).
        label: equal labels are one decision. Without one, the choice is named after its place.

    >>> LayerChoice({"conv": nn.Conv2d(8, 8, 3), "skip": nn.Identity()}, label="op").options
    ('conv', 'skip')
    """

    def __init__(
        self, candidates: Iterable[nn.Module] | Mapping[str, nn.Module], label: str | None = None
    ) -> None:
        super().__init__()
        if isinstance(candidates, Mapping):
            layers: dict[Option, nn.Module] = dict(candidates)
        else:
            layers = dict(enumerate(candidates))
        if not layers or not all(isinstance(layer, nn.Module) for layer in layers.values()):
            kinds = [type(layer).__name__ for layer in layers.values()]
            raise ValueError(
                f"{described('LayerChoice', label)} needs at least one nn.Module and nothing else; "
                f"got {kinds or 'no candidates'}"
            )
        self.label = label
        self.gate: Gate | None = None
        self.options: tuple[Option, ...] = tuple(layers)
        for option, layer in layers.items():
            try:
                if str(option) in self._modules:
                    raise KeyError(f"'{option}' stands twice")
                self.add_module(str(option), layer)
            except KeyError as error:
                raise ValueError(
                    f"{described('LayerChoice', label)} needs option names that a module can have as "
                    f"attributes: no '.', no empty one, none twice, and none that is taken; got {option!r} "
                    f"in {list(layers)}. Rename it"
                ) from error

    def __getitem__(self, option: Option) -> nn.Module:
        """The layer of an option."""
        return cast("nn.Module", self._modules[str(option)])

    def __len__(self) -> int:
        return len(self.options)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        gate = installed(self.gate, "LayerChoice", self.label)
        if gate.weights is None:
            return self[self.options[gate.picked[0]]](*inputs, **keywords)
        live = gate.live()
        outputs = [
            run_child(self[self.options[index]], index in gate.picked, inputs, keywords) for index in live
        ]
        weights = gate.weights if len(live) == len(gate.weights) else gate.weights[list(live)]
        return mixture(weights, outputs, f"options of LayerChoice '{self.label}'")

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        label = named(self.label, "LayerChoice", self.options)
        for option in self.options:
            yield str(option), self[option], Condition((label,), partial(_equals, label, option))

    def run_all(self, call: BranchCall, *inputs: Any, **keywords: Any) -> Any:
        gate = installed(self.gate, "LayerChoice", self.label)
        outputs = [call(*branch, *inputs, **keywords) for branch in self.branches()]
        return outputs[gate.picked[0]]

    def frozen(self, freezer: Freezer) -> nn.Module:
        return freezer(self[freezer.architecture[named(self.label, "LayerChoice", self.options)]])

    def extra_repr(self) -> str:
        return f"label={self.label!r}"


Reduction = Literal["sum", "mean", "concat", "none"]


@final
class InputChoice(Freezes, nn.Module):
    """Some out of several inputs.

    An option is the tuple of the indices that are chosen. All subsets are enumerated, so that a policy
    has a joint distribution over them; the mixture is its expectation.

    Args:
        n_candidates: how many inputs ``forward`` gets.
        n_chosen: how many are chosen; None: any number from one up.
        reduction: ``"sum"``, ``"mean"`` and ``"concat"`` (along dimension 1) of what was chosen;
            ``"none"`` returns the list.
        label: equal labels are one decision. Without one, the choice is named after its place.

    Raises:
        ValueError: impossible counts, or more than 4,096 subsets.

    >>> InputChoice(3, n_chosen=2, label="edges").options
    ((0, 1), (0, 2), (1, 2))
    """

    def __init__(
        self,
        n_candidates: int,
        n_chosen: int | None = 1,
        reduction: Reduction = "sum",
        label: str | None = None,
    ) -> None:
        super().__init__()
        if n_candidates < 1 or (n_chosen is not None and not 1 <= n_chosen <= n_candidates):
            raise ValueError(
                f"{described('InputChoice', label)} needs 1 <= n_chosen <= n_candidates; "
                f"got n_chosen={n_chosen}, n_candidates={n_candidates}"
            )
        if reduction not in ("sum", "mean", "concat", "none"):
            raise ValueError(
                f"{described('InputChoice', label)} reduces by 'sum', 'mean', 'concat' or 'none'; "
                f"got {reduction!r}"
            )
        sizes = range(1, n_candidates + 1) if n_chosen is None else (n_chosen,)
        subsets = sum(math.comb(n_candidates, size) for size in sizes)
        if subsets > 4096:
            raise ValueError(
                f"{described('InputChoice', label)} has {subsets} subsets of its {n_candidates} inputs; "
                "at most 4096 are enumerated: set n_chosen, or split it into several choices"
            )
        self.label = label
        self.gate: Gate | None = None
        self.n_candidates = n_candidates
        self.reduction: Reduction = reduction
        self.options: tuple[tuple[int, ...], ...] = tuple(
            itertools.chain.from_iterable(itertools.combinations(range(n_candidates), s) for s in sizes)
        )

    def forward(self, inputs: Sequence[Tensor]) -> Any:
        gate = installed(self.gate, "InputChoice", self.label)
        if len(inputs) != self.n_candidates:
            raise ValueError(
                f"InputChoice '{self.label}' chooses among {self.n_candidates} inputs; got {len(inputs)}"
            )
        if gate.weights is None:
            return reduce_inputs([inputs[i] for i in self.options[gate.picked[0]]], self.reduction)
        self.check_can_mix()
        weights = gate.weights @ self._coefficients(gate.weights)
        return mixture(weights, list(inputs), f"inputs of InputChoice '{self.label}'")

    def check_can_mix(self) -> None:
        """Raises ``ValueError`` where the expectation over subsets is no weighted sum of the inputs."""
        if self.reduction not in ("sum", "mean"):
            raise ValueError(
                f"InputChoice '{self.label}' with reduction '{self.reduction}' cannot be mixed; "
                "use 'sum' or 'mean', or search with a strategy that runs one path (RandomOneShot, ENAS)"
            )

    def _coefficients(self, like: Tensor) -> Tensor:
        """Each option's factor on each input, shape ``(options, n_candidates)``."""
        rows = torch.zeros(len(self.options), self.n_candidates, dtype=like.dtype)
        for row, subset in zip(rows, self.options, strict=True):
            row[list(subset)] = 1.0 if self.reduction == "sum" else 1.0 / len(subset)
        return rows.to(like.device)

    def frozen(self, freezer: Freezer) -> nn.Module:
        subset = freezer.architecture[named(self.label, "InputChoice", self.options)]
        return ChosenInputs(tuple(subset), self.reduction).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.n_candidates}, reduction={self.reduction!r}, label={self.label!r}"


@final
class ChosenInputs(nn.Module):
    """What an `InputChoice` becomes in a subnet."""

    def __init__(self, chosen: tuple[int, ...], reduction: Reduction) -> None:
        super().__init__()
        self.chosen = chosen
        self.reduction: Reduction = reduction

    def forward(self, inputs: Sequence[Tensor]) -> Any:
        return reduce_inputs([inputs[index] for index in self.chosen], self.reduction)

    def extra_repr(self) -> str:
        return f"{self.chosen}, reduction={self.reduction!r}"


def reduce_inputs(chosen: list[Tensor], reduction: Reduction) -> Any:
    """The sum, mean or concatenation (dimension 1) of tensors, or the list itself."""
    if reduction == "none":
        return chosen
    if reduction == "concat":
        return torch.cat(chosen, dim=1)
    # Not torch.stack(...).sum(): a plain chain of additions is what runtimes fuse.
    total = chosen[0]
    for tensor in chosen[1:]:
        total = total + tensor
    return total / len(chosen) if reduction == "mean" and len(chosen) > 1 else total


@final
class Repeat(Branching):
    """A chain of blocks of which the first few run.

    Under mixing weights the output is the expectation over depths of what the chain holds after them.

    Args:
        blocks: ``blocks(index)`` makes one block; or a list of blocks; or one block, which is copied.
        depth: a fixed number, ``(least, most)``, a range or list of numbers, or a value
            (``ValueChoice([1, 2, 3], label="depth") * 2``).
        label: equal labels are one decision. Without one, the choice is named after its place. Not with
            a value, which has its own.

    Raises:
        ValueError: a negative depth, a tuple that is not ``(least, most)``, or a list of blocks that is
            shorter than the greatest depth.
    """

    def __init__(
        self,
        blocks: Callable[[int], nn.Module] | Sequence[nn.Module] | nn.Module,
        depth: int | tuple[int, int] | Sequence[int] | Value,
        label: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(depth, Value):
            if label is not None:
                raise ValueError(f"Repeat over {depth!r} takes no label of its own; got {label!r}")
            self.depth: Value = depth
        elif isinstance(depth, int):
            self.depth = Expression(str(depth), partial(int, depth), ())
        elif isinstance(depth, tuple):
            if len(depth) != 2 or not depth[0] < depth[1]:
                raise ValueError(
                    f"Repeat takes a tuple as (least, most) depth, the least first; got {depth}. "
                    "Give the depths themselves as a list"
                )
            self.depth = ValueChoice(range(depth[0], depth[1] + 1), label)
        else:
            self.depth = ValueChoice(depth, label)
        depths = self.depth.all()
        if not all(isinstance(number, int) and number >= 0 for number in depths):
            raise ValueError(f"Repeat needs whole numbers from 0 up as depths; got {depths}")
        for index, block in enumerate(_blocks(blocks, max(depths))):
            self.add_module(str(index), block)

    def __getitem__(self, index: int) -> nn.Module:
        return cast("nn.Module", self._modules[str(index)])

    def __len__(self) -> int:
        """The greatest depth."""
        return len(self._modules)

    def forward(self, features: Any) -> Any:
        found = combinations({"depth": self.depth})
        if not found[0].is_mixed:
            for index in range(found[0].values["depth"]):
                features = self[index](features)
            return features
        depths = [combination.values["depth"] for combination in found]
        deepest_picked = max(c.values["depth"] for c in found if c.is_picked)
        after = {0: features}
        for index in range(max(depths)):
            features = run_child(self[index], index < deepest_picked, (features,), {})
            after[index + 1] = features
        weights = weights_of(found)
        return mixture(weights, [after[depth] for depth in depths], f"blocks of Repeat over {self.depth!r}")

    def check_can_mix(self) -> None:
        """Always possible."""

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        labels = tuple(dict.fromkeys(leaf.name() for leaf in self.depth.leaves()))
        for index in range(len(self)):
            yield str(index), self[index], Condition(labels, partial(_deeper, self.depth, index))

    def run_all(self, call: BranchCall, features: Any) -> Any:
        after = [features]
        for branch in self.branches():
            after.append(call(*branch, after[-1]))
        return after[self.depth.now()]

    def frozen(self, freezer: Freezer) -> nn.Sequential:
        depth = self.depth.of(freezer.architecture)
        chain = nn.Sequential(*(freezer(self[index]) for index in range(depth)))
        chain.training = self.training  # not train(), which would reach the blocks: they have their own
        return chain

    def extra_repr(self) -> str:
        return f"depth={self.depth!r}"


def run_child(
    layer: nn.Module, with_graph: bool, inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Any:
    """What a layer returns; without a graph where its own weights are to receive no gradients."""
    with torch.set_grad_enabled(with_graph and torch.is_grad_enabled()):
        return layer(*inputs, **keywords)


def _blocks(
    blocks: Callable[[int], nn.Module] | Sequence[nn.Module] | nn.Module, count: int
) -> list[nn.Module]:
    if isinstance(blocks, nn.Module) and not isinstance(blocks, nn.ModuleList):
        return [copy.deepcopy(blocks) for _ in range(count)]
    if callable(blocks) and not isinstance(blocks, nn.ModuleList):
        return [blocks(index) for index in range(count)]
    given = list(cast("Sequence[nn.Module]", blocks))
    if len(given) < count:
        raise ValueError(
            f"Repeat of depth up to {count} needs at least {count} blocks; got {len(given)}. "
            "Give more, or a function that makes one: blocks(index)"
        )
    return given[:count]


# Bound by `partial`, not by a lambda: a space must survive pickling.
def _equals(label: str, option: Option, architecture: Mapping[str, Option]) -> bool:
    return bool(architecture[label] == option)


def _deeper(depth: Value, index: int, architecture: Mapping[str, Option]) -> bool:
    return bool(depth.of(architecture) > index)
