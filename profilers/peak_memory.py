"""How much memory a network's activations need at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import onnx
from onnx import shape_inference
from torch import Tensor, nn

from lookup_tables import to_onnx
from profilers.cost import Cost, CostTable
from profilers.profile import Profiler, every_option, parts_of
from profilers.space import Option, Part, Role, Space

# They hand their input's memory on.
_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"}
# They can write where an input was read that nothing needs any more.
_IN_PLACE = {
    "Abs", "Add", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log",
    "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh",
}  # fmt: skip


@final
@dataclass(frozen=True)
class PeakMemory:
    """The most that lies in memory at once.

    Attributes:
        bytes: of activations, inputs and outputs included; weights are not.
        at: the operator that runs then.
    """

    bytes: int
    at: str


def peak_memory(module: nn.Module, inputs: Sequence[Tensor]) -> PeakMemory:
    """The peak of a network's activations, exactly, by the liveness of tensors in its exported graph.

    Operators run in the graph's order. Each needs its inputs and its outputs at once; a tensor is dropped
    after its last use; the network's outputs stay. Element-wise operators write in place where an input of
    their output's size is not needed any more, views make nothing: as ONNX Runtime and TensorFlow Lite plan
    their buffers. What a kernel needs for itself (packed weights, im2col) is not known to the graph.

    Args:
        module: in evaluation mode, on the CPU or on ``meta``; weights' values are not read.
        inputs: of the shapes and types that it gets.

    Raises:
        ValueError: it cannot be run or exported.

    >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    >>> peak_memory(layers, [Tensor(1, 3, 10, 10)])  # (8 + 4) * 10 * 10 numbers of 4 bytes
    PeakMemory(bytes=4800, at='Conv')
    """
    model = onnx.load_from_string(to_onnx({"the network": (module, tuple(inputs))})["the network"])
    return graph_peak(model, ["dies"] * len(inputs))


def graph_peak(model: onnx.ModelProto, roles: Sequence[Role]) -> PeakMemory:
    """As `peak_memory`, of a graph of static shapes.

    Args:
        model: the graph.
        roles: of each of its inputs, as `profilers.space.Memory` has them.

    Raises:
        ValueError: a shape is not static, or the graph has not as many inputs as roles.
    """
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    if len(graph.input) != len(roles):
        raise ValueError(f"the graph has {len(graph.input)} inputs, {len(roles)} were expected")
    sizes = {value.name: _bytes(value) for value in (*graph.input, *graph.output, *graph.value_info)}
    last: dict[str, float] = {}
    for index, node in enumerate(graph.node):
        last.update(dict.fromkeys(filter(None, node.input), index))
    last.update({value.name: math.inf for value in graph.output})
    weights = {tensor.name for tensor in graph.initializer}
    buffers: dict[str, _Buffer] = {}
    for value, role in zip(graph.input, roles, strict=True):
        if role == "weight":
            weights.add(value.name)
        else:
            end = last.get(value.name, -1) if role == "dies" else math.inf
            buffers[value.name] = _Buffer(0 if role == "again" else sizes[value.name], end)
    peak = PeakMemory(sum(buffer.size for buffer in buffers.values()), "the inputs")
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant" or all(name in weights for name in node.input if name):
            weights.update(node.output)  # folded when the file is loaded
            continue
        given = [buffers[name] for name in node.input if name in buffers]
        for name in filter(None, node.output):
            if name not in sizes:
                raise ValueError(f"the shape of '{name}' ({node.op_type}) is not static")
            home = _home(node.op_type, given, sizes[name], index)
            if home is None:
                home = _Buffer(sizes[name], index)
            home.last = max(home.last, last.get(name, index))
            buffers[name] = home
        alive = {id(buffer): buffer.size for buffer in buffers.values() if buffer.last >= index}
        if sum(alive.values()) > peak.bytes:
            peak = PeakMemory(sum(alive.values()), node.op_type)
        buffers = {name: buffer for name, buffer in buffers.items() if buffer.last > index}
    return peak


@final
class PeakMemoryProfiler(Profiler):
    """The peak of every architecture's activations, in bytes: see `peak_memory`.

    A peak is a maximum over the parts that run one after another, no sum. ``profile`` gives it exactly. What
    a search needs is a sum, which ``cost`` is: with ``m_s`` what lies in memory while site ``s`` runs,

        cost(a) = limit_bytes + sum over s of max(0, m_s(a) - limit_bytes)

    It equals the limit where the peak keeps to it, and is at least the peak where it does not. So
    ``cost <= limit`` means exactly ``peak <= limit``, for filters, penalties and ``max_cost``; and
    ``cost.expected`` is differentiable and no less than the expectation of ``max(peak, limit)``.

    Args:
        space: the space.
        example_inputs: of the shapes that the network gets.
        limit_bytes: the most bytes that a network may need; the budget that this profiler is used with.

    Raises:
        ValueError: the limit is not above 0, or a part cannot be exported.

    >>> from hwnas import ModelSpace
    >>> from hwnas.spaces import SmallMobileNet
    >>> import torch
    >>> memory = PeakMemoryProfiler(
    ...     ModelSpace(SmallMobileNet()), torch.zeros(1, 1, 28, 28), limit_bytes=120_000
    ... )  # doctest: +SKIP
    >>> strategy = Proxyless(penalty=LagrangianPenalty(memory, baseline=memory.limit_bytes))  # doctest: +SKIP
    """

    def __init__(self, space: Space, *example_inputs: Tensor, limit_bytes: int) -> None:
        if not limit_bytes > 0:
            raise ValueError(f"a limit of memory is a number of bytes above 0; got {limit_bytes}")
        self.limit_bytes = limit_bytes
        sites, options = space.memory_sites(*example_inputs), every_option(space)
        combinations = [list(parts_of(space, site)) for site in sites]
        distinct = {p.key: p for parts in combinations for p in parts if p is not None and not p.is_free}
        files = to_onnx({key: (part.module, part.inputs) for key, part in distinct.items()})
        graphs = {key: onnx.load_from_string(file) for key, file in files.items()}
        peaks: dict[tuple[str, tuple[Role, ...]], int] = {}

        def moment(part: Part | None) -> float:
            """Bytes while the part runs."""
            if part is None or part.is_free:
                return 0.0
            assert part.memory is not None  # of memory_sites
            key = part.key, part.memory.inputs
            if key not in peaks:
                peaks[key] = graph_peak(graphs[part.key], part.memory.inputs).bytes
            return float(peaks[key] + part.memory.beside_bytes)

        moments = [
            CostTable(
                tuple(site.labels),
                np.array([moment(part) for part in parts]).reshape(
                    [len(options[label]) for label in site.labels]
                ),
            )
            for site, parts in zip(sites, combinations, strict=True)
        ]
        self._moments = [Cost(space.options, 0.0, [m], "byte", space.implied) for m in moments]
        over = [CostTable(m.labels, np.maximum(0.0, m.values - limit_bytes)) for m in moments]
        super().__init__(Cost(space.options, float(limit_bytes), over, "byte", space.implied))

    def profile(self, architecture: Mapping[str, Option]) -> float:
        """The peak of one architecture, in bytes.

        Raises:
            ValueError: a choice is missing, or has an option that does not exist.
        """
        return max(moment.of(architecture) for moment in self._moments)


@dataclass
class _Buffer:
    size: int
    last: float


def _home(kind: str, given: Sequence[_Buffer], size: int, index: int) -> _Buffer | None:
    """The input whose memory an output takes over."""
    if kind in _VIEWS:
        return given[0] if given else None
    if kind in _IN_PLACE:
        return next((buffer for buffer in given if buffer.last == index and buffer.size == size), None)
    return None


def _bytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    dimensions = [dimension.dim_value for dimension in tensor.shape.dim]
    if any(dimension < 1 for dimension in dimensions):
        raise ValueError(f"the shape of '{value.name}' is not static: {dimensions}")
    each = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return int(math.prod(dimensions) * each)
