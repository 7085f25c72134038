"""What a module executes, as a digest: the key of an entry in a table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def _like_input(given: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(given)


def _itself(given: Tensor, *others: Any) -> Tensor:
    return given


def _batch_norm(given: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(given), given.new_empty(0), given.new_empty(0)


def _layer_norm(given: Tensor, shape: Sequence[int], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    kept = (*given.shape[: -len(shape)], *(1 for _ in shape))
    return torch.empty_like(given), given.new_empty(kept), given.new_empty(kept)


def _product(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


# What operators return on `meta` whose kernels there are decompositions in Python, up to 3 ms a call, for
# shapes that are known.
_ON_META: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.addmm.default: _product,
    torch.ops.aten.gelu.default: _like_input,
    torch.ops.aten.hardsigmoid.default: _like_input,
    torch.ops.aten.hardswish.default: _like_input,
    torch.ops.aten.hardswish_.default: _itself,
    torch.ops.aten.hardtanh.default: _like_input,
    torch.ops.aten.hardtanh_.default: _itself,
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.relu.default: _like_input,
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
        is_known = func in _ON_META and not kwargs and args[0].is_meta
        if is_known and not (func is torch.ops.aten.native_batch_norm.default and args[5]):  # in training
            output: Any = _ON_META[func](*args)
        else:
            output = func(*args, **(kwargs or {}))
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
