"""Many small modules as ONNX models, with the operators of a deployed file, in seconds."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]  # public in its documentation
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Example = tuple[nn.Module, tuple[Tensor, ...]]

_OPSET = 20
_GROUP = 24  # modules in one export by dynamo: a failed one is repeated
_OPERATORS = 300  # in one export by dynamo, unless one module has more: its time grows faster than they do
_SEED = 0


def to_onnx(
    modules: Mapping[str, Example], progress: Callable[[int, int], None] | None = None
) -> dict[str, bytes]:
    """Exports modules that stand on the ``meta`` device, each with random weights, as one model each.

    The models have the operators that ``torch.onnx.export(dynamo=True)`` writes, with BatchNorm folded: what
    is measured is what is deployed. That exporter takes 1.2 CPU seconds a block, and 0.18 with many blocks in
    one module that is cut apart again; the old one, by TorchScript, takes 0.02. So all go through the old one
    first. Both exporters translate operator by operator and see only neighbours. So a few modules, in which
    operators follow one another in all the ways that there are in any, go through both; the others are taken
    from the old one if all of their ways are in modules that came out alike. The default space:
    185 blocks in 5.8 CPU seconds, two of them through both; 32 of its networks in 8.1, one of them.

    Args:
        modules: by name, in evaluation mode; with the inputs that they are called with.
        progress: told how many are done, and how many there are.

    Raises:
        ValueError: naming a module that cannot be run or exported.
    """
    report = progress or (lambda done, total: None)
    report(0, len(modules))
    real = {name: _materialised(name, module, inputs) for name, (module, inputs) in modules.items()}
    quick: dict[str, onnx.ModelProto] = {}
    for name, example in real.items():
        exported = _by_torchscript(example)
        if exported is not None:
            quick[name] = exported
    ways = {name: _ways(model) for name, model in quick.items()}
    done: dict[str, onnx.ModelProto] = {}
    alike: set[Any] = set()  # ways that both exporters write alike
    for names in _grouped(_cover(ways), quick):
        done |= _by_dynamo({name: real[name] for name in names})
        alike.update(*(ways[name] for name in names if _operators(quick[name]) == _operators(done[name])))
    done |= {name: model for name, model in quick.items() if name not in done and ways[name] <= alike}
    report(len(done), len(modules))
    for names in _grouped([name for name in modules if name not in done], quick):
        done |= _by_dynamo({name: real[name] for name in names})
        report(len(done), len(modules))
    return {name: done[name].SerializeToString() for name in modules}


# ---- weights


def _materialised(name: str, module: nn.Module, inputs: Sequence[Tensor]) -> Example:
    """A copy on the CPU with random weights, which runs."""
    generator = torch.Generator().manual_seed(_SEED)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_random(parameter, generator), requires_grad=False)
    for path, buffer in module.named_buffers():
        # Near 1, but no two alike: the exporter would make one of them, and the deployed file has two.
        is_variance = path.endswith("running_var")
        memo[id(buffer)] = (
            _random(buffer, generator) * 0.01 + 1 if is_variance else _random(buffer, generator)
        )
    try:
        real = copy.deepcopy(module, memo).eval()
        given = tuple(_random(tensor, generator) for tensor in inputs)
        with torch.no_grad():
            outputs = real(*given)
    except Exception as error:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        raise ValueError(f"'{name}' does not run on inputs of shapes {shapes}: {error}") from error
    if not all(bool(tensor.isfinite().all()) for tensor in _tensors(outputs)):
        raise ValueError(f"'{name}' gives numbers that are not finite; such arithmetic has another speed")
    return real, given


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the usual size for weights of this shape: none is 0, denormal or large."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    fan_in = like[0].numel() if like.dim() > 1 else 1
    numbers: Tensor = torch.randn(like.shape, generator=generator) / fan_in**0.5
    return numbers.to(like.dtype)


# ---- the two exporters


def _by_torchscript(example: Example) -> onnx.ModelProto | None:
    """None where it cannot."""
    module, inputs = example
    file = io.BytesIO()
    names = [f"input{n}" for n in range(len(inputs))]
    try:
        with torch.no_grad(), _quiet(), _AsDynamo():
            torch.onnx.export(
                _Flat(module).eval(),
                inputs,
                file,  # type: ignore[arg-type]  # the old exporter writes to files, the signature is the new one's
                input_names=names,
                opset_version=_OPSET,
                dynamo=False,
            )
    except Exception:  # whatever it is, dynamo may do better, and says what is wrong otherwise
        return None
    return _tidy(_plain(onnx.load_from_string(file.getvalue())))


def _by_dynamo(examples: Mapping[str, Example]) -> dict[str, onnx.ModelProto]:
    """One export of all modules side by side, cut apart."""
    if not examples:
        return {}
    inputs = [[f"input{n}.{i}" for i in range(len(given))] for n, (_, given) in enumerate(examples.values())]
    with torch.no_grad():
        counts = [len(_tensors(module(*given))) for module, given in examples.values()]
    outputs = [[f"output{n}.{i}" for i in range(count)] for n, count in enumerate(counts)]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                _SideBySide(examples.values()).eval(),
                tuple(itertools.chain.from_iterable(given for _, given in examples.values())),
                input_names=list(itertools.chain.from_iterable(inputs)),
                output_names=list(itertools.chain.from_iterable(outputs)),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter's own, torch.export's, and what a forward raises in it
        if len(examples) == 1:
            raise ValueError(f"torch cannot export '{next(iter(examples))}': {error}") from error
        # One of them fails: alone it says which.
        return {name: _by_dynamo({name: example})[name] for name, example in examples.items()}
    assert program is not None  # dynamo=True returns a program
    cutter = Extractor(program.model_proto)
    return {
        name: _tidy(_plain(cutter.extract_model(inputs[n], outputs[n]))) for n, name in enumerate(examples)
    }


@final
class _Flat(nn.Module):
    """Returns the tensors of whatever the module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors(self.module(*inputs)))


@final
class _SideBySide(nn.Module):
    """Modules that share nothing, in one."""

    def __init__(self, examples: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_Flat(module) for module, _ in examples)
        self.counts = [len(inputs) for _, inputs in examples]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        left = iter(inputs)
        return tuple(
            itertools.chain.from_iterable(
                part(*itertools.islice(left, count))
                for part, count in zip(self.parts, self.counts, strict=True)
            )
        )


class _AsDynamo(TorchFunctionMode):
    """Writes operators that the two exporters translate differently as dynamo decomposes them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.adaptive_avg_pool2d and args[1] in (1, (1, 1)):
            return args[0].mean((-1, -2), keepdim=True)
        if func is nn.functional.channel_shuffle:  # which the older exporter does not know
            images, groups = (*args, *kwargs.values())
            batch, channels, *size = (int(axis) for axis in images.shape)
            apart = images.reshape(batch, groups, channels // groups, *size)
            return apart.transpose(1, 2).reshape(batch, channels, *size)
        if func is nn.functional.linear and args[0].dim() == 2 and _bias(args, kwargs) is None:
            return nn.functional.linear(args[0], args[1], _no_bias(args[1]))
        if func in (torch.flatten, Tensor.flatten):
            shape = [int(size) for size in func(*args, **kwargs).shape]
            return args[0].reshape(shape)
        return func(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what the exporters say of their own insides; errors still come."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _without_graphs(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=TracerWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="Constant folding - ")  # of every padding
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_graphs() -> Iterator[None]:
    """Keeps torch from printing the graph of what the older exporter cannot write.

    ``setup_onnx_logging`` (torch/onnx/_internal/torchscript_exporter/utils.py) tests a function that it means
    to call, so every export turns that log on, for good: here it is off, and stays off until this ends.
    """
    turn = getattr(torch._C, _LOG_SWITCH, None)
    if turn is None:  # a torch without the older exporter
        yield
        return
    before = torch._C._jit_is_onnx_log_enabled()
    turn(False)
    setattr(torch._C, _LOG_SWITCH, lambda _: None)
    try:
        yield
    finally:
        setattr(torch._C, _LOG_SWITCH, turn)
        turn(before)


_LOG_SWITCH = "_jit_set_onnx_log_enabled"


def _bias(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return args[2] if len(args) > 2 else kwargs.get("bias")


def _no_bias(weight: Tensor) -> Tensor:
    """Zeros, which tracing takes for a constant."""
    return torch.from_numpy(np.zeros(len(weight), dtype=np.float32))


# ---- graphs


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """What follows from constants of whole numbers worked out, and no zeros that mean nothing.

    The older exporter works the widths of a padding out of a list by six operators; a matrix product without
    a bias has one of zeros from `_AsDynamo`, for it writes another operator otherwise; and both write the
    value of some paddings that are of zeros anyway.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        given = [name for name in node.input if name]
        if node.op_type == "Constant" or (given and all(_is_whole(constants.get(name)) for name in given)):
            found = ReferenceEvaluator(node, opsets={"": _OPSET}).run(
                None, {name: constants[name] for name in given}
            )
            constants |= zip(node.output, map(np.asarray, found), strict=True)
            continue
        if node.op_type in ("Gemm", "Pad") and len(node.input) == 3 and _is_nothing(node.input[2], constants):
            del node.input[2:]
        kept.append(node)
    used = {name for node in kept for name in node.input}
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    graph = onnx.helper.make_graph(kept, "part", list(model.graph.input), list(model.graph.output), tensors)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _is_nothing(name: str, constants: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether an input was left out, or is zeros."""
    return not name or (name in constants and not constants[name].any())


def _is_whole(constant: npt.NDArray[Any] | None) -> bool:
    """Whether it is one, of whole numbers: a shape, axes or widths."""
    return constant is not None and constant.dtype.kind in "iub"


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants as initializers, no Identity, values named by their place, nothing but the graph."""
    graph = model.graph
    renamed: dict[str, str] = {"": ""}

    def number(name: str) -> str:
        return renamed.setdefault(name, f"v{len(renamed) - 1}")

    kept = []
    for tensor in graph.input:
        tensor.name = number(tensor.name)
    constants = list(graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants.append(node.attribute[0].t)
            constants[-1].name = node.output[0]
        elif node.op_type == "Identity" and node.output[0] not in {value.name for value in graph.output}:
            renamed[node.output[0]] = number(node.input[0])
        else:
            kept.append(node)
    for index, node in enumerate(kept):
        node.name = f"n{index}"
        node.input[:] = [number(name) for name in node.input]
        node.output[:] = [number(name) for name in node.output]
        del node.metadata_props[:]
        node.doc_string = ""
    for tensor in (*constants, *graph.output):
        tensor.name = number(tensor.name)
    new = onnx.helper.make_graph(kept, "part", list(graph.input), list(graph.output), constants)
    tidied = onnx.helper.make_model(new, opset_imports=model.opset_import, ir_version=model.ir_version)
    for value in (*new.input, *new.output, *new.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    onnx.checker.check_model(tidied)
    return tidied


def _ways(model: onnx.ModelProto) -> frozenset[Any]:
    """Which operators follow which."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    return frozenset(
        (node.op_type, tuple(made_by.get(name, "") for name in node.input)) for node in model.graph.node
    )


def _cover(ways: Mapping[str, frozenset[Any]]) -> list[str]:
    """A few of the names that have all ways between them: again and again the one that adds the most."""
    missing, chosen = set().union(*ways.values()), []
    while missing:
        chosen.append(max(ways, key=lambda name: len(ways[name] & missing)))
        missing -= ways[chosen[-1]]
    return chosen


def _grouped(names: Sequence[str], quick: Mapping[str, onnx.ModelProto]) -> Iterator[list[str]]:
    """The names in groups for one export by dynamo each: few enough, and with few enough operators."""
    group: list[str] = []
    operators = 0
    for name in names:
        size = len(quick[name].graph.node) if name in quick else 0
        if group and (len(group) == _GROUP or operators + size > _OPERATORS):
            yield group
            group, operators = [], 0
        group.append(name)
        operators += size
    if group:
        yield group


def _operators(model: onnx.ModelProto) -> list[Any]:
    """The operators with their attributes and what feeds them, in an order that names do not decide."""
    described: dict[str, Any] = {"": None}
    for index, value in enumerate(model.graph.input):
        described[value.name] = f"input {index}"
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        # Whole numbers are shapes and axes; others are weights, whose values differ.
        content = str(array.tolist()) if array.dtype.kind in "iub" else ""
        described[tensor.name] = f"{array.dtype}{list(array.shape)} {content}"
    operators = []
    for node in model.graph.node:
        inputs = [described[name] for name in node.input]
        text = f"{node.op_type} {_attributes(node)} {inputs}"
        operators.append(text)
        for index, name in enumerate(node.output):
            described[name] = hash((text, index))
    return sorted(operators)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """With defaults filled in; without what the weights' shapes say, or what a static shape leaves idle."""
    schema = onnx.defs.get_schema(node.op_type, _OPSET, node.domain)
    values = {
        name: onnx.helper.get_attribute_value(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }
    values |= {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    for idle in ("kernel_shape", "allowzero"):
        values.pop(idle, None)
    return dict(sorted(values.items()))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
