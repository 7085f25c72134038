"""Finds the sites of a space by running it.

The network runs on the ``meta`` device: shapes, no numbers. In a survey every branch runs, so that one
run shows every site once; which choices change what a site is given is found by running other
architectures, and is checked on random ones.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwnas.alike import description
from hwnas.arguments import Operation, Slot, emptied, filled, flat, tensors_in
from hwnas.choices import Branching, Condition, InputChoice, LayerChoice
from hwnas.fold import Fold
from hwnas.freezing import Freezer, deep_copy, own_attributes
from hwnas.liveness import Event, liveness, needed
from hwnas.space import ModelSpace
from hwnas.values import Value, named, terms_of, values_in
from lookup_tables.graph import ExecutedGraph, executed_graph
from lookup_tables.operators import Functions
from profilers.profile import every_option
from profilers.space import Architecture, Memory, Option, Part, Site

_CHECKED = 16  # random architectures on which what was found is checked
_LARGEST = 100_000  # combinations of what one site is given


@final
class _Place:
    """Where a run is: the branches that were taken to it. There is one object for each place.

    Attributes:
        branches: names of the branchings on the way, each with that of its child.
        conditions: under which all of them are taken.
    """

    def __init__(self, branches: tuple[tuple[str, str], ...], conditions: tuple[Condition, ...]) -> None:
        self.branches = branches
        self.conditions = conditions
        self._further: dict[tuple[str, int | str], _Place] = {}
        self._keys: dict[tuple[str, int], _Key] = {}

    def inside(self, name: str, call: int) -> _Place:
        """In a branching that is called for the how-manieth time here."""
        return self._further.setdefault((name, call), _Place(self.branches, self.conditions))

    def taken(self, name: str, child_name: str, when: Condition) -> _Place:
        """In a child of the branching that this place is in."""
        if (name, child_name) not in self._further:
            branches = (*self.branches, (name, child_name))
            self._further[name, child_name] = _Place(branches, (*self.conditions, when))
        return self._further[name, child_name]

    def key(self, name: str, call: int) -> _Key:
        """The key of a module or function, called for the how-manieth time here."""
        if (name, call) not in self._keys:
            self._keys[name, call] = _Key(name, self)
        return self._keys[name, call]


@dataclass(frozen=True, eq=False)  # there is one object for each
class _Key:
    """One call of a module or function in the runs."""

    name: str
    place: _Place


@dataclass(frozen=True, eq=False)
class _Call:
    """What one run saw at a key. Equal calls are one object, but for those with memory."""

    signature: str
    template: Any  # the arguments, tensors replaced by `Slot`
    inputs: tuple[Tensor, ...]
    keywords: dict[str, Any]
    module: str | None  # name of the module, or
    function: Callable[..., Any] | None  # the function that ran outside of any module
    memory: Memory | None = None  # where it is asked for


@final
class FoundSite:
    """A `profilers.Site` that a survey found."""

    def __init__(
        self,
        name: str,
        conditions: Sequence[Condition],
        own: tuple[str, ...],
        given_by: tuple[str, ...],
        calls: Mapping[tuple[Option, ...], _Call | None],
        make_part: Callable[[_Call, Mapping[str, Option]], Part],
        folds: Mapping[str, Fold],
    ) -> None:
        self._conditions = tuple(conditions)
        self._own = own
        self._given_by = given_by
        self._calls = calls
        self._make_part = make_part
        self.name = name
        path = [label for condition in conditions for label in condition.deciding()]
        self._folds = folds
        self.labels = _apart((*path, *given_by, *own), folds)

    def part(self, architecture: Mapping[str, Option]) -> Part | None:
        """The site under ``architecture``; None where it does not run."""
        if not all(condition.holds(architecture) for condition in self._conditions):
            return None
        deciding = (*self._given_by, *self._own)
        return self._part({label: _option(label, architecture, self._folds) for label in deciding})

    def _part(self, architecture: Mapping[str, Option]) -> Part | None:
        """As `part`, where every condition holds, for the options of what decides it."""
        call = self._calls[tuple(architecture[label] for label in self._given_by)]
        if call is None:
            return None
        return self._make_part(call, {label: architecture[label] for label in self._own})

    def parts(self, options: Mapping[str, tuple[Option, ...]]) -> list[Part | None]:
        """The site under every combination of its labels' options, the last label's fastest."""
        deciding = tuple(dict.fromkeys((*self._given_by, *self._own)))
        on_path = (label for condition in self._conditions for label in condition.deciding())
        if not set(self.labels).issuperset((*deciding, *on_path)):
            every = itertools.product(*(options[label] for label in self.labels))
            return [self.part(dict(zip(self.labels, of, strict=True))) for of in every]
        runs = np.ones([len(options[label]) for label in self.labels], dtype=np.bool_)
        for condition in self._conditions:
            names = condition.deciding()
            truth = _truth(condition, tuple(options[label] for label in names))
            order = sorted(range(truth.ndim), key=[self.labels.index(label) for label in names].__getitem__)
            shape = [len(options[x]) if x in names else 1 for x in self.labels]
            runs &= truth.transpose(order).reshape(shape)
        found: list[Part | None] = [None]
        numbers = np.zeros(runs.shape, dtype=np.int64)
        for chosen in itertools.product(*(enumerate(options[label]) for label in deciding)):
            at = dict(zip(deciding, chosen, strict=True))
            here = tuple(at[label][0] if label in at else slice(None) for label in self.labels)
            if np.any(runs[here]):
                part = self._part({label: option for label, (_, option) in at.items()})
                numbers[here] = np.where(runs[here], len(found), 0)
                found.append(part)
        return [found[number] for number in numbers.ravel().tolist()]

    def __repr__(self) -> str:
        return f"FoundSite({self.name!r}, labels={self.labels})"


@functools.lru_cache(maxsize=1024)
def _truth(condition: Condition, options: tuple[tuple[Option, ...], ...]) -> NDArray[np.bool_]:
    """Where a condition holds, with one axis a label; sites of equal cells share it."""
    holds = (
        condition.holds(dict(zip(condition.deciding(), chosen, strict=True)))
        for chosen in itertools.product(*options)
    )
    shape = [len(of) for of in options]
    return np.fromiter(holds, dtype=np.bool_, count=math.prod(shape)).reshape(shape)


def survey(space: ModelSpace, example_inputs: Sequence[Tensor], with_memory: bool = False) -> list[Site]:
    """The sites of a space, for inputs of the given shapes.

    A site is the outermost module that holds no choice but values, or a function that runs outside of
    such a module, at each place where it is called.

    Args:
        space: the space.
        example_inputs: of the shapes that the network gets.
        with_memory: whether parts say what lies in memory while they run.

    Raises:
        ValueError: the network does not run on such inputs, or a site depends on so many choices that
            over 100,000 combinations would have to be tried.
        RuntimeError: equal choices gave unequal shapes: something besides the choices decides them.
    """
    with _without_collection():
        return _surveyed(space, example_inputs, with_memory)


def _surveyed(space: ModelSpace, example_inputs: Sequence[Tensor], with_memory: bool) -> list[Site]:
    runner = _Runner(space, example_inputs, with_memory)
    found = _Findings(space, runner)
    generator = torch.Generator().manual_seed(0)
    found.look(space.default())
    for base in (space.default(), space.random(generator)):
        for shift in range(1, max(len(options) for options in space.options.values())):
            found.look(_shifted(space, base, shift))
    # Twice over: what the second half teaches would otherwise go unchecked.
    for _ in range(_CHECKED):
        found.look(space.random(generator))
    found.cover()
    for _ in range(_CHECKED // 2):
        found.look(space.random(generator))
    found.cover()
    found.confirm()
    return found.sites()


def parameter_sites(space: ModelSpace) -> list[Site]:
    """Parts that hold every parameter of the frozen network exactly once."""
    network, folds = on_meta(space.network), space.folds
    paths: dict[int, list[tuple[Condition, ...]]] = {}
    modules: dict[int, tuple[str, nn.Module]] = {}
    for name, module, path in _walk(network, "", ()):
        modules.setdefault(id(module), (name, module))
        paths.setdefault(id(module), []).append(path)
    return [
        _ParameterSite(name or type(module).__name__, module, paths[key], folds)
        for key, (name, module) in modules.items()
    ]


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection inside: there is no garbage, and to find that out takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@final
class _ParameterSite:
    """A module that holds parameters, wherever it is reached from."""

    def __init__(
        self, name: str, module: nn.Module, paths: list[tuple[Condition, ...]], folds: Mapping[str, Fold]
    ) -> None:
        self.name = name
        self._module = module
        self._paths = [] if any(not path for path in paths) else paths
        self._own = _look_inside(module, {}).labels
        self._parts: dict[tuple[Option, ...], Part] = {}
        on_paths = (label for path in self._paths for condition in path for label in condition.deciding())
        self._folds = folds
        self.labels = _apart((*on_paths, *self._own), folds)

    def part(self, architecture: Mapping[str, Option]) -> Part | None:
        if self._paths and not any(all(c.holds(architecture) for c in path) for path in self._paths):
            return None
        own = {label: _option(label, architecture, self._folds) for label in self._own}
        options = tuple(own.values())
        if options not in self._parts:
            frozen = Freezer(own)(self._module)
            key = f"{self.name} {sorted(own.items())}"
            is_free = next(frozen.parameters(), None) is None
            self._parts[options] = Part(self.name, key, frozen, (), is_free)
        return self._parts[options]

    def parts(self, options: Mapping[str, tuple[Option, ...]]) -> list[Part | None]:
        """The site under every combination of its labels' options, the last label's fastest."""
        chosen = itertools.product(*(options[label] for label in self.labels))
        return [self.part(dict(zip(self.labels, of, strict=True))) for of in chosen]


def _apart(labels: Iterable[str], folds: Mapping[str, Fold]) -> tuple[str, ...]:
    """The labels, each once; where a choice is behind two of them, those behind the folds among them."""
    found = tuple(dict.fromkeys(labels))
    behind = [_choices_of(label, folds) for label in found]
    if len({choice for choices in behind for choice in choices}) == sum(map(len, behind)):
        return found
    return tuple(dict.fromkeys(choice for choices in behind for choice in choices))


def _choices_of(label: str, folds: Mapping[str, Fold]) -> tuple[str, ...]:
    return tuple(leaf.name() for leaf in folds[label].leaves()) if label in folds else (label,)


def _option(label: str, architecture: Mapping[str, Option], folds: Mapping[str, Fold]) -> Option:
    return folds[label].read(architecture) if label in folds else architecture[label]


def _walk(
    module: nn.Module, name: str, path: tuple[Condition, ...]
) -> Iterator[tuple[str, nn.Module, tuple[Condition, ...]]]:
    """The outermost modules without branches, if they hold parameters, and what others hold of their own."""
    if not has_branches(module):
        if next(module.parameters(), None) is not None:
            yield name, module, path
        return
    bare = nn.ParameterList(parameter for parameter in module.parameters(recurse=False))
    if len(bare):
        yield name, bare, path
    if isinstance(module, Branching):
        for child_name, child, condition in module.branches():
            yield from _walk(child, f"{name}.{child_name}", (*path, condition))
    else:
        for child_name, child in module.named_children():
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, path)


@final
class _Findings:
    """What is known: each key's calls by the options of the labels that decide them."""

    def __init__(self, space: ModelSpace, runner: _Runner) -> None:
        self._space = space
        self._runner = runner
        self._runs: list[tuple[Architecture, dict[_Key, _Call]]] = []
        self._deciding: dict[_Key, tuple[str, ...]] = {}
        self._known: dict[_Key, dict[tuple[Option, ...], tuple[Architecture, _Call | None]]] = {}

    def look(self, chosen: Architecture) -> None:
        """Runs one architecture and learns from it."""
        architecture, seen = self._space.with_implied(chosen), self._runner.run(chosen)
        for key in seen:
            if key not in self._known:
                self._deciding[key] = ()
                self._known[key] = {}
                for before, calls in self._runs:
                    self._learn(key, before, calls.get(key))
        self._runs.append((architecture, seen))
        for key in self._known:
            self._learn(key, architecture, seen.get(key))

    def _learn(self, key: _Key, architecture: Architecture, call: _Call | None) -> None:
        while True:
            at = tuple(architecture[label] for label in self._deciding[key])
            other, known = self._known[key].setdefault(at, (architecture, call))
            if known is call or _signature(known) == _signature(call):
                return
            self._add_label(key, other, known, architecture)

    def _add_label(self, key: _Key, first: Architecture, call: _Call | None, second: Architecture) -> None:
        """Finds, by bisection, a label between two architectures that changes what the key is given."""
        differing = [
            label
            for label in self._space.options
            if first[label] != second[label] and label not in self._deciding[key]
        ]
        if not differing:
            raise _undecided(key, call)

        def mixed(labels: Sequence[str]) -> Architecture:
            chosen = {label: first[label] for label in self._space.options}
            return {**chosen, **{label: second[label] for label in labels}}

        def is_changed_by(labels: Sequence[str]) -> bool:
            return _signature(self._runner.run(mixed(labels)).get(key)) != _signature(call)

        # What decides one site often decides the next, and that run is known already.
        familiar = {label for labels in self._deciding.values() for label in labels}
        for label in differing:
            if label in familiar and is_changed_by([label]):
                without: Sequence[str] = ()
                break
        else:
            low, high = 0, len(differing)  # as `first` with the first `low` switched; unlike it with `high`
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if is_changed_by(differing[:middle]) else (middle, high)
            label, without = differing[high - 1], differing[:low]
        self._deciding[key] = self._with_label(key, label, mixed(without), mixed([*without, label]))
        self._known[key] = {}
        for architecture, calls in self._runs:
            self._learn(key, architecture, calls.get(key))

    def _with_label(
        self, key: _Key, label: str, before: Architecture, after: Architecture
    ) -> tuple[str, ...]:
        """What decides a key with a label more, or with a fold of several in place of it.

        Args:
            key: where something runs.
            label: in which alone the two architectures differ.
            before, after: two architectures that give the key different things.
        """
        folds, deciding = self._space.folds, self._deciding[key]
        for name, fold in sorted(folds.items(), key=lambda item: len(item[1].options)):
            behind = {leaf.name() for leaf in fold.leaves()}
            if label not in behind or behind & set(deciding) or fold.read(before) == fold.read(after):
                continue
            others = [n for n in deciding if n not in folds or behind.isdisjoint(_choices_of(n, folds))]
            seen: dict[tuple[Option, ...], str | None] = {}
            signatures = (
                (tuple(architecture[n] for n in (*others, name)), _signature(calls.get(key)))
                for architecture, calls in self._runs
            )
            if all(seen.setdefault(at, signature) == signature for at, signature in signatures):
                return (*others, name)
        others = [n for n in deciding if n not in folds or label not in _choices_of(n, folds)]
        return (*others, label)

    def confirm(self) -> None:
        """Runs one architecture twice more: equal choices must give equal shapes."""
        given, before = self._runs[0]
        architecture = {label: given[label] for label in self._space.options}
        for again in (self._runner.run_anew(architecture), self._runner.run_anew(architecture)):
            for key in dict.fromkeys((*before, *again)):
                if _signature(before.get(key)) != _signature(again.get(key)):
                    raise _undecided(key, before.get(key))

    def cover(self) -> None:
        """Runs until every combination of each key's deciding labels has been seen."""
        while missing := list(self._unseen()):
            wanted: Architecture = {}
            for combination in map(self._space.without_implied, missing):
                if all(wanted.get(label, option) == option for label, option in combination.items()):
                    wanted.update(combination)
            self.look({**self._space.default(), **wanted})

    def _unseen(self) -> Iterator[Architecture]:
        options = every_option(self._space)
        for key, labels in self._deciding.items():
            count = math.prod(len(options[label]) for label in labels)
            if count > _LARGEST:
                raise ValueError(
                    f"what site '{key.name}' is given depends on {labels}: {count} combinations, at most "
                    f"{_LARGEST} are tried. Let fewer choices share one tensor"
                )
            if count > len(self._known[key]):
                for combination in itertools.product(*(options[label] for label in labels)):
                    if combination not in self._known[key]:
                        yield dict(zip(labels, combination, strict=True))

    def sites(self) -> list[Site]:
        calls: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        found: list[Site] = []
        for key, labels in self._deciding.items():
            at = key.name, key.place.branches
            name = f"{key.name}#{calls[at]}" if calls[at] else key.name
            calls[at] += 1
            known = {options: call for options, (_, call) in self._known[key].items()}
            own = self._runner.own_labels(key)
            found.append(
                FoundSite(
                    name, key.place.conditions, own, labels, known, self._runner.part, self._space.folds
                )
            )
        return found


@final
class _Runner:
    """Runs a copy of the network on the ``meta`` device, each distinct site once."""

    def __init__(
        self, space: ModelSpace, example_inputs: Sequence[Tensor], with_memory: bool = False
    ) -> None:
        self._space = ModelSpace(on_meta(space.network), space.settings)
        self._inputs = [_to_meta(given) for given in example_inputs]
        self._with_memory = with_memory
        self._modules = dict(self._space.network.named_modules())
        self._insides: dict[nn.Module, _Inside] = {}
        _look_inside(self._space.network, self._insides)
        self._alike: dict[str, object] = {}
        self._subnets: dict[tuple[object, tuple[Option, ...]], nn.Module] = {}
        self._parts: dict[tuple[Any, ...], Part] = {}
        self._graphs: dict[tuple[Any, ...], ExecutedGraph] = {}
        self._calls: dict[tuple[Any, ...], _Call] = {}
        self._outputs: dict[tuple[Any, ...], Tensor] = {}
        self._runs: dict[tuple[Option, ...], dict[_Key, _Call]] = {}
        self._branchings: dict[tuple[Any, ...], tuple[dict[_Key, _Call], Any]] = {}
        self._start = _Place((), ())
        # Of the run that is under way:
        self._architecture: Architecture = {}
        self._seen: dict[_Key, _Call] = {}
        self._place = self._start
        self._numbers: Counter[tuple[_Place, str]] = Counter()
        self._containers: list[str] = []
        self._inside_site = False
        self._events: list[Event] = []
        self._forwards: dict[nn.Module, Any] = {}
        for name, module in self._modules.items():
            self._forwards[module] = vars(module).get("forward")
            if isinstance(module, Branching):
                module.forward = partial(self._branching, name, module)
            elif not self._insides[module].has_branches:
                module.forward = partial(self._module, name, module.forward)
            else:
                module.forward = partial(self._container, name, module.forward)

    def run(self, architecture: Architecture) -> dict[_Key, _Call]:
        """What every site is given under an architecture, those of branches not taken included."""
        options = tuple(architecture.values())
        if options not in self._runs:
            self._runs[options] = self._run(architecture)
        return self._runs[options]

    def run_anew(self, architecture: Architecture) -> dict[_Key, _Call]:
        """As `run`, without looking at what was run before."""
        self._branchings.clear()
        return self._run(architecture)

    def _run(self, architecture: Architecture) -> dict[_Key, _Call]:
        self._architecture = self._space.with_implied(architecture)
        self._seen, self._place = {}, self._start
        self._numbers, self._containers, self._inside_site, self._events = Counter(), [], False, []
        gates = self._space.gates_of(architecture)
        # Factories called in `forward` (torch.arange) follow the device.
        with torch.no_grad(), torch.device("meta"), self._space.running(gates), Functions(self._function):
            try:
                output = self._space(*self._inputs)
            except Exception as error:
                shapes = [tuple(given.shape) for given in self._inputs]
                raise ValueError(
                    f"the network does not run on inputs of shapes {shapes} under {architecture}: {error}. "
                    "It is run on the meta device (shapes without numbers): give inputs as the network "
                    "takes them, and let its forward not read values of tensors"
                ) from error
        return self._with_liveness(output) if self._with_memory else self._seen

    def _with_liveness(self, output: Any) -> dict[_Key, _Call]:
        """The calls of the path that is taken, with what lies in memory during each."""
        taken = [
            event
            for event in self._events
            if all(condition.holds(self._architecture) for condition in event.site.place.conditions)
        ]
        weights = itertools.chain(self._space.network.parameters(), self._space.network.buffers())
        made = tensors_in(output)
        taken = needed(taken, made)
        memories = liveness(taken, self._inputs, made, weights)
        return {
            event.site: replace(self._seen[event.site], memory=memory)
            for event, memory in zip(taken, memories, strict=True)
        }

    def own_labels(self, key: _Key) -> tuple[str, ...]:
        return self._labels(key.name) if key.name in self._modules else ()

    def _labels(self, name: str) -> tuple[str, ...]:
        """Of what decides the values inside a module."""
        return self._insides[self._modules[name]].labels

    def part(self, call: _Call, own: Mapping[str, Option]) -> Part:
        """The frozen site that a call ran, under its own options."""
        key = self._part_key(call, own)
        if key not in self._parts:
            module, described = self._frozen(call, own)
            graph = self._graph(key, module, call)
            shapes = ", ".join("x".join(map(str, given.shape)) for given in call.inputs)
            self._parts[key] = Part(f"{described} at {shapes}", graph.key, module, call.inputs, graph.is_free)
        return replace(self._parts[key], memory=call.memory) if call.memory else self._parts[key]

    def _part_key(self, call: _Call, own: Mapping[str, Option]) -> tuple[Any, ...]:
        """Equal for calls that are one part: layers that are alike are looked at once."""
        if call.module is None:
            return call.function, call.signature
        if call.module not in self._alike:
            module = self._modules[call.module]
            with self._as_it_was(module):
                described = description(module, self._labels(call.module))
            self._alike[call.module] = call.module if described is None else described
        return self._alike[call.module], call.signature, tuple(own.values())

    def _frozen(self, call: _Call, own: Mapping[str, Option]) -> tuple[nn.Module, str]:
        if call.module is None:
            assert call.function is not None
            return Operation(call.function, call.template, call.keywords), _function_name(call.function)
        built, _, options = self._part_key(call, own)
        if (built, options) not in self._subnets:
            # A site is frozen in the middle of a run; its thousands of small calls are nothing to look at.
            whole = self._modules[call.module]
            with torch._C.DisableTorchFunction(), self._as_it_was(whole):
                self._subnets[built, options] = Freezer(own)(whole)
        module = self._subnets[built, options]
        described = _described(module)
        if call.keywords or call.template != tuple(map(Slot, range(len(call.inputs)))):
            return Operation(module, call.template, call.keywords), described
        return module, described

    def _graph(self, key: tuple[Any, ...], module: nn.Module, call: _Call) -> ExecutedGraph:
        if key not in self._graphs:
            with torch.device("meta"):
                self._graphs[key] = executed_graph(module, call.inputs)
        return self._graphs[key]

    # ---- what runs instead of each module's forward

    def _branching(self, name: str, module: Branching, *inputs: Any, **keywords: Any) -> Any:
        """Runs every branch, but once alone under equal options on tensors of equal shapes."""
        with torch._C.DisableTorchFunction():
            call = self._called(name, inputs, keywords)
        place = self._place.inside(name, self._numbered(name))
        known = (place, call, *(self._architecture[label] for label in self._insides[module].choices))
        if known in self._branchings and not self._with_memory:  # there every run has tensors of its own
            seen, output = self._branchings[known]
            self._seen.update(seen)
            return _again(output)
        outside, self._place = self._place, place
        before, self._seen = self._seen, {}
        try:
            output = module.run_all(partial(self._branch, name), *inputs, **keywords)
        finally:
            self._place = outside
            seen, self._seen = self._seen, before
            self._seen.update(seen)
        self._branchings[known] = seen, _again(output)
        return output

    def _branch(
        self, name: str, child_name: str, child: nn.Module, when: Condition, *inputs: Any, **keywords: Any
    ) -> Any:
        before, self._place = self._place, self._place.taken(name, child_name, when)
        try:
            return child(*inputs, **keywords)
        finally:
            self._place = before

    def _container(self, name: str, forward: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        self._containers.append(name)
        try:
            return forward(*inputs, **keywords)
        finally:
            self._containers.pop()

    def _module(self, name: str, forward: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        if self._inside_site:
            return forward(*inputs, **keywords)
        with self._unobserved():
            with torch._C.DisableTorchFunction():  # as above
                call = self._called(name, inputs, keywords)
            key = self._note(name, call)
            own = {label: self._architecture[label] for label in self._labels(name)}
            part_key = self._part_key(call, own)
            if part_key not in self._graphs:
                self.part(call, own)
            graph = self._graphs[part_key]
            if self._with_memory:
                return self._observed(key, graph, (inputs, keywords))
            return _again(graph.output)

    def _observed(self, key: _Key, graph: ExecutedGraph, given: Any) -> Any:
        """The output as tensors of its own: which ones are used, and until when, is looked at."""
        with torch._C.DisableTorchFunction():
            tensors: list[Tensor] = []
            template = emptied(graph.output, tensors)
            fresh = [torch.empty_like(tensor) for tensor in tensors]
        self._events.append(Event(key, tensors_in(given), fresh, graph.is_free))
        return filled(template, fresh)

    def _called(self, name: str, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> _Call:
        """The call of a module: the same object for equal arguments."""
        if keywords or not all(type(given) is Tensor for given in inputs):
            return self._same(_call(inputs, keywords, module=name))
        given = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if given not in self._calls:
            self._calls[given] = self._same(_call(inputs, keywords, module=name))
        return self._calls[given]

    def _same(self, call: _Call) -> _Call:
        """The first of equal calls."""
        return self._calls.setdefault((call.module, call.function, call.signature), call)

    def _function(
        self, function: Callable[..., Any], inputs: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> Any:
        if self._inside_site:
            return function(*inputs, **keywords)
        with self._unobserved():
            given = _call(inputs, keywords, function=function)
            call = self._same(given)
            output = self._output(call, given, inputs, keywords)
            if any(isinstance(thing, Tensor) for thing in flat(output)):
                container = self._containers[-1] if self._containers else ""
                name = f"{container}:{_function_name(function)}".lstrip(":")
                key = self._note(name, call)
                if self._with_memory:
                    self.part(call, {})
                    is_free = self._graphs[self._part_key(call, {})].is_free
                    self._events.append(
                        Event(key, tensors_in((inputs, keywords)), tensors_in(output), is_free)
                    )
            return output

    def _output(self, call: _Call, given: _Call, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """What a function returns; it runs once on tensors of equal shapes and strides."""
        assert call.function is not None
        known = (call, *(tensor.stride() for tensor in given.inputs))
        if known not in self._outputs:
            output = call.function(*inputs, **keywords)
            # What changes its arguments has to run each time: their shapes may change with them.
            changes_them = getattr(call.function, "__name__", "_").endswith("_") or "out" in keywords
            if type(output) is not Tensor or changes_them or self._with_memory:
                return output
            self._outputs[known] = output
        return _again(self._outputs[known])

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        self._inside_site = True
        try:
            yield
        finally:
            self._inside_site = False

    def _note(self, name: str, call: _Call) -> _Key:
        key = self._place.key(name, self._numbered(name))
        self._seen[key] = call
        return key

    def _numbered(self, name: str) -> int:
        """How often something was called here before."""
        number = self._numbers[self._place, name]
        self._numbers[self._place, name] = number + 1
        return number

    @contextmanager
    def _as_it_was(self, module: nn.Module) -> Iterator[None]:
        """Without what stands in place of the modules' forward methods here."""
        observed = {child: vars(child).pop("forward") for child in module.modules()}
        for child in observed:
            if self._forwards[child] is not None:  # a method of the module, not of its class
                vars(child)["forward"] = self._forwards[child]
        try:
            yield
        finally:
            for child, forward in observed.items():
                vars(child)["forward"] = forward


def _call(
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    module: str | None = None,
    function: Callable[..., Any] | None = None,
) -> _Call:
    tensors: list[Tensor] = []
    template, words = emptied(inputs, tensors), emptied(dict(keywords), tensors)
    shapes = ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)}" for t in tensors)
    name = f"{_function_name(function)} " if function else ""
    return _Call(f"{name}{template} {words} {shapes}", template, tuple(tensors), words, module, function)


def _undecided(key: _Key, call: _Call | None) -> RuntimeError:
    return RuntimeError(
        f"site '{key.name}' was given different shapes in two runs of equal choices (once "
        f"{_signature(call)}): its shapes must be decided by the choices alone, not by random numbers, "
        "counters or values"
    )


def _signature(call: _Call | None) -> str | None:
    if call is None:
        return None
    return call.signature if call.memory is None else f"{call.signature} {call.memory}"


def _shifted(space: ModelSpace, base: Architecture, shift: int) -> Architecture:
    """Every choice moved on by ``shift`` options."""
    return {
        label: options[(options.index(base[label]) + shift) % len(options)]
        for label, options in space.options.items()
    }


def on_meta(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes but no memory."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(_to_meta(parameter), requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = _to_meta(buffer)
    return deep_copy(network, memo).eval()


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def has_branches(module: nn.Module) -> bool:
    """Whether a layer or an input is chosen in it; a site is the outermost module without."""
    return any(isinstance(child, Branching | InputChoice) for child in module.modules())


@dataclass(frozen=True)
class _Inside:
    """What is in a module, and in all modules in it.

    Attributes:
        has_branches: a choice between layers or inputs is.
        choices: the labels of all choices.
        values: all values.
    """

    has_branches: bool
    choices: tuple[str, ...]
    values: tuple[Value, ...]

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Of the value choices, or of what is folded of them."""
        return tuple(
            dict.fromkeys(named(term.label, "value", term.options) for term in terms_of(self.values))
        )


def _look_inside(module: nn.Module, found: dict[nn.Module, _Inside]) -> _Inside:
    """Looks into a module and all modules in it."""
    if module not in found:
        held = [_look_inside(child, found) for child in module.children()]
        values = tuple(values_in(own_attributes(module)))
        choices = [str(leaf.label) for value in values for leaf in value.leaves()]
        if isinstance(module, LayerChoice | InputChoice):
            choices.append(str(module.label))
        is_branching = isinstance(module, Branching | InputChoice)
        found[module] = _Inside(
            has_branches=is_branching or any(inside.has_branches for inside in held),
            choices=tuple(dict.fromkeys(itertools.chain(choices, *(inside.choices for inside in held)))),
            values=tuple(itertools.chain(values, *(inside.values for inside in held))),
        )
    return found[module]


def _again(output: Any) -> Any:
    """An output as if made anew: the network may change its shape in place, or add to its list."""
    with torch._C.DisableTorchFunction():
        if type(output) is Tensor:
            return output.detach()
        tensors: list[Tensor] = []
        template = emptied(output, tensors)
        return filled(template, tensors)


def _function_name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)  # some builtins have none
    if name == "__get__":  # a property of a tensor, such as .T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return cast("str", name).strip("_")


def _described(module: nn.Module) -> str:
    extra = module.extra_repr()
    return f"{type(module).__name__}({extra})" if extra else type(module).__name__
