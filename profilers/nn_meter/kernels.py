"""Networks of kernels as ONNX models: what a builder measures, without torch."""

from __future__ import annotations

import math
import random
from typing import Any, final

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

_OPSET = 20
_STEPS = (8, 16)  # widths are multiples of one of them


@final
class Network:
    """An ONNX model that grows node by node; BatchNorm is folded, as it is in what is deployed.

    The names of node n and its output begin with ``p<n>.``, as in `lookup_tables.assembly`: in what a runtime
    makes of the model, each node is found again.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []
        self._inputs: dict[str, list[int]] = {}

    def input(self, *shape: int) -> str:
        name = f"input{len(self._inputs)}"
        self._inputs[name] = list(shape)
        return name

    def conv(self, x: str, cin: int, cout: int, ks: int, stride: int = 1, groups: int = 1) -> str:
        """With a bias and the padding that keeps the size, or halves it."""
        return self._node(
            "Conv",
            [x, self._weight(cout, cin // groups, ks, ks), self._weight(cout)],
            kernel_shape=[ks, ks],
            strides=[stride, stride],
            pads=[(ks - 1) // 2] * 4,
            group=groups,
        )

    def pool(self, x: str, kind: str, ks: int, stride: int) -> str:
        op = "AveragePool" if kind == "avgpool" else "MaxPool"
        pads = [(ks - 1) // 2] * 4
        return self._node(op, [x], kernel_shape=[ks, ks], strides=[stride, stride], pads=pads)

    def relu(self, x: str) -> str:
        return self._node("Relu", [x])

    def add(self, x: str, y: str) -> str:
        return self._node("Add", [x, y])

    def mean(self, x: str) -> str:
        """Over all positions: ``(1, C, H, W)`` to ``(1, C)``."""
        axes = numpy_helper.from_array(np.array([2, 3]), f"w{len(self._weights)}")
        self._weights.append(axes)
        return self._node("ReduceMean", [x, axes.name], keepdims=0)

    def linear(self, x: str, cin: int, cout: int) -> str:
        return self._node("Gemm", [x, self._weight(cout, cin), self._weight(cout)], transB=1)

    def model(self, output: str) -> bytes:
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in self._inputs.items()],
            [helper.make_empty_tensor_value_info(output)],
            self._weights,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)
        return bytes(shape_inference.infer_shapes(made, strict_mode=True).SerializeToString())

    def _weight(self, *shape: int) -> str:
        fan_in = math.prod(shape[1:]) or 1
        values = (self._random.standard_normal(shape) / fan_in**0.5).astype(np.float32)
        self._weights.append(numpy_helper.from_array(values, f"w{len(self._weights)}"))
        return self._weights[-1].name

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:  # any of ONNX's attribute types
        prefix = f"p{len(self._nodes)}."
        self._nodes.append(helper.make_node(op, inputs, [f"{prefix}v"], name=f"{prefix}n", **attributes))
        return f"{prefix}v"


def networks(count: int, resolution: int, channels: int, largest_macs: float, seed: int) -> list[bytes]:
    """Random networks of every kind of kernel, which follow no design that somebody would deploy.

    Each kernel follows another at random, so that a shape is met behind many others. The first networks go to
    the ends of the range with every kind: what lies beyond is not covered.

    Widths are multiples of 8: kernels of other widths take up to 10 times as long as their neighbours where a
    runtime works on blocks of channels, which is no smooth function of nn-Meter's features.

    Args:
        count: how many.
        resolution: of the images; feature maps are as large, or smaller.
        channels: of a layer, at most.
        largest_macs: of a kernel; corners of the range that no small network has are left out.
        seed: of the draws.
    """
    source = random.Random(seed)
    ends = [(resolution, min(_STEPS)), (math.ceil(resolution / 16), channels)]
    first = [_end(hw, width, largest_macs) for hw, width in ends]
    others = [_drawn(source, resolution, channels, largest_macs) for _ in range(count - len(first))]
    return [*first, *others][:count]


def _end(hw: int, width: int, largest_macs: float) -> bytes:
    """Every kind of kernel in turn, all of one size."""
    net = Network()
    x = first = net.relu(net.conv(net.input(1, width, hw, hw), width, width, 1))
    for pool in ("maxpool", "avgpool"):
        x = net.relu(net.add(net.pool(x, pool, 3, 1), first))
    x = net.relu(net.conv(x, width, width, 3, groups=width))
    if (width * 3 * hw) ** 2 <= largest_macs:
        x = net.relu(net.conv(x, width, width, 3))
    return net.model(net.linear(net.mean(net.relu(net.pool(x, "maxpool", 3, 1))), width, 10))


# How often each is drawn; what cannot follow is skipped.
_FOLLOWERS = {"conv": 8, "dense": 4, "dwconv": 6, "avgpool": 1, "maxpool": 1, "add": 5, "relu": 1}
_DEPTHS = (4, 20)  # least and most of them
_MEAN_OF = 8  # height: nn-Meter predicts the mean over all positions from its channels alone


def _drawn(source: random.Random, resolution: int, channels: int, largest_macs: float) -> bytes:
    """A first convolution, random kernels, and a classifier."""
    net = Network(source.randrange(2**31))
    hw = resolution if source.random() < 0.5 else source.randint(resolution // 2, resolution)
    images, width, stride = source.choice((1, 3)), _width(min(64, channels), source), source.choice((1, 2))
    x = net.conv(net.input(1, images, hw, hw), images, width, source.choice((3, 3, 5, 7)), stride)
    x, hw = net.relu(x), math.ceil(hw / stride)
    alike: list[str] = []  # tensors of the same shape that came before
    is_activated = True
    for _ in range(source.randint(*_DEPTHS)):
        (kind,) = source.choices(list(_FOLLOWERS), list(_FOLLOWERS.values()))
        has_window = kind in ("dense", "dwconv", "avgpool", "maxpool")
        stride = 2 if hw > 2 and has_window and source.random() < 0.3 else 1
        smaller, wide = math.ceil(hw / stride), width
        match kind:
            case "conv" | "dense":
                ks = 1 if kind == "conv" else source.choice((3, 3, 3, 5, 7))
                wide = width if source.random() < 0.25 else _width(channels, source)
                if width * wide * (ks * smaller) ** 2 > largest_macs:
                    continue
                made = net.conv(x, width, wide, ks, stride)
            case "dwconv":
                made = net.conv(x, width, width, source.choice((3, 5, 7)), stride, width)
            case "avgpool" | "maxpool":
                is_even = stride == 2 and hw % 2 == 0 and source.random() < 0.5
                made = net.pool(x, kind, 2 if is_even else 3, stride)
            case "add" if alike and not is_activated:
                made = net.add(x, source.choice(alike))
            case "relu" if not is_activated:
                made = x
            case _:
                continue
        is_activated = kind == "relu" or (not kind.endswith("pool") and source.random() < 0.5)
        made = net.relu(made) if is_activated else made
        alike = [*alike, x] if (wide, smaller) == (width, hw) else []
        x, width, hw = made, wide, smaller
    while hw > _MEAN_OF:
        x, hw = net.pool(x, "maxpool", 3, 2), math.ceil(hw / 2)
    classes = source.choice((10, 10, 100, 1000, _width(channels, source)))
    return net.model(net.linear(net.mean(x), width, classes))


def _width(most: int, source: random.Random) -> int:
    """Small ones as likely as large ones."""
    step = source.choice(_STEPS)
    return step * max(1, round(math.pow(most / step, source.random())))
