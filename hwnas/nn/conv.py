"""``torch.nn.Conv2d`` whose arguments may be values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.freezing import Freezer
from hwnas.nn.mixed import MixedOperation, blend
from hwnas.values import Combination, Value, outcomes

Size = int | tuple[int, int] | Value


@final
class Conv2d(MixedOperation, nn.Conv2d):
    """``torch.nn.Conv2d`` whose arguments may be values.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``. Channels are taken from the
    front, kernels from the centre. A depthwise convolution takes one value for ``in_channels``,
    ``out_channels`` and ``groups``.

    Under mixing weights one blended kernel is convolved once (FBNetV2, arXiv 2004.05565): every option's
    kernel, padded to the largest, weighted. The input has its largest width and is masked here, at its
    consumer, by the expected presence of each channel; the output keeps its largest width. That equals
    the mixture of the sliced convolutions. Not so under mixed strides, dilations, or groups other than 1
    and depthwise, which `check_can_mix` refuses.
    """

    def __init__(
        self,
        in_channels: int | Value,
        out_channels: int | Value,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int | Value = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        **keywords: Any,
    ) -> None:
        given: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        values = {name: value for name, value in given.items() if isinstance(value, Value)}
        largest = {
            name: _largest(value) if isinstance(value, Value) else value for name, value in given.items()
        }
        every = [{**largest, **outcome} for outcome in outcomes(values)]
        for sizes in every:
            if sizes["in_channels"] % sizes["groups"] or sizes["out_channels"] % sizes["groups"]:
                raise ValueError(
                    "in_channels and out_channels must be divisible by groups in every combination of "
                    f"options; got {sizes['in_channels']}, {sizes['out_channels']} and {sizes['groups']}"
                )
        # The weight of a grouped convolution is thinner: it has the largest fan-in of any outcome.
        fan_ins = [sizes["in_channels"] // sizes["groups"] for sizes in every]
        widest = largest["in_channels"] // max(fan_ins)
        super().__init__(**{**largest, "groups": widest}, bias=bias, padding_mode=padding_mode, **keywords)
        self.groups = largest["groups"]
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        found = self._combinations()
        sizes = self._sizes(found[0])
        if found[0].weight is None:
            weight = self._slice(sizes)
        else:
            live = [self._sizes(combination) for combination in found]
            sizes = {name: _greatest([outcome[name] for outcome in live]) for name in sizes}
            weight = self._slice(sizes)
            if "kernel_size" in self.values or ("in_channels" in self.values and weight.shape[1] > 1):
                weight = weight * blend(_presence(live, weight), found).to(weight.dtype)
        bias = None if self.bias is None else self.bias[: sizes["out_channels"]]
        padding = sizes["padding"]
        if self.padding_mode != "zeros":
            rows, columns = _padding_amounts(padding, sizes)
            input = F.pad(input, (*columns, *rows), mode=self.padding_mode)
            padding = 0
        return F.conv2d(input, weight, bias, sizes["stride"], padding, sizes["dilation"], sizes["groups"])

    def check_can_mix(self) -> None:
        for name in ("stride", "dilation"):
            if name in self.values:
                raise ValueError(
                    f"options of {name} {self.values[name].all()} cannot be blended into one kernel: "
                    "wrap the variants in a LayerChoice, or search with a strategy that runs one path "
                    "(RandomOneShot, ENAS)"
                )
        every = [{**self._fixed(), **outcome} for outcome in outcomes(self.values)]
        is_depthwise = all(o["groups"] == o["in_channels"] == o["out_channels"] for o in every)
        is_grouped = any(o["groups"] != 1 for o in every) and not is_depthwise
        if is_grouped and {"in_channels", "out_channels", "groups"} & self.values.keys():
            raise ValueError(
                "under mixing weights groups must be 1, or equal to in_channels and out_channels "
                f"(depthwise); got groups {sorted({o['groups'] for o in every})}. Choose between "
                "whole layers with a LayerChoice, or search with a strategy that runs one path "
                "(RandomOneShot, ENAS)"
            )
        if {"kernel_size", "padding"} & self.values.keys():
            # Centred kernels line up only where padding grows with the kernel's half.
            is_odd = all(k % 2 == 1 for o in every for k in _pair(o["kernel_size"]))
            offsets = {_offset(o) for o in every}
            if not is_odd or len(offsets) != 1 or "valid" in offsets:
                pairs = list(dict.fromkeys((o["kernel_size"], o["padding"]) for o in every))
                raise ValueError(
                    "kernels are blended around their centre: kernel sizes must be odd, and padding must be "
                    "kernel_size // 2 (times dilation) plus a constant, or 'same'; got (kernel_size, "
                    f"padding) {pairs}. Choose between whole layers with a LayerChoice, or search with a "
                    "strategy that runs one path (RandomOneShot, ENAS)"
                )

    def frozen(self, freezer: Freezer) -> nn.Conv2d:
        chosen = {name: value.of(freezer.architecture) for name, value in self.values.items()}
        sizes = {**self._fixed(), **chosen}
        plain = nn.Conv2d(**sizes, bias=self.bias is not None, padding_mode=self.padding_mode, device="meta")
        plain.weight = freezer.part(self.weight, self._slice(sizes))
        if self.bias is not None:
            plain.bias = freezer.part(self.bias, self.bias[: sizes["out_channels"]])
        return plain.train(self.training)

    def _fixed(self) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def _sizes(self, combination: Combination) -> dict[str, Any]:
        sizes = {**self._fixed(), **combination.values}
        if isinstance(sizes["padding"], str):
            return {**sizes, "kernel_size": _pair(sizes["kernel_size"])}
        pairs = ("kernel_size", "stride", "padding", "dilation")
        return {**sizes, **{name: _pair(sizes[name]) for name in pairs}}

    def _slice(self, sizes: dict[str, Any]) -> Tensor:
        (height, width), (high, wide) = _pair(sizes["kernel_size"]), self.kernel_size
        top, left = (high - height) // 2, (wide - width) // 2
        fan_in = sizes["in_channels"] // sizes["groups"]
        return self.weight[: sizes["out_channels"], :fan_in, top : top + height, left : left + width]


def _presence(live: list[dict[str, Any]], weight: Tensor) -> Tensor:
    """Which of the weights ``(·, fan_in, height, width)`` each outcome uses: 0/1, one row an outcome."""
    _, fan_in, height, width = weight.shape
    present = torch.zeros(len(live), fan_in, height, width, device=weight.device)
    for row, sizes in zip(present, live, strict=True):
        rows, columns = sizes["kernel_size"]
        top, left = (height - rows) // 2, (width - columns) // 2
        channels = sizes["in_channels"] // sizes["groups"]
        row[:channels, top : top + rows, left : left + columns] = 1.0
    return present


def _offset(sizes: dict[str, Any]) -> tuple[int, ...] | str:
    """From the first place that the kernel's centre stands on, back to the input's edge."""
    if isinstance(sizes["padding"], str):
        return str(sizes["padding"])
    axes = map(_pair, (sizes["kernel_size"], sizes["dilation"], sizes["padding"]))
    return tuple(k // 2 * d - p for k, d, p in zip(*axes, strict=True))


def _largest(value: Value) -> Any:
    return _greatest(value.all())


def _greatest(sizes: Sequence[Any]) -> Any:
    """The largest number, or the largest of each axis where a size is a pair."""
    if any(isinstance(size, tuple) for size in sizes):
        return tuple(max(_pair(size)[axis] for size in sizes) for axis in (0, 1))
    return max(sizes)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _padding_amounts(
    padding: str | tuple[int, int], sizes: dict[str, Any]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns to add (before, after) where the padding is not of zeros."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if isinstance(padding, tuple):
        return (padding[0], padding[0]), (padding[1], padding[1])
    totals = [d * (k - 1) for d, k in zip(_pair(sizes["dilation"]), sizes["kernel_size"], strict=True)]
    rows, columns = ((total // 2, total - total // 2) for total in totals)
    return rows, columns
