"""Which operators a module executes, with the shapes that decide what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]


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


@final
@dataclass(frozen=True)
class Operator:
    """One operator that was executed.

    Attributes:
        name: aten's, without its overload: ``convolution``, ``addmm``, ``add``, ``mean``, ``hardswish``; or
            ``transposed_convolution``, which aten takes for the same operator.
        inputs: shapes of its tensors: of a convolution the images' ``(N, C, H, W)`` and its weight's
            ``(out, in / groups, height, width)``.
        output: shape of what it returned, the first if there are several.
        stride: of a convolution, else empty.
        groups: of a convolution, else 1.
        dilation: of a convolution, else empty.
    """

    name: str
    inputs: tuple[Shape, ...]
    output: Shape
    stride: Shape = ()
    groups: int = 1
    dilation: Shape = ()


def executed_operators(module: nn.Module, inputs: Sequence[Tensor]) -> list[Operator]:
    """Runs a module on inputs, usually on the ``meta`` device, and lists what it executed, in order.

    >>> conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, device="meta")
    >>> executed_operators(conv, [torch.empty(1, 4, 6, 6, device="meta")])
    [Operator(name='convolution', inputs=((1, 4, 6, 6), (8, 4, 3, 3), (8,)), output=(1, 8, 3, 3), \
stride=(2, 2), groups=1, dilation=(1, 1))]
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        module(*inputs)
    return recorder.found


def run_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns; on ``meta`` without torch's way round for some whose shape is known."""
    if func in _ON_META and not kwargs and args[0].is_meta:
        in_training = func is torch.ops.aten.native_batch_norm.default and args[5]
        if not in_training:
            return _ON_META[func](*args)
    return func(*args, **kwargs)


@final
class Functions(TorchFunctionMode):
    """Hands every torch function that Python code calls to ``handle``, with its arguments and keywords."""

    def __init__(self, handle: Callable[..., Any]) -> None:
        super().__init__()
        self._handle = handle

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self._handle(func, args, kwargs or {})


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operator] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = run_operator(func, args, kwargs or {})
        name = func.name().removeprefix("aten::").split(".")[0].rstrip("_")
        first = output[0] if isinstance(output, list | tuple) else output
        shapes = tuple(tuple(given.shape) for given in args if isinstance(given, Tensor))
        made = tuple(first.shape) if isinstance(first, Tensor) else ()
        if name == "convolution":
            stride, dilation, is_transposed, groups = args[3], args[5], args[6], args[8]
            kind = "transposed_convolution" if is_transposed else name
            self.found.append(Operator(kind, shapes, made, tuple(stride), int(groups), tuple(dilation)))
        else:
            self.found.append(Operator(name, shapes, made))
        return output
