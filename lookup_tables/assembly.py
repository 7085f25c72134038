"""Whole networks put together from exported parts: what each node belongs to is in its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import onnx
from onnx import numpy_helper


@final
@dataclass(frozen=True)
class PartCall:
    """One part of a network as it runs; tensors go by numbers, each of which one call makes.

    Attributes:
        key: digest of what is executed (`lookup_tables.executed_graph`).
        inputs: the tensors that the part is given.
        outputs: those that it makes.
    """

    key: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@final
@dataclass(frozen=True)
class Wiring:
    """Which parts a network runs, one after the other, and what feeds them.

    Attributes:
        inputs: numbers of the network's inputs. A tensor that is neither among them nor made by a call is
            a constant.
        calls: in the order in which they run.
        outputs: what the network returns.
    """

    inputs: tuple[int, ...]
    calls: tuple[PartCall, ...]
    outputs: tuple[int, ...]

    def live(self) -> tuple[PartCall, ...]:
        """The calls that the outputs depend on: a runtime drops the others, as dead code."""
        needed = set(self.outputs)
        kept = []
        for call in reversed(self.calls):
            if needed & set(call.outputs):
                needed |= set(call.inputs)
                kept.append(call)
        return tuple(reversed(kept))


def assembled(wiring: Wiring, parts: Mapping[str, bytes]) -> bytes:
    """The network as one ONNX model, made of its live calls' models.

    Nothing is exported anew: a part's nodes and tensors are copied under names that begin with ``p<n>.``,
    where n is the place of the part's call in ``wiring.live()``. Where a network's parts share no operator
    with one another, this is what the exporter writes of the whole. Each call has its own copy of the
    weights, as layers in a network have.

    Args:
        wiring: of the network.
        parts: each key's model, as `lookup_tables.to_onnx` writes it.

    Raises:
        ValueError: a part's model has other inputs or outputs than its call, a network's output is none of
            its parts', or models of different opsets.
    """
    names = {number: f"input{n}" for n, number in enumerate(wiring.inputs)}
    values = {}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    opsets: dict[str, int] = {}
    versions = []
    read = {call.key: onnx.load_from_string(parts[call.key]) for call in wiring.live()}
    for place, call in enumerate(wiring.live()):
        model = read[call.key]
        graph = model.graph
        if len(graph.input) != len(call.inputs) or len(graph.output) != len(call.outputs):
            raise ValueError(
                f"part {call.key} is called with {len(call.inputs)} tensors and gives {len(call.outputs)}; "
                f"its model has {len(graph.input)} inputs and {len(graph.output)} outputs"
            )
        opsets |= {opset.domain: opset.version for opset in model.opset_import}
        versions.append({opset.domain: opset.version for opset in model.opset_import})
        own = {"": ""}
        for number, given in zip(call.inputs, graph.input, strict=True):
            if number not in names:
                names[number] = f"constant{number}"
                constants.append(_constant(names[number], given))
            own[given.name] = names[number]
            values[number] = given
        for number, made in zip(call.outputs, graph.output, strict=True):
            names[number] = f"p{place}.{made.name}"
            values[number] = made
        for constant in graph.initializer:
            copied = onnx.TensorProto()
            copied.CopyFrom(constant)
            copied.name = own[constant.name] = f"p{place}.{constant.name}"
            constants.append(copied)
        for index, node in enumerate(graph.node):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"p{place}.n{index}"
            copy.input[:] = [own.get(name, f"p{place}.{name}") for name in node.input]
            copy.output[:] = [f"p{place}.{name}" if name else "" for name in node.output]
            nodes.append(copy)
    if any(version != opsets[domain] for found in versions for domain, version in found.items()):
        raise ValueError(f"parts of one network must be exported alike; their opsets are {versions}")
    if missing := [number for number in wiring.outputs if number not in values]:
        raise ValueError(f"the network returns {missing}, which none of its parts makes or takes")
    given, returned = (
        [_named(values[number], names[number]) for number in numbers if number in values]
        for numbers in (wiring.inputs, wiring.outputs)
    )
    graph = onnx.helper.make_graph(nodes, "network", given, returned, constants)
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(*found) for found in opsets.items()],
        ir_version=max((found.ir_version for found in read.values()), default=10),
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _named(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    named = onnx.ValueInfoProto()
    named.CopyFrom(value)
    named.name = name
    return named


def _constant(name: str, like: onnx.ValueInfoProto) -> onnx.TensorProto:
    """Normal numbers; zeros for integers, which may be indices."""
    of = like.type.tensor_type
    shape = [dimension.dim_value for dimension in of.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(of.elem_type)
    is_float = np.issubdtype(dtype, np.floating)
    numbers = np.random.default_rng(0).standard_normal(shape) if is_float else np.zeros(shape)
    return numpy_helper.from_array(numbers.astype(dtype), name)
