"""What a module executes, as a digest: the key of an entry in a table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lookup_tables.operators import run_operator

# They change how memory is read, not what is in it: no runtime spends time on them.
_VIEWS = {
    "aten::view",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::alias",
    "aten::detach",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::expand",
}


@dataclass(frozen=True)
class ExecutedGraph:
    """What a module executed.

    Attributes:
        key: digest of the operators in order, their attributes, the shapes and types of their tensors and
            where these come from. Names and weights' values are not in it.
        is_free: nothing but views was executed.
        output: what the module returned.
    """

    key: str
    is_free: bool
    output: Any


def executed_graph(module: nn.Module, inputs: Sequence[Any]) -> ExecutedGraph:
    """Runs a module on inputs, usually on the ``meta`` device, and digests the operators that ran.

    Two modules with equal keys export to equal graphs: an entry measured for one is valid for the other,
    and an edited block never finds an old number.

    >>> ones = torch.empty(1, 8, 4, 4, device="meta")
    >>> conv = nn.Conv2d(8, 8, 3, device="meta")
    >>> same = nn.Sequential(nn.Identity(), nn.Conv2d(8, 8, 3, device="meta"))
    >>> executed_graph(conv, [ones]).key == executed_graph(same, [ones]).key
    True
    >>> executed_graph(nn.Identity(), [ones]).is_free
    True
    """
    recorder = _Recorder(inputs)
    with torch.no_grad(), recorder:
        output = module(*inputs)
    operators = {line.split("(", 1)[0] for line in recorder.lines}
    text = "\n".join(recorder.lines)
    return ExecutedGraph(
        key=hashlib.sha256(text.encode()).hexdigest()[:20],
        is_free=operators <= _VIEWS,
        output=output,
    )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id stands for its tensor only while that lives
        for given in inputs:
            if isinstance(given, Tensor):
                self._number(given)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        line = f"{func.name().split('.')[0]}({self._text(args)}, {self._text(kwargs or {})})"
        output = run_operator(func, args, kwargs or {})
        self.lines.append(f"{line} -> {self._text(output)}")
        return output

    def _text(self, thing: Any) -> str:
        if isinstance(thing, Tensor):
            return f"%{self._number(thing)}:{str(thing.dtype)[6:]}{list(thing.shape)}"
        if isinstance(thing, list | tuple):
            return "[" + ", ".join(map(self._text, thing)) + "]"
        if isinstance(thing, dict):
            return "{" + ", ".join(f"{key}={self._text(thing[key])}" for key in sorted(thing)) + "}"
        if isinstance(thing, torch.device):
            return "device"  # where it ran says nothing about what ran
        return repr(thing)

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._numbers)
            self._alive.append(tensor)
        return self._numbers[id(tensor)]
