"""Kernels and networks of kernels as ONNX models: what a builder measures, without torch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

_OPSET = 20
# Each with its share of the kernels that are measured.
SHARES = {
    "conv-bn-relu": 0.40,
    "dwconv-bn-relu": 0.20,
    "avgpool": 0.10,
    "maxpool": 0.08,
    "relu": 0.05,
    "add": 0.05,
    "addrelu": 0.05,
    "fc": 0.04,
    "global-avgpool": 0.03,
}
_FEWEST = 12  # of each kind
_STEP = 8  # widths are multiples of it


@final
@dataclass(frozen=True)
class Kernel:
    """One kernel, in the quantities of nn-Meter: square, a batch of one.

    Attributes:
        kind: name of the predictor that it trains, such as ``"conv-bn-relu"``.
        hw: height and width of the input.
        cin, cout: channels of the input and of the output.
        ks: height and width of the filter or window.
        stride: in both directions.
        is_activated: whether a convolution is followed by ReLU.
    """

    kind: str
    hw: int
    cin: int
    cout: int
    ks: int = 1
    stride: int = 1
    is_activated: bool = True

    @property
    def macs(self) -> float:
        """Multiply-adds, for bounding what is measured."""
        filters = {"conv-bn-relu": self.cin * self.cout, "dwconv-bn-relu": self.cin}.get(self.kind, 0)
        return filters * self.ks**2 * math.ceil(self.hw / self.stride) ** 2


def sampled(count: int, resolution: int, channels: int, largest_macs: float, seed: int) -> list[Kernel]:
    """Different kernels of every kind, small ones as likely as large ones.

    Widths are multiples of 8, but for the images of a first layer and for the classes: kernels of other
    widths take up to 10 times as long as their neighbours where a runtime works on blocks of channels, which
    is no smooth function of nn-Meter's features; and networks do not have them.

    Args:
        count: how many.
        resolution: of the images; feature maps are as large, or smaller.
        channels: at most.
        largest_macs: of a kernel; corners of the range that no small network has are left out.
        seed: of the draws.
    """
    source = random.Random(seed)
    found: list[Kernel] = []
    for kind, share in SHARES.items():
        wanted = max(_FEWEST, round(count * share))
        kernels: dict[Kernel, None] = {}
        # The ends of the range first: what lies beyond is not covered.
        ends = [(resolution, _STEP), (math.ceil(resolution / 16), channels)]
        while len(kernels) < wanted:
            hw, cin = ends.pop() if ends else (_size(resolution, source), _width(channels, source))
            kernel = _drawn(kind, hw, cin, channels, source)
            if kernel.macs <= largest_macs:
                kernels[kernel] = None
        found.extend(kernels)
    return found


def _size(resolution: int, source: random.Random) -> int:
    if source.random() < 0.7:  # as halving an image gives
        return math.ceil(resolution / (1 << source.randrange(5)))
    return source.randint(2, resolution)


def _width(channels: int, source: random.Random) -> int:
    return _STEP * max(1, round(math.pow(channels / _STEP, source.random())))


def _drawn(kind: str, hw: int, cin: int, channels: int, source: random.Random) -> Kernel:
    match kind:
        case "conv-bn-relu":
            ks = source.choice((1, 1, 1, 3, 3, 5, 7))
            if source.random() < 0.1:  # the first layer of a network
                cin, ks = source.choice((1, 3)), source.choice((3, 3, 5, 7))
            stride = 2 if ks > 1 and source.random() < 0.35 else 1
            return Kernel(kind, hw, cin, _width(channels, source), ks, stride, source.random() < 0.6)
        case "dwconv-bn-relu":
            return Kernel(kind, hw, cin, cin, source.choice((3, 5, 7)), source.choice((1, 1, 2)))
        case "fc":
            classes = source.choice((10, 100, 1000, _width(channels, source)))
            return Kernel(kind, 1, cin, 10 if cin in (_STEP, channels) else classes)  # at both ends: few
        case "avgpool" | "maxpool":
            if hw % 2 == 0 and source.random() < 0.4:
                return Kernel(kind, hw, cin, cin, 2, 2)
            return Kernel(kind, hw, cin, cin, 3, source.choice((1, 2)))
        case _:
            return Kernel(kind, hw, cin, cin)


@final
class Network:
    """An ONNX model that grows node by node; BatchNorm is folded, as it is in what is deployed."""

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
        number = len(self._nodes)
        self._nodes.append(helper.make_node(op, inputs, [f"v{number}"], name=f"n{number}", **attributes))
        return f"v{number}"


def kernel_model(kernel: Kernel) -> bytes:
    """The kernel alone."""
    net = Network()
    if kernel.kind == "fc":
        return net.model(net.linear(net.input(1, kernel.cin), kernel.cin, kernel.cout))
    shape = (1, kernel.cin, kernel.hw, kernel.hw)
    x = net.input(*shape)
    match kernel.kind:
        case "conv-bn-relu" | "dwconv-bn-relu":
            groups = kernel.cin if kernel.kind == "dwconv-bn-relu" else 1
            x = net.conv(x, kernel.cin, kernel.cout, kernel.ks, kernel.stride, groups)
            return net.model(net.relu(x) if kernel.is_activated else x)
        case "global-avgpool":
            return net.model(net.mean(x))
        case "avgpool" | "maxpool":
            return net.model(net.pool(x, kernel.kind, kernel.ks, kernel.stride))
        case "relu":
            return net.model(net.relu(x))
        case "add":
            return net.model(net.add(x, net.input(*shape)))
        case "addrelu":
            return net.model(net.relu(net.add(x, net.input(*shape))))
    raise ValueError(f"no such kernel: {kernel.kind!r}; there are {', '.join(SHARES)}")


def networks(count: int, resolution: int, channels: int, seed: int) -> list[bytes]:
    """Random whole networks of two families in turn, on which the sum of kernels is calibrated.

    Mobile inverted residuals (arXiv 1801.04381, with ReLU), and residual cells of convolutions, average pools
    and sums with the activation in front (as in NAS-Bench-201, arXiv 2001.00326).

    Args:
        count: how many.
        resolution: of the images.
        channels: of a layer, at most.
        seed: of the draws.
    """
    source = random.Random(seed)
    families = (_mobile, _cells)
    return [families[index % 2](source, resolution, channels) for index in range(count)]


def _mobile(source: random.Random, resolution: int, channels: int) -> bytes:
    net = Network(source.randrange(2**31))
    images, width = source.choice((1, 3)), source.choice((8, 16, 24))
    x = net.relu(net.conv(net.input(1, images, resolution, resolution), images, width, 3, 2))
    for stage in range(3):
        wider = source.choice((8, 16, 24, 32)) * 2**stage
        for layer in range(source.randint(1, 3)):
            stride = 2 if stage and not layer else 1
            hidden, ks = min(channels, width * source.choice((3, 6))), source.choice((3, 5, 7))
            y = net.relu(net.conv(x, width, hidden, 1))
            y = net.relu(net.conv(y, hidden, hidden, ks, stride, hidden))
            y = net.conv(y, hidden, wider, 1)
            x = net.add(x, y) if stride == 1 and width == wider else y
            width = wider
    head = min(channels, source.choice((128, 256, 512)))
    x = net.mean(net.relu(net.conv(x, width, head, 1)))
    return net.model(net.linear(x, head, 10))


def _cells(source: random.Random, resolution: int, channels: int) -> bytes:
    net = Network(source.randrange(2**31))
    width, hw = source.choice((8, 16, 24, 32)), resolution
    x = net.conv(net.input(1, 3, hw, hw), 3, width, 3)
    for stage in range(3):
        if stage:
            wider = min(channels, 2 * width)
            y = net.conv(net.relu(x), width, wider, 3, 2)
            y = net.conv(net.relu(y), wider, wider, 3)
            z = net.pool(x, "avgpool", 2 if hw % 2 == 0 else 3, 2)
            x, width, hw = net.add(y, net.conv(z, width, wider, 1)), wider, math.ceil(hw / 2)
        nodes = [x]
        for _ in range(3):
            edges = [_edge(net, node, width, source) for node in nodes]
            total = edges[0]
            for edge in edges[1:]:
                total = net.add(total, edge)
            nodes.append(total)
        x = nodes[-1]
    return net.model(net.linear(net.mean(net.relu(x)), width, 10))


def _edge(net: Network, x: str, width: int, source: random.Random) -> str:
    match source.choice(("skip", "conv1", "conv3", "avgpool")):
        case "conv1":
            return net.conv(net.relu(x), width, width, 1)
        case "conv3":
            return net.conv(net.relu(x), width, width, 3)
        case "avgpool":
            return net.pool(x, "avgpool", 3, 1)
        case _:
            return x
