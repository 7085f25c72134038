"""ONNX models in INT8: static quantisation as pairs of Quantize and Dequantize (QDQ)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
from onnx.helper import tensor_dtype_to_np_dtype
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

Inputs = Mapping[str, Any]

_LEFT_BEHIND = {"onnx.infer", "onnx.quant.pre_process"}  # marks that the quantiser sets for itself


def quantise(model: bytes, batches: Iterable[Inputs], nodes: Sequence[str] | None = None) -> bytes:
    """The model with 8-bit weights and activations wherever ONNX Runtime can quantise an operator.

    Activations are unsigned with one scale a tensor, weights signed with one scale an output channel: of
    ONNX Runtime's formats the fastest on x86 (signed activations take half as long again there). The range of
    an activation is the smallest and the largest number that it has on the batches. BatchNorm must be folded,
    as `hwnas.export` does. Facts in ``metadata_props`` stay.

    Args:
        model: in fp32, with a name for every node.
        batches: real inputs, by the model's input names; the file's accuracy rests on these.
        nodes: names of the operators to quantise; None: all. What feeds them and what they feed is quantised
            and dequantised at the border.

    Raises:
        ValueError: no batch, or a node that the model does not have.
    """
    loaded = onnx.load_from_string(model)
    if nodes is not None:
        if unknown := sorted(set(nodes) - {node.name for node in loaded.graph.node}):
            raise ValueError(f"the model has no node {', '.join(unknown[:5])}; it cannot be quantised")
        if not nodes:  # to the quantiser an empty list says: all
            return model
    # Else it advises, on the root logger, to fold BatchNorm first.
    onnx.helper.set_model_props(loaded, {**_facts(loaded), "onnx.quant.pre_process": "onnxruntime.quant"})
    reader = _Reader(batches)
    with tempfile.TemporaryDirectory(prefix="lookup_tables-") as folder:
        given, made = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save(loaded, given)
        with _quiet():
            quantize_static(
                given,
                made,
                reader,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                nodes_to_quantize=None if nodes is None else list(nodes),
            )
        quantised = onnx.load(made)
    facts = {key: fact for key, fact in _facts(quantised).items() if key not in _LEFT_BEHIND}
    onnx.helper.set_model_props(quantised, facts)
    onnx.checker.check_model(quantised)
    return bytes(quantised.SerializeToString())


def quantise_untrained(model: bytes, nodes: Sequence[str] | None = None, seed: int = 0) -> bytes:
    """`quantise` on normal random numbers: a model of which nothing but the latency matters."""
    generator = np.random.default_rng(seed)
    inputs = {}
    for given in onnx.load_from_string(model).graph.input:
        tensor = given.type.tensor_type
        shape = [size.dim_value or 1 for size in tensor.shape.dim]
        dtype = tensor_dtype_to_np_dtype(tensor.elem_type)
        is_float = np.issubdtype(dtype, np.floating)
        numbers = generator.standard_normal(shape) if is_float else np.zeros(shape)
        inputs[given.name] = numbers.astype(dtype)
    return quantise(model, [inputs], nodes)


def quantised_nodes(model: bytes) -> set[str]:
    """Names of the operators of which at least one input, and so the arithmetic, is quantised."""
    graph = onnx.load_from_string(model).graph
    dequantised = {out for node in graph.node if node.op_type == "DequantizeLinear" for out in node.output}
    pairs = {"QuantizeLinear", "DequantizeLinear"}
    weights = {tensor.name for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}

    def is_weight(name: str) -> bool:
        node = made_by.get(name)
        return name in weights or (node is not None and node.input[0] in weights)

    found = set()
    for node in graph.node:
        if node.op_type in pairs:
            continue
        given = [name for name in node.input if name]
        has_weights = any(is_weight(name) for name in given)
        wanted = [name for name in given if is_weight(name)] if has_weights else given
        if wanted and all(name in dequantised for name in wanted):
            found.add(node.name)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back that a BatchNorm which stands alone has one scale, which is said once a weight."""
    root, nowhere = logging.getLogger(), logging.NullHandler()

    def is_for_users(record: logging.LogRecord) -> bool:
        return "is out-of-range for weight" not in record.getMessage()

    root.addFilter(is_for_users)
    root.addHandler(nowhere)  # else the quantiser's first line would set up the root logger
    try:
        yield
    finally:
        root.removeHandler(nowhere)
        root.removeFilter(is_for_users)


@final
class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Hands out the batches once."""

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self._left: Iterator[Inputs] = iter(batches)
        first = next(self._left, None)
        if first is None:
            raise ValueError("a static quantisation needs at least one batch of inputs; got none")
        self._first: Inputs | None = first

    def get_next(self) -> Inputs | None:
        first, self._first = self._first, None
        return first if first is not None else next(self._left, None)


def _facts(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}
