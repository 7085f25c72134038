"""Multiply-adds of a network, in the convention of the published tables."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lookup_tables.operators import Functions, Operator, executed_operators
from profilers.profile import Profiler, distinct_parts, tabulated
from profilers.space import Option, Space

with warnings.catch_warnings():
    # fvcore scripts a function of its own when it is imported.
    warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_count, conv_flop_jit, get_shape, linear_flop_jit

# An operator's inputs and outputs in a trace. fvcore calls these `list[Any]`: torch does not type them.
_Values = list[Any]
_Handle = Callable[[_Values, _Values], Any]  # a Counter or, of fvcore's own, a number
_Handles = dict[str, _Handle | None]  # None: nothing is computed


@final
@dataclass(frozen=True)
class MacCount:
    """What a module computes on its inputs.

    Attributes:
        headline: multiply-adds of convolutions, linear layers and matrix products, attention included.
        detail: what else was seen, by operator, in elements that it wrote: normalisation, pooling,
            activations, additions. None of it is in the headline.
        uncounted: operators that nothing counts, each with how often it ran.
    """

    headline: int
    detail: Mapping[str, int]
    uncounted: Mapping[str, int]


def count_macs(module: nn.Module, inputs: Sequence[Tensor]) -> MacCount:
    """Counts with fvcore, in one trace of the module in evaluation mode.

    One multiply-add is one MAC. Biases, normalisation, pooling, activations and additions are not in the
    headline: the convention of MobileNetV2 (arXiv 1801.04381) and its successors. fvcore alone adds
    BatchNorm, LayerNorm and adaptive pooling, and does not see ``scaled_dot_product_attention``.

    Args:
        module: on the CPU or on ``meta`` (its tensors are then zeros); it is not changed.
        inputs: tensors of the shapes and types that it gets; their values are not read.

    >>> count_macs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), [torch.zeros(1, 3, 5, 5)])
    MacCount(headline=1944, detail={'relu': 72}, uncounted={})
    """
    return _all_counted([(module, inputs)], with_detail=True)[0]


@final
class FlopsProfiler(Profiler):
    """Multiply-adds of every architecture, by `count_macs`; the unit is ``"MAC"``.

    Each distinct part of the space is counted once: by the shapes of what it executes on ``meta``, by
    fvcore's formula, or, where that has operators that are not known there, in fvcore's trace, which takes
    six times as long and says the same. Operators that nothing counts raise a ``UserWarning`` that names
    them and a part that has them.

    Args:
        space: the space.
        example_inputs: of the shapes that the network gets; with a batch of one it is MACs per image.
    """

    def __init__(self, space: Space, *example_inputs: Tensor) -> None:
        self._sites = tuple(space.sites(*example_inputs))
        parts = distinct_parts(space, self._sites)
        calls = [(part.module, part.inputs) for part in parts.values()]
        counts = dict(zip(parts, _headlines(calls), strict=True))
        self._detailed: dict[str, MacCount] = {}
        uncounted = {op: parts[key].name for key, count in counts.items() for op in count.uncounted}
        if uncounted:
            found = "; ".join(f"{operator} (in {name})" for operator, name in sorted(uncounted.items()))
            warnings.warn(f"operators whose MACs nothing counts, taken as 0: {found}", stacklevel=2)
        headlines = {key: float(count.headline) for key, count in counts.items()}
        super().__init__(tabulated(space, self._sites, headlines, "MAC"))

    def detail(self, architecture: Mapping[str, Option]) -> MacCount:
        """An architecture's headline, and what is not in it; traces its parts at the first time."""
        found = [site.part(architecture) for site in self._sites]
        parts = [part for part in found if part is not None and not part.is_free]
        new = {part.key: (part.module, part.inputs) for part in parts if part.key not in self._detailed}
        traced = _all_counted(list(new.values()), with_detail=True)
        self._detailed |= zip(new, traced, strict=True)
        headline, detail, uncounted = 0, Counter[str](), Counter[str]()
        for part in parts:
            count = self._detailed[part.key]
            headline += count.headline
            detail.update(count.detail)
            uncounted.update(count.uncounted)
        return MacCount(headline, dict(detail), dict(uncounted))


def _headlines(calls: Sequence[tuple[nn.Module, Sequence[Tensor]]]) -> list[MacCount]:
    """What each module computes on its inputs, without the detail."""
    with _plain_attention():
        known = [_by_shapes(module, inputs) for module, inputs in calls]
    unknown = [call for call, macs in zip(calls, known, strict=True) if macs is None]
    traced = iter(_all_counted(unknown, with_detail=False))
    return [next(traced) if macs is None else MacCount(macs, {}, {}) for macs in known]


def _by_shapes(module: nn.Module, inputs: Sequence[Tensor]) -> int | None:
    """The headline by the shapes of what runs on ``meta``; None where that does not tell it."""
    if not all(held.is_meta for held in (*inputs, *module.parameters(), *module.buffers())):
        return None
    called: set[str] = set()

    def noted(function: Callable[..., Any], given: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        called.add(getattr(function, "__name__", ""))
        return function(*given, **keywords)

    with _evaluating(module), torch.device("meta"), Functions(noted):
        operators = executed_operators(module, inputs)
    if called & _UNCLEAR or any(op.name not in _PLAIN and op.name not in _BY_SHAPES for op in operators):
        return None
    return sum(_BY_SHAPES[op.name](op) for op in operators if op.name in _BY_SHAPES)


def _all_counted(calls: Sequence[tuple[nn.Module, Sequence[Tensor]]], with_detail: bool) -> list[MacCount]:
    """What each module computes on its inputs; to look at what is in the detail takes a fifth of the time."""
    handles = {**_PRODUCTS, **(_ELEMENTS if with_detail else dict.fromkeys(_ELEMENTS))}
    with ThreadPoolExecutor(1) as thread:
        return [_counted(module, inputs, handles, thread) for module, inputs in calls]


def _counted(
    module: nn.Module, inputs: Sequence[Tensor], handles: _Handles, thread: ThreadPoolExecutor
) -> MacCount:
    given = tuple(torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in inputs)
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    tensors = {
        f"module.{name}": torch.zeros(held.shape, dtype=held.dtype, device="cpu")
        if held.is_meta
        else held.detach()
        for name, held in named
    }
    with torch.no_grad(), _evaluating(module), _plain_attention():
        # Its tensors are exchanged while this runs: a copy of the module takes longer than the trace.
        counted: MacCount = functional_call(_Traced(module, handles, thread), tensors, given)
    return counted


class _Traced(nn.Module):
    """Counts what a module computes when this is called."""

    def __init__(self, module: nn.Module, handles: _Handles, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self.module = module
        self._handles = handles
        self._thread = thread

    def forward(self, *inputs: Tensor) -> MacCount:
        analysis = FlopCountAnalysis(_Call(self.module, self._thread), inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        # An operator is counted once, for the whole: which module called it does not matter.
        analysis.ancestor_mode("caller").clear_op_handles().set_op_handle(**self._handles)
        counted: Counter[str] = analysis.by_operator()
        return MacCount(
            headline=int(sum(count for name, count in counted.items() if name not in _APART)),
            detail={name: int(count) for name, count in counted.items() if name in _APART},
            uncounted=dict(analysis.unsupported_ops()),
        )


class _Call(nn.Module):
    """Calls a module that is not its child: hooks and names for each child are most of fvcore's time.

    What is left is the trace, which records the Python stack at each of its nodes. In a thread of its own
    the stack is the module's alone, without fvcore's frames and those of who called it.
    """

    def __init__(self, module: nn.Module, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, or it would be a child
        self._thread = thread
        # Tensors of what is traced become inputs of its graph; any others would be nodes to visit.
        for number, tensor in enumerate(itertools.chain(module.parameters(), module.buffers())):
            self.register_buffer(f"tensor{number}", tensor)

    def forward(self, *inputs: Any) -> Any:
        state = torch._C._get_tracing_state()
        return self._thread.submit(_traced, state, self._module[0], inputs).result()


def _traced(state: Any, module: nn.Module, inputs: Sequence[Any]) -> Any:
    """What a module returns, recorded in the trace of another thread, which waits."""
    exchange: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]  # not in torch's stubs
    exchange(state)
    try:
        with torch.no_grad():
            return module(*inputs)
    finally:
        exchange(None)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = [child for child in module.modules() if child.training]
    for child in was_training:
        child.training = False
    try:
        yield
    finally:
        for child in was_training:
            child.training = True


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention modules of torch as separate operators, not as one that says nothing of its inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ---- handles: what one operator of a trace computes


def _elements(name: str) -> _Handle:
    def handle(inputs: _Values, outputs: _Values) -> Counter[str]:
        return Counter({name: math.prod(get_shape(outputs[0]))})

    return handle


def _product_of(name: str, first: int) -> _Handle:
    """A matrix product whose left factor is input ``first``: each output sums over that one's last axis."""

    def handle(inputs: _Values, outputs: _Values) -> Counter[str]:
        return Counter({name: math.prod(get_shape(outputs[0])) * get_shape(inputs[first])[-1]})

    return handle


def _named_padding(inputs: _Values, outputs: _Values) -> Counter[str]:
    """A convolution with ``padding="same"``, which fvcore does not know: each output sums over a filter."""
    return Counter({"conv": math.prod(get_shape(outputs[0])) * math.prod(get_shape(inputs[1])[1:])})


def _attention(inputs: _Values, outputs: _Values) -> Counter[str]:
    """Queries times keys, and their weights times values."""
    query, key, value = (get_shape(given) for given in inputs[:3])
    heads = math.prod(query[:-2])
    return Counter({"attention": heads * query[-2] * key[-2] * (query[-1] + value[-1])})


def _einsum(inputs: _Values, outputs: _Values) -> Counter[str]:
    """Operands contracted from left to right, which is torch's order; fvcore rounds to four digits."""
    terms, arrow, result = inputs[0].toIValue().replace(" ", "").partition("->")
    shapes = [get_shape(value) for value in inputs[1].node().inputs()]
    sizes: dict[str, int] = {}
    operands = []
    for term, shape in zip(terms.split(","), shapes, strict=True):
        # The axes of an ellipsis are matched from the right: they are named "-1", "-2", ...
        hidden = [str(-i) for i in range(len(shape) - len(term.replace("...", "")), 0, -1)]
        before, dots, after = term.partition("...")
        axes = [*before, *(hidden if dots else []), *after]
        for axis, size in zip(axes, shape, strict=True):
            sizes[axis] = max(sizes.get(axis, 1), size)
        operands.append(set(axes))
    kept = {  # without an arrow, what occurs once
        axis
        for axis in sizes
        if axis.startswith("-") or (axis in result if arrow else terms.count(axis) == 1)
    }
    total, left = 0, operands[0]
    for index, right in enumerate(operands[1:], start=2):
        later = kept.union(*operands[index:])
        # What is in one of the two alone and not needed later is summed before they meet.
        total += math.prod(sizes[axis] for axis in left & right | (left | right) & later)
        left = (left | right) & later
    return Counter({"einsum": total})


# Seen, and not in the headline: in the detail by the elements that they write.
_APART = {
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "norm", "linalg_vector_norm",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
    "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "sigmoid", "log_sigmoid", "tanh", "softplus", "softmax", "log_softmax",
    "clamp", "clamp_min", "clamp_max", "add", "sub", "rsub", "mul", "div", "neg", "abs", "exp", "log", "sqrt",
    "rsqrt", "reciprocal", "pow", "sin", "cos", "erf", "mean", "sum", "var", "amax", "amin", "max", "min",
    "cumsum", "where", "masked_fill", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "grid_sampler", "embedding", "pixel_shuffle",
}  # fmt: skip
# They move or name data and compute nothing; fvcore's own list comes on top.
_NOTHING = {
    "alias", "bitwise_and", "channel_shuffle", "clone", "dropout", "expand_as", "feature_dropout", "flip",
    "index_select", "lift_fresh", "movedim", "ne", "lt", "le", "logical_and", "logical_not", "ones_like",
    "pad", "repeat", "repeat_interleave", "reshape_as", "scalar_tensor", "swapaxes", "tile", "unflatten",
    "unsafe_chunk", "unsafe_split", "view_as",
}  # fmt: skip
_ELEMENTS: _Handles = {f"aten::{name}{suffix}": _elements(name) for name in _APART for suffix in ("", "_")}
_PRODUCTS: _Handles = {
    **{f"aten::{name}{suffix}": None for name in _NOTHING for suffix in ("", "_")},
    "aten::_convolution": conv_flop_jit,
    "aten::_convolution_mode": _named_padding,
    "aten::addmm": _product_of("addmm", 1),
    "aten::baddbmm": _product_of("baddbmm", 1),
    "aten::bmm": _product_of("bmm", 0),
    "aten::dot": _product_of("dot", 0),
    "aten::einsum": _einsum,
    "aten::linear": linear_flop_jit,
    "aten::matmul": _product_of("matmul", 0),
    "aten::mm": _product_of("mm", 0),
    "aten::mv": _product_of("mv", 0),
    "aten::scaled_dot_product_attention": _attention,
}


# ---- what one operator that ran on `meta` computes, by its shapes


def _convolution(op: Operator) -> int:
    given, weight = map(list, op.inputs[:2])
    is_transposed = op.name == "transposed_convolution"
    return int(conv_flop_count(given, weight, list(op.output), transposed=is_transposed))


def _product(first: int) -> Callable[[Operator], int]:
    """A matrix product whose left factor is input ``first``."""
    return lambda op: math.prod(op.output) * op.inputs[first][-1]


_BY_SHAPES: Mapping[str, Callable[[Operator], int]] = {
    "convolution": _convolution,
    "transposed_convolution": _convolution,
    "addmm": _product(1),
    "baddbmm": _product(1),
    "bmm": _product(0),
    "mm": _product(0),
}
# Without products; anything else is traced.
_PLAIN = {
    "_adaptive_avg_pool2d", "_softmax", "_unsafe_view", "_upsample_nearest2d", "add", "alias", "avg_pool2d",
    "cat", "channel_shuffle", "clamp", "clone", "constant_pad_nd", "detach", "div", "embedding", "empty",
    "expand", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "max_pool2d_with_indices",
    "mean", "mul", "native_batch_norm", "native_group_norm", "native_layer_norm", "permute", "relu", "select",
    "sigmoid", "silu", "slice", "split", "split_with_sizes", "squeeze", "stack", "sub", "sum", "t", "tanh",
    "transpose", "unsqueeze", "upsample_bilinear2d", "upsample_nearest2d", "view",
}  # fmt: skip
# Functions whose operators on `meta` are others than those of a trace: a product of one term is `mul` there;
# the others are one operator in a trace.
_UNCLEAR = {
    "einsum", "gru", "gru_cell", "lstm", "lstm_cell", "rnn_relu", "rnn_relu_cell", "rnn_tanh",
    "rnn_tanh_cell", "scaled_dot_product_attention",
}  # fmt: skip
