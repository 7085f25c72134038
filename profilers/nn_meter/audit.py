"""What nn-Meter would be silently wrong about, found before it is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import onnx
from onnx import helper, numpy_helper, shape_inference

Shape = tuple[int, ...]

# They only name data anew: no runtime spends time on them.
VIEWS = {"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_WINDOWS = {"AveragePool", "Conv", "MaxPool"}
_LARGEST_CONCAT = 4


@final
class Graph:
    """The nodes of an ONNX model with their shapes, and what is wrong with each.

    nn-Meter knows of a kernel its input's height, channels, one side of its filter and one stride, and takes
    it for square, dense or depthwise, padded such that the size is kept or divided by the stride, and a
    batch of one. Whatever else a node is, nn-Meter predicts the time of another one.

    Args:
        model: with static shapes and named nodes.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = shape_inference.infer_shapes(model).graph
        self._shapes: dict[str, Shape] = {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in (*inferred.input, *inferred.value_info, *inferred.output)
        }
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes = {node.name: node for node in model.graph.node}
        found = {name: self._problem(node) for name, node in self._nodes.items()}
        self.problems: Mapping[str, str] = {name: text for name, text in found.items() if text}

    def is_free(self, names: Sequence[str]) -> bool:
        """Whether none of the nodes computes or moves anything."""
        return all(self._nodes[name].op_type in VIEWS for name in names)

    def macs(self, names: Sequence[str]) -> float:
        """Multiply-adds of these nodes' convolutions and matrix products."""
        return sum(self._macs(self._nodes[name]) for name in names)

    def layer(self, names: Sequence[str]) -> str:
        """A name for readers: ``Conv(16->24, 3x3) + Relu at 1x16x14x14``."""
        shown = [self._nodes[name] for name in names if self._nodes[name].op_type not in VIEWS]
        shown = shown or [self._nodes[name] for name in names]
        given = self._shapes.get(shown[0].input[0], ())
        return " + ".join(map(self._described, shown)) + f" at {'x'.join(map(str, given))}"

    def _described(self, node: onnx.NodeProto) -> str:
        if len(node.input) < 2 or node.input[1] not in self._weights:
            return str(node.op_type)
        shape = self._weights[node.input[1]].dims
        if node.op_type not in ("Conv", "ConvTranspose"):
            return str(node.op_type)
        given = self._shapes.get(node.input[0], (0, 0))[1]
        made = self._shapes.get(node.output[0], (0, 0))[1]
        return f"{node.op_type}({given}->{made}, {'x'.join(map(str, shape[2:]))})"

    def _macs(self, node: onnx.NodeProto) -> float:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return 0.0
        given = self._shapes.get(node.input[0], ())
        made = self._shapes.get(node.output[0], ())
        if node.op_type in ("Gemm", "MatMul"):
            return float(math.prod(made) * (given[-1] if given else 0))
        filters = math.prod(self._weights[node.input[1]].dims[1:]) if node.input[1] in self._weights else 0
        return float(math.prod(made if node.op_type == "Conv" else given) * filters)

    def _problem(self, node: onnx.NodeProto) -> str | None:
        """Why nn-Meter's number for a node would be that of another; None where it would not."""
        if node.op_type in VIEWS:
            return None
        given = [self._shapes[name] for name in node.input if name in self._shapes]
        made = [self._shapes[name] for name in node.output if name in self._shapes]
        for shape in (*given, *made):
            if len(shape) not in (2, 4) or min(shape) < 1:
                return f"has a tensor of shape {shape}; images (1, C, H, W) and vectors (1, C) are known"
            if shape[0] != 1:
                return f"runs on a batch of {shape[0]}; nn-Meter knows batches of 1"
            if len(shape) == 4 and shape[2] != shape[3]:
                return f"works on {shape[2]}x{shape[3]}; nn-Meter knows square tensors, by their height"
        if not given or not made:
            return "computes on constants alone, or on shapes that are not known"
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in _WINDOWS:
            return self._window_problem(node, attributes, given[0], made[0])
        if node.op_type == "Add" and (len(given) != 2 or given[0] != given[1] or len(given[0]) != 4):
            return f"adds tensors of shapes {given}; nn-Meter knows sums of two equal images"
        if node.op_type in ("Gemm", "MatMul") and (len(given) != 1 or len(given[0]) != 2):
            return f"multiplies tensors of shapes {given}; nn-Meter knows a vector by constant weights"
        if node.op_type == "Concat" and (attributes["axis"] != 1 or len(given) > _LARGEST_CONCAT):
            return (
                f"joins {len(given)} tensors along axis {attributes['axis']}; nn-Meter knows up to "
                f"{_LARGEST_CONCAT}, along channels"
            )
        if node.op_type == "ReduceMean" and self._axes(node, attributes, len(given[0])) != (2, 3):
            return "is not a mean over all positions of an image, for which nn-Meter takes it"
        return None

    def _window_problem(
        self, node: onnx.NodeProto, attributes: Mapping[str, Any], given: Shape, made: Shape
    ) -> str | None:
        is_conv = node.op_type == "Conv"
        if is_conv and node.input[1] not in self._weights:
            return "has filters that are computed; nn-Meter knows constant ones"
        window = tuple(self._weights[node.input[1]].dims[2:] if is_conv else attributes["kernel_shape"])
        strides = tuple(attributes.get("strides", (1, 1)))
        if len(set(window)) > 1 or len(set(strides)) > 1:
            return f"has a {window} window with strides {strides}; nn-Meter knows square ones, by one side"
        if any(dilation != 1 for dilation in attributes.get("dilations", ())):
            return f"is dilated by {tuple(attributes['dilations'])}; nn-Meter takes it for dense"
        groups = attributes.get("group", 1)
        if groups != 1 and not groups == given[1] == made[1]:
            return (
                f"has {groups} groups of {given[1]} -> {made[1]} channels; nn-Meter knows one group, or "
                "depthwise with as many outputs as inputs"
            )
        if made[2] != math.ceil(given[2] / strides[0]):
            return (
                f"makes {made[2]}x{made[2]} of {given[2]}x{given[2]} at stride {strides[0]}; nn-Meter knows "
                f"padding that makes {math.ceil(given[2] / strides[0])}"
            )
        return None

    def _axes(self, node: onnx.NodeProto, attributes: Mapping[str, Any], rank: int) -> tuple[int, ...]:
        axes = attributes.get("axes", ())
        if len(node.input) > 1 and node.input[1] in self._weights:
            axes = numpy_helper.to_array(self._weights[node.input[1]]).tolist()
        return tuple(sorted(axis % rank for axis in axes))
