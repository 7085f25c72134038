"""Latency tables that others published: blocks of ProxylessNAS and Once-for-All, operators of FBNet."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import yaml
from torch import Tensor, nn

from lookup_tables.operators import Operator, Shape, executed_operators

_POOLS = {"mean", "avg_pool2d", "_adaptive_avg_pool2d"}
_SHOWN = 3
_LARGEST = 1e300  # whole numbers beyond it are no floating point numbers


class PublishedTable(Protocol):
    """A table that was made elsewhere: it knows parts of networks by what they are, not by our digests."""

    @property
    def name(self) -> str: ...

    def time_us(self, module: nn.Module, inputs: Sequence[Tensor]) -> float:
        """What a module takes on inputs, in microseconds. Raises ``ValueError`` where it is not known."""
        ...


@final
@dataclass(frozen=True)
class BlockRecord:
    """The time of one block, in microseconds: mean and variance over ``count`` measurements."""

    mean_us: float
    variance_us2: float
    count: int


@final
@dataclass(frozen=True)
class BlockTable:
    """Whole blocks by the strings of ProxylessNAS and Once-for-All.

    A key is ``expanded_conv-input:HxWxC-output:HxWxC-expand:E-kernel:K-stride:S-idskip:R`` for an inverted
    residual (``E`` is the ratio); with ``-se:0|1-hs:0|1`` at its end (squeeze-excite, hard-swish) in
    Once-for-All's tables of MobileNetV3, where ``E`` counts the channels of the depthwise convolution.
    ``Conv``, ``Conv_1``, ``Conv_2``, ``AvgPool2D`` and ``Logits`` are the first convolution, the 1x1
    convolutions before and after pooling, the pooling, and the classifier with the pooling that stands in
    one module with it (mit-han-lab/once-for-all, ``ofa/nas/efficiency_predictor/latency_lookup_table.py``).

    Attributes:
        name: of the file.
        blocks: by key.
    """

    name: str
    blocks: Mapping[str, BlockRecord]

    @classmethod
    def load(cls, path: str | Path) -> BlockTable:
        """Reads YAML (or JSON) of ``key: {mean, count, var}``, milliseconds; the last two may be absent.

        Only plain data is read: a tag that would make an object is refused, never constructed.

        Raises:
            ValueError: the file is absent, no such table, or holds what is no time.
        """
        text = _text(path)
        try:
            raw = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(
                f"'{path}' is no table of plain YAML: {' '.join(str(error).split())}; a file that asks for "
                "Python objects is not loaded"
            ) from error
        if not isinstance(raw, dict) or not raw:
            raise ValueError(
                f"'{path}' must map block keys to records with a mean; it holds {reprlib.repr(raw)}"
            )
        blocks = {}
        for key, record in raw.items():
            if not isinstance(record, dict) or not isinstance(key, str):
                raise ValueError(
                    f"'{path}': {reprlib.repr(key)} must have a record with a mean, got "
                    f"{reprlib.repr(record)}"
                )
            mean = _positive(record.get("mean"), f"'{path}': mean of '{key}'")
            count, variance = record.get("count", 1), record.get("var", 0.0)
            is_number = isinstance(variance, int | float) and 0 <= variance < _LARGEST
            if type(count) is not int or count < 1 or not is_number:
                raise ValueError(
                    f"'{path}': '{key}' needs a count of at least 1 and a variance of at least 0, got "
                    f"{reprlib.repr(count)} and {reprlib.repr(variance)}"
                )
            blocks[key] = BlockRecord(mean * 1e3, float(variance) * 1e6, count)
        return cls(Path(path).name, blocks)

    def time_us(self, module: nn.Module, inputs: Sequence[Tensor]) -> float:
        key = block_key(
            executed_operators(module, inputs),
            tuple(inputs[0].shape),
            with_activation=any("-se:" in known for known in self.blocks),
        )
        if key not in self.blocks:
            kind = key.split("-")[0]
            near = [known for known in self.blocks if known.split("-")[0] == kind][:_SHOWN]
            raise ValueError(
                f"'{self.name}' has no '{key}'"
                + (f"; of this kind it has {', '.join(near)}, ..." if near else "")
            )
        return self.blocks[key].mean_us


def block_key(operators: Sequence[Operator], input_shape: Shape, with_activation: bool) -> str:
    """The string that ProxylessNAS and Once-for-All give to a block.

    Args:
        operators: that the block executes.
        input_shape: ``(N, C, H, W)``, or ``(N, C)`` before a classifier.
        with_activation: as in Once-for-All's tables of MobileNetV3.

    Raises:
        ValueError: it is none of the blocks that these tables know, or gets a batch of more than one image.
    """
    _check_plain(operators, input_shape)
    convs = [operator for operator in operators if operator.name == "convolution"]
    # Squeeze-excite works on means, where height and width are 1.
    main = [conv for conv in convs if conv.inputs[0][2:] != (1, 1)]
    depthwise = [conv for conv in main if conv.groups == conv.inputs[0][1] > 1]
    linears = [operator for operator in operators if operator.name in {"addmm", "mm"}]
    is_squeezed = len(convs) > len(main) or bool(linears)
    into = _size(input_shape)
    if len(depthwise) == 1 and len(main) in {2, 3} and main[-1].groups == 1:
        (depth,) = depthwise
        channels = depth.output[1]
        has_skip = any(o.name == "add" and o.inputs[:2] == (input_shape, input_shape) for o in operators)
        parts = [
            "expanded_conv",
            f"input:{into}",
            f"output:{_size(main[-1].output)}",
            f"expand:{channels if with_activation else round(channels / input_shape[1])}",
            f"kernel:{depth.inputs[1][2]}",
            f"stride:{depth.stride[0]}",
            f"idskip:{int(has_skip)}",
        ]
        if with_activation:
            is_hard_swish = any(operator.name == "hardswish" for operator in operators)
            parts += [f"se:{int(is_squeezed)}", f"hs:{int(is_hard_swish)}"]
        return "-".join(parts)
    if len(convs) == 1 and not linears:
        kernel = convs[0].inputs[1][2]
        name = "Conv" if kernel > 1 else "Conv_1" if main else "Conv_2"
        return f"{name}-input:{into}-output:{_size(convs[0].output)}"
    if len(linears) == 1 and not convs:
        return f"Logits-input:{into}-output:{linears[0].output[-1]}"
    pools = [operator for operator in operators if operator.name in _POOLS]
    if pools and not convs and not linears:
        return f"AvgPool2D-input:{into}-output:{_size((*input_shape[:2], 1, 1))}"
    raise ValueError(
        "tables of blocks know inverted residuals, single convolutions, pooling and a classifier; got "
        f"{', '.join(operator.name for operator in operators)} on {into}"
    )


def _check_plain(operators: Sequence[Operator], input_shape: Shape) -> None:
    """Refuses what a key does not tell apart."""
    if input_shape[0] != 1:
        raise ValueError(f"published tables are of batches of one image; got a batch of {input_shape[0]}")
    for operator in operators:
        if any(step != 1 for step in operator.dilation):
            raise ValueError(
                f"published tables have no dilated convolutions; got dilation {operator.dilation}"
            )
        if operator.name == "transposed_convolution":
            raise ValueError("published tables have no transposed convolutions")


OperatorKey = tuple[str, tuple[Shape, ...], int]

# Caffe2's operators by what they compute; an activation that is fused costs nothing of its own.
_FAMILIES = {
    **dict.fromkeys(("Conv", "ConvRelu", "Int8Conv", "Int8ConvRelu"), "convolution"),
    **dict.fromkeys(("FC", "Int8FC"), "linear"),
    **dict.fromkeys(("Add", "Sum", "Int8Add", "Int8Sum", "Int8AddRelu", "Int8SumRelu"), "add"),
    **dict.fromkeys(("AveragePool", "Int8AveragePool"), "pool"),
}
_FREE = {
    "native_batch_norm", "empty", "relu", "hardtanh", "dropout", "view", "_unsafe_view", "t", "detach",
    "squeeze", "unsqueeze", "expand", "alias", "clone",
}  # fmt: skip  # folded or fused into the operator before, or without work


@final
@dataclass(frozen=True)
class OperatorTable:
    """Single operators with the shapes of their inputs, as FBNet's and ChamNet's latency database.

    A part costs the sum of its convolutions, linear layers, additions and poolings; normalisation and ReLU
    are taken as folded into them (facebookresearch/mobile-vision, ``runtime_lut/code/lut_schema.py``).
    Departure from its matching: padding and output scales are not compared.

    Attributes:
        name: of the file.
        operators: microseconds by family, input shapes (images as N, H, W, C, weights as out, height,
            width, in / groups) and stride. Where a file has several records of one, it is their mean.
    """

    name: str
    operators: Mapping[OperatorKey, float]

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> OperatorTable:
        """Reads one JSON record a line.

        Args:
            path: of the file, unpacked.
            device: whose records are taken; None: there is only one.

        Raises:
            ValueError: the file is absent, no such table, of several devices, or holds what is no time.
        """
        found: dict[OperatorKey, list[float]] = {}
        devices: set[str] = set()
        for number, line in enumerate(_text(path).splitlines(), start=1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            try:
                record = json.loads(line)
                record = json.loads(record) if isinstance(record, str) else record
                family = _FAMILIES.get(record["op_type"])
                shapes = tuple(tuple(int(n) for n in shape) for shape in record["input_shapes"])
                stride = _argument(record["op_args"], "stride", 1)
                its_device = str(record["device"])
                is_channels_last = record["op_type"].startswith("Int8")
                normal = None if family is None else _normal(family, shapes, is_channels_last)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(f"{where} is no operator record: {error!r}") from error
            if device not in (None, its_device):
                continue
            devices.add(its_device)
            time = _positive(record.get("runtime_us_p50"), f"{where}: runtime_us_p50")
            if family is not None and normal is not None:
                key = (family, normal, stride)
                found.setdefault(key, []).append(time)
        if len(devices) > 1:
            raise ValueError(f"'{path}' holds records of {sorted(devices)}: name one as device=")
        if not found:
            raise ValueError(
                f"'{path}' holds no record of a known operator" + (f" on {device}" if device else "")
            )
        return cls(Path(path).name, {key: sum(times) / len(times) for key, times in found.items()})

    def time_us(self, module: nn.Module, inputs: Sequence[Tensor]) -> float:
        total = 0.0
        operators = executed_operators(module, inputs)
        _check_plain(operators, tuple(inputs[0].shape))
        for operator in operators:
            key = _operator_key(operator)
            if key is None:
                continue
            if key not in self.operators:
                family, shapes, stride = key
                raise ValueError(f"'{self.name}' has no {family} of {list(shapes)} with stride {stride}")
            total += self.operators[key]
        return total


def _operator_key(operator: Operator) -> OperatorKey | None:
    """None where it costs nothing of its own."""
    if operator.name in _FREE:
        return None
    if operator.name == "convolution":
        image, weight = operator.inputs[:2]
        return "convolution", _normal("convolution", (image, weight), False), operator.stride[0]
    if operator.name in {"addmm", "mm"}:
        rows, columns = operator.inputs[-2:]
        return "linear", _normal("linear", (rows, columns[::-1]), False), 1
    if operator.name == "add" and len(operator.inputs) == 2:
        return "add", _normal("add", operator.inputs, False), 1
    if operator.name in _POOLS:
        return "pool", _normal("pool", operator.inputs[:1], False), 1
    raise ValueError(f"a table of operators knows {sorted(set(_FAMILIES.values()))}; got {operator.name}")


def _normal(family: str, shapes: Sequence[Shape], is_channels_last: bool) -> tuple[Shape, ...]:
    """Channels last, without biases; a linear layer's input as rows."""
    count = {"convolution": 2, "linear": 2, "add": 2, "pool": 1}[family]
    kept = shapes[:count]
    if family == "linear":
        return (kept[0][0], kept[0][-1]), tuple(kept[1][:2])
    if is_channels_last:
        return tuple(kept)
    return tuple((shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape for shape in kept)


def _argument(arguments: Sequence[str], name: str, default: int) -> int:
    """An integer argument of Caffe2, each given as its text: ``name: "stride" i: 2``."""
    for text in arguments:
        if re.search(rf'name:\s*"{name}(_h|s)?"', text) and (
            value := re.search(r"\bi(?:nts)?:\s*(\d+)", text)
        ):
            return int(value.group(1))
    return default


def _size(shape: Shape) -> str:
    """Height x width x channels."""
    channels, *area = shape[1:]
    return "x".join(map(str, [*(area or (1, 1)), channels]))


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise ValueError(f"{where} must be a time above 0, got {reprlib.repr(value)}")
    return float(value)


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read '{path}' as a table: {error}") from error
