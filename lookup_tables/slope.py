"""Chains of a part: what each further copy adds is the part's own time, without the session's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lookup_tables.assembly import PartCall, Wiring, assembled

COPIES = 5
_OPSET = 20  # of the parts


def chains(part: bytes) -> tuple[bytes, bytes]:
    """A model of one copy of a part, and one of five; a quarter of their difference is the part's time.

    A part whose output can be its first input is run five times in a row. Others stand side by side, each on
    an input of its own (on one input, a runtime would make one of all that have no weights), and of each
    output one number is read and returned, so that none is dead. The model of one copy has the same inputs
    and reads as many numbers, of the inputs that it does not use otherwise: inputs, readings and outputs
    cancel in the difference. What does not is bringing data into the layout of the part's kernels and back,
    which a chain does once and copies side by side do each.

    Args:
        part: as `lookup_tables.to_onnx` writes it.
    """
    graph = onnx.load_from_string(part).graph
    first, *others = graph.input
    parts = {"part": part}
    shared = tuple(range(COPIES, COPIES + len(others)))
    new = COPIES + len(others)  # numbers of tensors from here on are free
    if len(graph.output) == 1 and _shape(first) == _shape(graph.output[0]):
        inputs = (0, *shared)
        calls = [PartCall("part", inputs, (new,))]
        while len(calls) < COPIES:
            calls.append(PartCall("part", (calls[-1].outputs[0], *shared), (new + len(calls),)))
        return tuple(  # type: ignore[return-value]  # of two
            assembled(Wiring(inputs, tuple(calls[:count]), calls[count - 1].outputs), parts)
            for count in (1, COPIES)
        )
    models = []
    for count in (1, COPIES):
        calls, outputs, number = [], [], new
        for copy in range(COPIES):
            seen, values = (copy,) * len(graph.output), [first] * len(graph.output)
            if copy < count:
                seen, values = tuple(range(number, number + len(graph.output))), list(graph.output)
                number += len(seen)
                calls.append(PartCall("part", (copy, *shared), seen))
            for index, (tensor, value) in enumerate(zip(seen, values, strict=True)):
                key = f"read {_shape(value)} {copy * len(seen) + index}"
                parts[key] = _reads_one(value, copy * len(seen) + index)
                calls.append(PartCall(key, (tensor,), (number,)))
                outputs.append(number)
                number += 1
        models.append(assembled(Wiring((*range(COPIES), *shared), tuple(calls), tuple(outputs)), parts))
    return models[0], models[1]


def _shape(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
    of = value.type.tensor_type
    return of.elem_type, *(dimension.dim_value for dimension in of.shape.dim)


def _reads_one(value: onnx.ValueInfoProto, index: int) -> bytes:
    """A model that returns one number of a tensor, another one for another index where there is one."""
    kind, *shape = _shape(value)
    place = np.unravel_index(index % max(1, int(np.prod(shape))), shape)
    bounds = {"starts": np.array(place, dtype=np.int64), "ends": np.array(place, dtype=np.int64) + 1}
    graph = helper.make_graph(
        [helper.make_node("Slice", ["tensor", *bounds], ["number"])],
        "read",
        [helper.make_tensor_value_info("tensor", kind, shape)],
        [helper.make_tensor_value_info("number", kind, [1] * len(shape))],
        [numpy_helper.from_array(numbers, name) for name, numbers in bounds.items()],
    )
    opset = helper.make_opsetid("", _OPSET)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
