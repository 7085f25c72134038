"""Which parts a frozen network runs, one after the other, and what feeds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hwnas.arguments import Operation, emptied, tensors_in
from hwnas.freezing import Freezer
from hwnas.survey import has_branches
from lookup_tables import EntrySource, PartCall, Wiring, executed_graph
from profilers.space import Architecture


def wired(
    network: nn.Module, architecture: Architecture, example_input: Tensor, parts: dict[str, EntrySource]
) -> Wiring:
    """Freezes a network and runs it on the ``meta`` device, looking at every part.

    Parts are those of `hwnas.survey`: the outermost modules without a choice between layers or inputs, and
    functions called outside of them.

    Args:
        network: with choices, on the ``meta`` device, in evaluation mode.
        architecture: canonical.
        example_input: of the shape that a deployed network gets.
        parts: what runs and is not in it yet is added, by key, also what costs nothing.
    """
    freezer = Freezer(architecture)
    frozen = freezer(network)
    copies = (freezer.copy_of(module) for module in network.modules() if not has_branches(module))
    watched = [copied for copied in copies if isinstance(copied, nn.Module)]
    recorder = _Recorder(parts)
    given = torch.empty_like(example_input, device="meta")
    inputs = (recorder.made(given),)
    for module in watched:
        module.forward = partial(recorder.run, module.forward, module)
    try:
        with torch.no_grad(), torch.device("meta"), recorder:
            returned = frozen(given)
    finally:
        for module in watched:
            del module.forward
    outputs = tuple(recorder.number(tensor) for tensor in tensors_in(returned))
    return Wiring(inputs, tuple(recorder.calls), outputs)


@final
class _Recorder(TorchFunctionMode):
    """Takes down every part that runs; as a mode, functions that no part contains."""

    def __init__(self, parts: dict[str, EntrySource]) -> None:
        super().__init__()
        self.calls: list[PartCall] = []
        self._parts = parts
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id stands for its tensor only while that lives
        self._is_inside = False

    def number(self, tensor: Tensor) -> int:
        """That of a tensor as it is now: what has changed it in place made another of it."""
        return self._numbers[id(tensor)] if id(tensor) in self._numbers else self.made(tensor)

    def made(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        self._numbers[id(tensor)] = len(self._alive)
        return len(self._alive)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self._is_inside:
            return func(*args, **(kwargs or {}))
        return self.run(func, None, *args, **(kwargs or {}))

    def run(
        self, function: Callable[..., Any], module: nn.Module | None, *inputs: Any, **keywords: Any
    ) -> Any:
        """Calls a part, a module or else a function, and takes it down if it makes tensors."""
        if self._is_inside:
            return function(*inputs, **keywords)
        self._is_inside = True
        try:
            taken: list[Tensor] = []
            template, words = emptied(inputs, taken), emptied(keywords, taken)
            given = tuple(tensors_in((inputs, keywords)))  # themselves: what was taken out is detached
            part = Operation(function, template, words)
            numbers = tuple(map(self.number, given))
            graph = executed_graph(part, given)
            made = tensors_in(graph.output)
            is_passed_on = graph.is_free and all(any(one is other for other in given) for one in made)
            if made and not is_passed_on:
                source = Operation(module or function, template, words)
                detached = tuple(torch.empty_like(tensor) for tensor in given)
                self._parts.setdefault(graph.key, EntrySource(str(function), source, detached))
                self.calls.append(PartCall(graph.key, numbers, tuple(map(self.made, made))))
            return graph.output
        finally:
            self._is_inside = False
