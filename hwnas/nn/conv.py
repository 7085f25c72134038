"""The convolutions of ``torch.nn`` whose arguments may be values."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hwnas.nn.masked import masked
from hwnas.nn.mixed import (
    ONE_PATH,
    MixedOperation,
    blend,
    on_axes,
    presence,
    split,
    uninitialised,
)
from hwnas.values import Value, combinations, outcomes

Size = int | tuple[int | Value, ...] | Value
_ON_AXES = ("kernel_size", "stride", "padding", "dilation", "output_padding")


class _Convolution(MixedOperation, _ConvNd, ABC):
    """What the convolutions share, in any number of dimensions, transposed or not."""

    elastic: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )

    _plain: ClassVar[type[nn.Module]]

    def sizes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        axes = len(self.kernel_size)
        # Those that are fixed stand on every axis already.
        return super().sizes({n: on_axes(s, axes) if n in _ON_AXES else s for n, s in chosen.items()})

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        return uninitialised(
            type(self)._plain, **sizes, bias=self.bias is not None, padding_mode=self.padding_mode
        )

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        n_in, n_out, groups = sizes["in_channels"], sizes["out_channels"], sizes["groups"]
        channels = (n_in, n_out // groups) if self.transposed else (n_out, n_in // groups)
        kernel = _centre(sizes["kernel_size"], self.kernel_size)
        parts = {"weight": self.weight[(*map(slice, channels), *kernel)]}
        if self.bias is not None:
            parts["bias"] = self.bias[:n_out]
        return parts

    def check_can_mix(self) -> None:
        for name in ("stride", "dilation", "output_padding"):
            if name in self.undecided():
                raise ValueError(
                    f"options of {name} {self.values[name].all()} cannot be blended into one kernel: "
                    f"wrap the variants in a LayerChoice, or {ONE_PATH}"
                )
        every = [self.sizes(outcome) for outcome in outcomes(self.values)]
        is_dense = all(sizes["groups"] == 1 for sizes in every)
        thickness = {
            tuple(sizes[n] // sizes["groups"] for n in ("in_channels", "out_channels")) for sizes in every
        }
        if not is_dense and len(thickness) > 1:
            raise ValueError(
                "under mixing weights groups must be 1, or follow the channels so that in_channels / groups "
                "and out_channels / groups stay the same (depthwise: all three are one value); got groups "
                f"{sorted({sizes['groups'] for sizes in every})} of {sorted(thickness)} channels. Choose "
                f"between whole layers with a LayerChoice, or {ONE_PATH}"
            )
        # Centred kernels line up only where padding grows with the kernel's half.
        kernels = list(zip(*(sizes["kernel_size"] for sizes in every), strict=True))
        lines_up = all(len(set(axis)) == 1 or all(size % 2 for size in axis) for axis in kernels)
        offsets = {_offset(sizes) for sizes in every}
        changes = any(len(set(axis)) > 1 for axis in kernels)
        if not lines_up or len(offsets) > 1 or ("valid" in offsets and changes):
            pairs = list(dict.fromkeys((sizes["kernel_size"], sizes["padding"]) for sizes in every))
            raise ValueError(
                "kernels are blended around their centre: kernel sizes must be odd, and padding must be "
                "kernel_size // 2 (times dilation) plus a constant, or 'same'; got (kernel_size, padding) "
                f"{pairs}. Choose between whole layers with a LayerChoice, or {ONE_PATH}"
            )

    def _running(self) -> tuple[dict[str, Tensor], dict[str, Any], Tensor | None]:
        """Weight and bias, sizes, and the weight's mask if any, of this forward pass.

        The mask has the shape ``(fan_in, *kernel)``, with 1 in place of what is not masked.
        """
        sizes = self.running_sizes()
        parts = self.parts(sizes)
        # What the mask does not depend on is left out: its weights add up to 1.
        depends = ["in_channels", "groups"]
        if "kernel_size" in self.values and len(set(self.live_sizes("kernel_size"))) > 1:
            depends.append("kernel_size")
        found = combinations({name: self.values[name] for name in depends if name in self.values})
        if not found[0].is_mixed:
            return parts, sizes, None
        fan_ins = [
            c.values.get("in_channels", self.in_channels) // c.values.get("groups", self.groups)
            for c in found
        ]
        if "kernel_size" in depends:
            present = _present(self.live(found), fan_ins, sizes["kernel_size"], parts["weight"])
            return parts, sizes, blend(present, found).to(parts["weight"].dtype)
        channels = presence(fan_ins, found)
        if channels is None:
            return parts, sizes, None
        mask = channels.to(parts["weight"].dtype).reshape(-1, *(1 for _ in self.kernel_size))
        return parts, sizes, mask


class _ForwardConvolution(_Convolution, ABC):
    """A convolution that is not transposed, in any number of dimensions."""

    _function: ClassVar[Callable[..., Tensor]]

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
        given = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        values, largest = split(given, {"bias": bias, "padding_mode": padding_mode, **keywords})
        held = _held_groups(values, largest, "in_channels")
        super().__init__(**{**largest, "groups": held})
        self.groups = largest["groups"]
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            output: Tensor = super().forward(input)
            return output
        parts, sizes, mask = self._running()
        weight, bias = parts["weight"], parts.get("bias")
        padding = sizes["padding"]
        if self.padding_mode != "zeros":
            input = F.pad(input, _padding_amounts(sizes), mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        stride, dilation, groups = sizes["stride"], sizes["dilation"], sizes["groups"]

        def run(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return type(self)._function(input, weight, bias, stride, padding, dilation, groups)

        def to_input(gradient: Tensor, input: Tensor, weight: Tensor) -> Tensor:
            fixed = (None, stride, padding, dilation, False, [0] * len(self.kernel_size), groups)
            backward = torch.ops.aten.convolution_backward
            output: Tensor = backward(gradient, input, weight, *fixed, [True, False, False])[0]
            return output

        is_batched = input.ndim == len(self.kernel_size) + 2
        if mask is None:
            return run(input, weight, bias)
        if mask.shape[1:].numel() == 1 and is_batched and isinstance(padding, tuple):
            return masked(input, mask, weight, bias, run, to_input)
        return run(input, weight * mask, bias)


@final
class Conv1d(_ForwardConvolution, nn.Conv1d):
    """``torch.nn.Conv1d`` whose arguments may be values; all else as in `Conv2d`.

    Shapes: ``(N, in_channels, L)`` to ``(N, out_channels, L')``.
    """

    _plain = nn.Conv1d
    _function = staticmethod(F.conv1d)


@final
class Conv2d(_ForwardConvolution, nn.Conv2d):
    """``torch.nn.Conv2d`` whose arguments may be values.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``. Channels are taken from the
    front, kernels from the centre; an option of a size may be a tuple, and so may the argument, with values
    inside. A depthwise convolution takes one value for ``in_channels``, ``out_channels`` and ``groups``.

    Under mixing weights one blended kernel is convolved once (FBNetV2, arXiv 2004.05565): every option's
    kernel, padded to the largest, weighted. The input has its largest width and is masked here, at its
    consumer, by the expected presence of each channel; the output keeps its largest width. That equals
    the mixture of the sliced convolutions. Not so under mixed strides, dilations, or groups that do not
    follow the channels, which `check_can_mix` refuses.

    Raises:
        ValueError: channels that groups do not divide under some option.

    >>> from hwnas import ValueChoice
    >>> kernel = ValueChoice([3, 5], label="kernel")
    >>> Conv2d(8, ValueChoice([8, 16], label="width"), kernel, padding=kernel // 2).weight.shape
    torch.Size([16, 8, 5, 5])
    """

    _plain = nn.Conv2d
    _function = staticmethod(F.conv2d)


@final
class Conv3d(_ForwardConvolution, nn.Conv3d):
    """``torch.nn.Conv3d`` whose arguments may be values; all else as in `Conv2d`.

    Shapes: ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D', H', W')``.
    """

    _plain = nn.Conv3d
    _function = staticmethod(F.conv3d)


@final
class ConvTranspose2d(_Convolution, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` whose arguments may be values; all else as in `Conv2d`.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``. Mixed kernels line up where padding
    grows with the kernel's half, as in a convolution; ``output_padding`` cannot be mixed.
    """

    elastic = (*_Convolution.elastic, "output_padding")
    _plain = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: int | Value,
        out_channels: int | Value,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int | Value = 1,
        bias: bool = True,
        dilation: Size = 1,
        **keywords: Any,
    ) -> None:
        given = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": groups,
            "dilation": dilation,
        }
        values, largest = split(given, {"bias": bias, **keywords})
        held = _held_groups(values, largest, "out_channels")
        super().__init__(**{**largest, "groups": held})
        self.groups = largest["groups"]
        self.values = values

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self.values:
            return super().forward(input, output_size)
        parts, sizes, mask = self._running()
        weight = parts["weight"] if mask is None else parts["weight"] * mask.unsqueeze(1)
        padding = sizes["output_padding"]
        if output_size is not None:
            stride, pads, kernel, dilation = (
                list(sizes[name]) for name in ("stride", "padding", "kernel_size", "dilation")
            )
            padding = self._output_padding(input, output_size, stride, pads, kernel, 2, dilation)
        return F.conv_transpose2d(
            input,
            weight,
            parts.get("bias"),
            sizes["stride"],
            sizes["padding"],
            padding,
            sizes["groups"],
            sizes["dilation"],
        )


def _held_groups(values: Mapping[str, Value], largest: Mapping[str, Any], thinned: str) -> int:
    """Groups of the convolution that holds every outcome's weight.

    The weight of a grouped convolution has ``thinned / groups`` channels on one axis. The one that is held
    has as many as any outcome needs.

    Raises:
        ValueError: channels that groups do not divide.
    """
    every = [{**largest, **outcome} for outcome in outcomes(values)]
    for sizes in every:
        if sizes["in_channels"] % sizes["groups"] or sizes["out_channels"] % sizes["groups"]:
            raise ValueError(
                "in_channels and out_channels must be divisible by groups in every combination of "
                f"options; got {sizes['in_channels']}, {sizes['out_channels']} and {sizes['groups']}"
            )
    needed = max(sizes[thinned] // sizes["groups"] for sizes in every)
    common = math.gcd(largest["in_channels"], largest["out_channels"])
    return max(n for n in range(1, common + 1) if common % n == 0 and largest[thinned] // n >= needed)


def _centre(kernel: Sequence[int], held: Sequence[int]) -> Iterator[slice]:
    """Where a kernel lies in the middle of a larger one."""
    for size, largest in zip(kernel, held, strict=True):
        start = (largest - size) // 2
        yield slice(start, start + size)


def _present(
    live: Sequence[Mapping[str, Any]], fan_ins: Sequence[int], kernel: Sequence[int], weight: Tensor
) -> Tensor:
    """Which of the weights each outcome uses: 0/1, ``(outcomes, fan_in, *kernel)``."""
    present = torch.zeros(len(live), max(fan_ins), *kernel, device=weight.device)
    for row, sizes, fan_in in zip(present, live, fan_ins, strict=True):
        row[(slice(fan_in), *_centre(sizes["kernel_size"], kernel))] = 1.0
    # Channels that all outcomes have alike need no mask of their own.
    return present if len(set(fan_ins)) > 1 else present[:, :1]


def _offset(sizes: Mapping[str, Any]) -> tuple[int, ...] | str:
    """From the first place that the kernel's centre stands on, back to the input's edge."""
    if isinstance(sizes["padding"], str):
        return sizes["padding"]
    axes = zip(sizes["kernel_size"], sizes["dilation"], sizes["padding"], strict=True)
    return tuple(k // 2 * d - p for k, d, p in axes)


def _padding_amounts(sizes: Mapping[str, Any]) -> list[int]:
    """What to add before and after each axis, the last one first, where the padding is not of zeros."""
    padding = sizes["padding"]
    if padding == "valid":
        padding = (0,) * len(sizes["kernel_size"])
    amounts: list[int] = []
    for axis in reversed(range(len(sizes["kernel_size"]))):
        total = sizes["dilation"][axis] * (sizes["kernel_size"][axis] - 1)
        same = (total // 2, total - total // 2)
        amounts += same if padding == "same" else (padding[axis], padding[axis])
    return amounts
