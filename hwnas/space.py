"""`ModelSpace`: a network with choices, and what can be asked of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from hwnas.activity import Activity
from hwnas.choices import Branching, Choice, Condition, Derives, InputChoice, LayerChoice, Mixes
from hwnas.counting import Counter, Factor
from hwnas.fold import Fold
from hwnas.freezing import Freezer, contents, is_bare, own_attributes
from hwnas.gate import Gate
from hwnas.subnet_weights import load_subnet_weights
from hwnas.values import Value, ValueChoice, as_option, values_in
from profilers.cost import Cost
from profilers.space import Architecture, Implied, Option, Site


@final
class ModelSpace(nn.Module):
    """A network that contains choices, and what can be asked of it.

    It runs as it is: ``space(x)`` runs ``network(x)`` under `gates`, which a strategy sets; without any,
    it runs the default architecture. Nothing in the network is converted or replaced; choices without a
    label are named after their place.

    Args:
        network: any module with at least one `LayerChoice`, `InputChoice`, `Repeat`, `Cell` or `ValueChoice`.
        settings: what is chosen beside the network (a learning rate, a batch size): a dictionary whose
            values may be `ValueChoice`s, also inside lists, tuples and dictionaries. They are choices of
            the space like any other, so that one architecture covers both; with them the network may be
            without any. `freeze` returns the network alone, `settings_of` what was chosen beside it.
            ``precision`` is of modules, by name (`hwnas.precision`): chosen where something of them runs.

    Attributes:
        network: the module that was given.
        settings: the dictionary that was given.
        gates: one gate a label for the forward passes to come, or None. Who sets them takes them back.

    Raises:
        TypeError: the network is no module, or the settings no dictionary.
        ValueError: no choice, or one label with different options.

    >>> from hwnas import LayerChoice
    >>> space = ModelSpace(nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()], label="op")))
    >>> space.options["op"], space.size
    ((0, 1), 2)
    >>> space.freeze({"op": 1})
    Sequential(
      (0): Identity()
    )
    """

    def __init__(self, network: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"a ModelSpace is made of a network, an nn.Module; got {network!r}")
        if not isinstance(settings, Mapping | None):
            raise TypeError(f"settings are a dictionary of names and values; got {settings!r}")
        for name, setting in (settings or {}).items():
            if any(isinstance(found, nn.Module) for _, found in contents(setting)):
                raise TypeError(
                    f"the setting {name!r} holds a module: what stands beside the network is plain data and "
                    "ValueChoices; choose between modules inside the network, or between their names here"
                )
        self.network = network
        self.settings = dict(settings or {})
        self.gates: Mapping[str, Gate] | None = None
        # In a tuple, or it would be a submodule with parameters of its own.
        self._stand_in: tuple[nn.Module] | None = None
        _name_choices(network)
        for name, setting in self.settings.items():
            _name_values(setting, name)
        self._choices: dict[str, list[Choice]] = {}
        self._activity: dict[str, Activity] = {}
        self._collect()

    def _collect(self) -> None:
        paths: dict[str, list[tuple[Condition, ...]]] = {}
        beside = (
            (leaf, path)
            for name, setting in self.settings.items()
            for held, places in _settings(self.network, name, setting)
            for value in values_in(held)
            for leaf in value.leaves()
            for path in places
        )
        for choice, path in itertools.chain(_places(self.network, ()), beside):
            assert choice.label is not None  # _name_choices gave it one
            known = self._choices.setdefault(choice.label, [])
            if known and (known[0].options != choice.options or type(known[0]) is not type(choice)):
                raise ValueError(
                    f"label '{choice.label}' names a {type(known[0]).__name__} over "
                    f"{list(known[0].options)} and a {type(choice).__name__} over {list(choice.options)}; "
                    "equal labels are one decision: give them equal kinds and options, or other labels"
                )
            if not any(choice is other for other in known):
                known.append(choice)
            found = paths.setdefault(choice.label, [])
            # A place below a branch of its own label: the outer place, whose path leads here, suffices.
            if not any(choice.label in condition.labels for condition in path):
                found.append(path)
        if not self._choices:
            raise ValueError(
                f"a ModelSpace needs a network with at least one choice; {type(self.network).__name__} holds "
                "no LayerChoice, InputChoice, Repeat, Cell or ValueChoice, and the settings no ValueChoice"
            )
        self._activity = {label: Activity(tuple(found)) for label, found in paths.items()}

    # ---- what it contains

    @property
    def options(self) -> Mapping[str, tuple[Option, ...]]:
        """Each label with its options, in the order of the network."""
        return MappingProxyType({label: found[0].options for label, found in self._choices.items()})

    @property
    def value_labels(self) -> tuple[str, ...]:
        """The labels of `ValueChoice`s, depths among them."""
        return tuple(label for label, found in self._choices.items() if isinstance(found[0], ValueChoice))

    @property
    def activity(self) -> Mapping[str, Activity]:
        """Each label with the conditions under which it takes part."""
        return MappingProxyType(self._activity)

    @property
    def implied(self) -> Sequence[Implied]:
        """What follows from several choices, such as a `Cell`'s number of loose ends, parents first."""
        return self._implied

    @cached_property
    def _implied(self) -> tuple[Implied, ...]:
        return tuple(link for fold in self.folds.values() for link in fold.implied())

    @cached_property
    def folds(self) -> Mapping[str, Fold]:
        """The values in the network that are folded of several choices, by label."""
        values = (value for module in self.network.modules() for value in values_in(own_attributes(module)))
        return {fold.name(): fold for value in values for fold in value.terms() if isinstance(fold, Fold)}

    @cached_property
    def size(self) -> int:
        """The number of different (canonical) architectures."""
        return self._counter.total

    @cached_property
    def _counter(self) -> Counter:
        options = self.options
        factors = []
        for label, activity in self._activity.items():
            if activity.is_always():
                continue
            labels, allowed = activity.canonical(label, options)
            factors.append(Factor(labels, allowed.astype(object) * 1))
        return Counter({label: len(found) for label, found in options.items()}, factors)

    # ---- architectures

    def default(self) -> Architecture:
        """The first option of every choice."""
        return {label: options[0] for label, options in self.options.items()}

    def validate(self, architecture: Mapping[str, Option]) -> Architecture:
        """A copy with one option for each choice; lists, as JSON has them, become tuples.

        Raises:
            ValueError: a label that is missing or unknown, or an option that its choice does not have.
        """
        options = self.options
        missing = [label for label in options if label not in architecture]
        unknown = [label for label in architecture if label not in options]
        if missing or unknown:
            raise ValueError(
                f"an architecture has one option for each of the {len(options)} choices of its space; "
                f"missing: {missing or 'none'}, unknown: {unknown or 'none'}"
            )
        checked = {}
        for label, allowed in options.items():
            option = as_option(architecture[label])
            if option not in allowed:
                raise ValueError(f"choice '{label}' has the options {list(allowed)}; got {option!r}")
            checked[label] = allowed[allowed.index(option)]
        return checked

    def active(self, architecture: Mapping[str, Option]) -> Architecture:
        """The choices that take part in the network, with their options."""
        checked = self.validate(architecture)
        return {label: option for label, option in checked.items() if self._activity[label].holds(checked)}

    def canonical(self, architecture: Mapping[str, Option]) -> Architecture:
        """The same network, with every choice that takes no part in it at its default.

        Raises:
            ValueError: as `validate`.
        """
        return {**self.default(), **self.active(architecture)}

    def random(self, generator: torch.Generator | None = None) -> Architecture:
        """One architecture, each canonical one equally likely."""
        seed = int(torch.randint(2**62, (), generator=generator))
        indices = self._counter.draw(random.Random(seed))
        return {label: options[indices[label]] for label, options in self.options.items()}

    def grid(self) -> Iterator[Architecture]:
        """Every canonical architecture once."""
        options = self.options
        labels = list(options)

        def extend(chosen: Architecture, position: int) -> Iterator[Architecture]:
            if position == len(labels):
                # A choice may stand before those that decide whether it is active.
                if self.canonical(chosen) == chosen:
                    yield dict(chosen)
                return
            label = labels[position]
            activity = self._activity[label]
            is_known = all(other in chosen for other in activity.labels())
            idle = is_known and not activity.is_always() and not activity.holds(chosen)
            for option in options[label][: 1 if idle else None]:
                yield from extend({**chosen, label: option}, position + 1)

        return extend({}, 0)

    def freeze(self, architecture: Mapping[str, Option]) -> nn.Module:
        """The subnet: the network's own class with plain modules and numbers, weights inherited.

        Returns:
            A copy: nothing of it is shared with the space. BatchNorm statistics are the supernet's;
            recalibrate them (`hwnas.recalibrate`) before the subnet is judged.
        """
        return Freezer(self.canonical(architecture))(self.network)

    def subnet_state_dict(self, architecture: Mapping[str, Option]) -> dict[str, Any]:
        """The state of an architecture's subnet, cut out of the weights that the space has now.

        ``space.freeze(a).load_state_dict(space.subnet_state_dict(a))`` brings a subnet up to date. Only what
        the subnet holds is copied.

        Raises:
            ValueError: as `validate`.
        """
        return self.freeze(architecture).state_dict()

    def load_subnet_state_dict(self, architecture: Mapping[str, Option], state: Mapping[str, Any]) -> None:
        """Writes a subnet's weights and buffers (BatchNorm statistics) back to where they came from.

        What is not in the subnet stays as it is. Equal slices are one tensor in a subnet and here.

        Args:
            architecture: that of the subnet.
            state: its ``state_dict()``; types and devices may be others than the space's.

        Raises:
            ValueError: names or shapes that are not those of the architecture's subnet; or a tensor that
                `freeze` computes, instead of cutting it out of the space's.
        """
        load_subnet_weights(self.network, self.canonical(architecture), state)

    def settings_of(self, architecture: Mapping[str, Option]) -> dict[str, Any]:
        """The settings, with what the architecture chose where choices stood.

        >>> from hwnas import ValueChoice
        >>> space = ModelSpace(nn.Linear(4, 4), settings={"lr": ValueChoice([0.1, 0.3])})
        >>> space.settings_of({"lr": 0.3})
        {'lr': 0.3}
        """
        return Freezer(self.canonical(architecture))(self.settings)

    def check_cost(self, cost: Cost) -> None:
        """Raises ``ValueError`` where a cost belongs to a space of other choices."""
        own, others = dict(self.options), dict(cost.options)
        if list(own.items()) != list(others.items()):
            different = [label for label in {**own, **others} if own.get(label) != others.get(label)]
            raise ValueError(
                f"a cost in {cost.unit} belongs to another space: choices that differ are "
                f"{ {label: others.get(label) for label in different} }, and here "
                f"{ {label: own.get(label) for label in different} }. Make its profiler "
                "from the space that is searched"
            )

    # ---- running

    def with_implied(self, architecture: Mapping[str, Option]) -> Architecture:
        """The options of all choices, and those of `folds` that follow."""
        return {**architecture, **{label: fold.read(architecture) for label, fold in self.folds.items()}}

    def without_implied(self, options: Mapping[str, Option]) -> Architecture:
        """Options of choices alone: for those of `folds`, some from which they follow."""
        found: Architecture = {}
        for label, option in options.items():
            found |= self.folds[label].example(option) if label in self.folds else {label: option}
        return found

    def gates_of(self, architecture: Mapping[str, Option]) -> dict[str, Gate]:
        """The gates that run one architecture."""
        checked = self.validate(architecture)
        return {label: Gate((options.index(checked[label]),)) for label, options in self.options.items()}

    @contextmanager
    def running(self, gates: Mapping[str, Gate]) -> Iterator[None]:
        """Runs under ``gates`` inside the ``with`` block; what was set before comes back after it."""
        before, self.gates = self.gates, gates
        try:
            yield
        finally:
            self.gates = before

    @contextmanager
    def represented_by(self, subnet: nn.Module | None) -> Iterator[None]:
        """Inside the ``with`` block ``space(x)`` is ``subnet(x)``; None: it is the space itself again."""
        before, self._stand_in = self._stand_in, None if subnet is None else (subnet,)
        try:
            yield
        finally:
            self._stand_in = before

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """What the network returns under `gates`. The gates are gone from the choices afterwards."""
        if torch.compiler.is_compiling():
            _refuse_to_compile()
        if self._stand_in is not None:
            return self._stand_in[0](*inputs, **keywords)
        gates = self.gates if self.gates is not None else self.gates_of(self.default())
        missing = [label for label in self._choices if label not in gates]
        if missing:
            raise ValueError(f"gates are needed for every choice; missing: {missing}")
        try:
            for label, found in self._choices.items():
                for choice in found:
                    choice.gate = gates[label]
            return self.network(*inputs, **keywords)
        finally:
            # Kept gates would hold the autograd graph of this pass.
            for found in self._choices.values():
                for choice in found:
                    choice.gate = None

    def check_can_mix(self) -> None:
        """Raises ``ValueError``, naming the place, where mixing weights cannot be applied."""
        mixed: set[str] = set()
        for name, module in self.network.named_modules():
            mixing = module if isinstance(module, Mixes) else None
            if mixing is None:
                continue
            try:
                mixing.check_can_mix()
            except ValueError as error:
                raise ValueError(f"'{name}' cannot be searched with mixing weights: {error}") from error
            mixed |= {str(choice.label) for choice in _own_choices(module)}
        for label, found in self._choices.items():
            if isinstance(found[0], ValueChoice) and label not in mixed:
                raise ValueError(
                    f"ValueChoice '{label}' cannot be searched with mixing weights: it is read as a plain "
                    "number only; use it as an argument of an operation in hwnas.nn, or search with a "
                    "strategy that runs one path (RandomOneShot, ENAS)"
                )

    def derived_probabilities(self, probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The distribution over architectures that mixing weights stand for, differentiably.

        Those of the options themselves, but for choices that are derived by a rule of their own: the
        edges of a `Cell` that are kept by strength. Penalties and derivation are over these.

        Args:
            probabilities: one row ``(options,)`` for each label.
        """
        rows = dict(probabilities)
        for module in self._deriving:
            rows.update(module.derived_probabilities(probabilities))
        return rows

    @cached_property
    def _deriving(self) -> tuple[Derives, ...]:
        """The modules with a rule of their own, one of those that are one decision."""
        uniform = {label: torch.ones(len(found)) / len(found) for label, found in self.options.items()}
        found: dict[tuple[str, ...], Derives] = {}
        for module in self.network.modules():
            if isinstance(module, Derives):
                labels = tuple(module.derived_probabilities(uniform))
                found.setdefault(labels, module)
        return tuple(found.values())

    # ---- sites

    def sites(self, *example_inputs: Tensor) -> Sequence[Site]:
        """Every place that executes something, for inputs of these shapes (no values are read).

        Raises:
            ValueError: the network does not run on such inputs.
            RuntimeError: what runs depends on more than the choices.
        """
        from hwnas.survey import survey  # a survey needs a space of its own

        return survey(self, example_inputs)

    def memory_sites(self, *example_inputs: Tensor) -> Sequence[Site]:
        """As `sites`; their parts say what lies in memory while they run.

        A tensor lies there until the last site on the path has used it, whatever Python still refers to.
        """
        from hwnas.survey import survey

        return survey(self, example_inputs, with_memory=True)

    def parameter_sites(self) -> Sequence[Site]:
        """Parts that hold every parameter of the frozen network exactly once."""
        from hwnas.survey import parameter_sites

        return parameter_sites(self)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
def _refuse_to_compile() -> None:
    # Raised while dynamo traces, it would be swallowed and the space run eagerly; called from the
    # compiled code it gets out.
    raise RuntimeError(
        "a ModelSpace changes from step to step and cannot be compiled or exported; "
        "do that with a subnet: torch.compile(space.freeze(architecture))"
    )


def keep_gates(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for ``torch.utils.checkpoint``: the recomputation sees the gates of the forward pass.

    Inside a network's ``forward``::

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: keep_gates(block))
    """
    kept = [(choice, choice.gate) for choice in _choices_in(module)]

    @contextmanager
    def again() -> Iterator[None]:
        before = [choice.gate for choice, _ in kept]
        try:
            for choice, gate in kept:
                choice.gate = gate
            yield
        finally:
            for (choice, _), gate in zip(kept, before, strict=True):
                choice.gate = gate

    return nullcontext(), again()


def _choices_in(module: nn.Module) -> Iterator[Choice]:
    for child in module.modules():
        yield from _own_choices(child)


def _own_choices(module: nn.Module) -> Iterator[Choice]:
    """The choice that a module is, and those among its attributes."""
    if isinstance(module, LayerChoice | InputChoice):
        yield module
    for value in values_in(own_attributes(module)):
        yield from value.leaves()


def _name_choices(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, LayerChoice | InputChoice) and module.label is None:
            module.label = name or type(module).__name__
        for attribute, held in own_attributes(module).items():
            if not is_bare(held):
                _name_values(held, f"{name}.{attribute}" if name else attribute)


def _name_values(held: object, name: str) -> None:
    for keys, found in contents(held):
        if isinstance(found, Value):
            # A mixed operation's `values` are its arguments: `conv.out_channels`, not `conv.values.…`.
            place = ".".join((name.removesuffix(".values") if keys else name, *keys))
            unnamed = [leaf for leaf in found.leaves() if leaf.label is None]
            for index, leaf in enumerate(unnamed):
                leaf.label = place if len(unnamed) == 1 else f"{place}.{index}"


def _settings(
    network: nn.Module, name: str, setting: Any
) -> Iterator[tuple[Any, list[tuple[Condition, ...]]]]:
    """What may hold values, and the paths on which it matters."""
    modules = dict(network.named_modules())
    if name != "precision" or not isinstance(setting, Mapping) or not setting.keys() <= modules.keys():
        yield setting, [()]
        return
    for place, held in setting.items():
        yield held, list(_runs(network, (), modules[place], False))


def _runs(
    module: nn.Module, path: tuple[Condition, ...], target: nn.Module, is_inside: bool
) -> Iterator[tuple[Condition, ...]]:
    """The paths to what executes something inside a module."""
    is_inside = is_inside or module is target
    is_container = isinstance(module, Branching | nn.Sequential | nn.ModuleList | nn.ModuleDict | nn.Identity)
    if is_inside and not is_container:
        yield path
    elif isinstance(module, Branching):
        for _, child, condition in module.branches():
            yield from _runs(child, (*path, condition), target, is_inside)
    else:
        for child in module.children():
            yield from _runs(child, path, target, is_inside)


def _places(module: nn.Module, path: tuple[Condition, ...]) -> Iterator[tuple[Choice, tuple[Condition, ...]]]:
    """Every choice with the conditions on the way to it; a module that stands twice is walked twice."""
    for choice in _own_choices(module):
        yield choice, path
    if isinstance(module, Branching):
        for _, child, condition in module.branches():
            yield from _places(child, (*path, condition))
    else:
        for child in module.children():
            yield from _places(child, path)
