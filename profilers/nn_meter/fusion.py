"""Which operators ONNX Runtime runs as one, read from the graphs that it makes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime

from lookup_tables import SessionSettings
from profilers.nn_meter.kernels import Network

_HW, _CHANNELS = 14, 64
_Body = Callable[[Network, str], str]


def _conv(net: Network, x: str) -> str:
    return net.conv(x, _CHANNELS, _CHANNELS, 3)


def _dwconv(net: Network, x: str) -> str:
    return net.conv(x, _CHANNELS, _CHANNELS, 3, groups=_CHANNELS)


def _sum(net: Network, x: str) -> str:
    return net.add(x, net.pool(x, "maxpool", 3, 1))


# Two operators that follow one another, and how many compute if neither joins the other.
_PAIRS: dict[str, tuple[_Body, int]] = {
    "conv_relu": (lambda net, x: net.relu(_conv(net, x)), 2),
    "dwconv_relu": (lambda net, x: net.relu(_dwconv(net, x)), 2),
    "conv_add": (lambda net, x: net.add(_conv(net, x), _conv(net, x)), 3),
    "dwconv_add": (lambda net, x: net.add(_dwconv(net, x), _dwconv(net, x)), 3),
    "add_relu": (lambda net, x: net.relu(_sum(net, x)), 3),
    "avgpool_relu": (lambda net, x: net.relu(net.pool(x, "avgpool", 3, 1)), 2),
    "maxpool_relu": (lambda net, x: net.relu(net.pool(x, "maxpool", 3, 1)), 2),
}


def fusion_rules(settings: SessionSettings) -> bytes:
    """nn-Meter's ``fusion_rules.json`` of ONNX Runtime.

    nn-Meter tells fusion from times, which noise can turn; here the runtime is asked for the graph that it
    would run, and its nodes are counted.

    Args:
        settings: of the sessions: other levels of optimisation fuse otherwise.
    """
    rules: dict[str, dict[str, object]] = {"MON": {"obey": 0}, "FN": {"obey": True}}
    for pair, (body, apart) in _PAIRS.items():
        net = Network()
        model = net.model(body(net, net.input(1, _CHANNELS, _HW, _HW)))
        rules[f"BF_{pair}"] = {"obey": _computing_nodes(model, settings) < apart}
    return json.dumps(rules, indent=1).encode()


def _computing_nodes(model: bytes, settings: SessionSettings) -> int:
    """Without those that only bring data into another layout."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "optimised.onnx"))
        options = settings.options()
        options.optimized_model_filepath = path
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(path).graph.node
    return sum(not node.op_type.startswith("Reorder") for node in nodes)
