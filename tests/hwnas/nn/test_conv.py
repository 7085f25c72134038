from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import ModelSpace, ValueChoice, condition
from hwnas.nn import Conv1d, Conv2d, Conv3d, ConvTranspose2d
from tests.contracts.mixed_operation import Arguments, MixedOperationContract, choice

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

NARROW = {"in_channels": 8, "out_channels": 8, "kernel_size": 3}


def on_axes(size: Any, axes: int) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,) * axes


@st.composite
def channels(draw: st.DrawFn, mixed: bool) -> Arguments:
    """Channels and groups of which every outcome is valid."""
    width = choice(draw, "in", [4, 8, 12])
    out = choice(draw, "out", [4, 8, 16])
    kinds: dict[str, Arguments] = {
        "dense": {"in_channels": width, "out_channels": out, "groups": 1},
        "depthwise": {"in_channels": width, "out_channels": width, "groups": width},
        "multiplied": {"in_channels": width, "out_channels": width * 2, "groups": width},
        "grouped by 4": {"in_channels": width, "out_channels": width // 2, "groups": width // 4},
    }
    if not mixed:
        kinds["grouped"] = {"in_channels": width, "out_channels": out, "groups": 4}
        groups = choice(draw, "groups", [1, 2, 4])
        kinds["groups chosen"] = {"in_channels": width, "out_channels": out, "groups": groups}
    return kinds[draw(st.sampled_from(list(kinds)))]


class ConvolutionContract(MixedOperationContract, ABC):
    """Promises in any number of dimensions."""

    axes: ClassVar[int]
    size: ClassVar[int]
    transposed: ClassVar[bool] = False

    def kernels(self) -> st.SearchStrategy[Any]:
        """Lists of kernel sizes: plain, even, and one size an axis."""
        tuples = [tuple(3 if axis == turn else 1 for axis in range(self.axes)) for turn in range(self.axes)]
        return st.sampled_from([[1, 3, 5], [2, 3, 4], [*tuples, 3], [(3,) * self.axes, (5,) * self.axes]])

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        whole = state["weight"]
        n_in, n_out, groups = sizes["in_channels"], sizes["out_channels"], sizes["groups"]
        cut = (
            [slice(n_in), slice(n_out // groups)]
            if self.transposed
            else [slice(n_out), slice(n_in // groups)]
        )
        for largest, size in zip(whole.shape[2:], on_axes(sizes["kernel_size"], self.axes), strict=True):
            cut.append(slice((largest - size) // 2, (largest - size) // 2 + size))
        parts = {"weight": whole[tuple(cut)]}
        return {**parts, "bias": state["bias"][:n_out]} if "bias" in state else parts

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        sides = (self.size + axis for axis in range(self.axes))
        return (torch.randn(2, sizes["in_channels"], *sides, dtype=torch.double),)

    def refused_arguments(self) -> Sequence[Arguments]:
        given = [
            {"stride": ValueChoice([1, 2], label="c")},
            {"dilation": ValueChoice([1, 2], label="c")},
            {"groups": ValueChoice([1, 2], label="c")},
            {"groups": 2, "out_channels": ValueChoice([8, 16], label="c")},
            {"kernel_size": ValueChoice([2, 3], label="c")},
            {"kernel_size": ValueChoice([3, 5], label="c"), "padding": 1},
            {"padding": ValueChoice([0, 1], label="c")},
        ]
        return [{**NARROW, **some} for some in given]


class PlainConvolutionContract(ConvolutionContract, ABC):
    """Promises of those that are not transposed."""

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            kernel = choice(draw, "kernel", draw(self.kernels()))
            is_number = not isinstance(getattr(kernel, "options", (kernel,))[-1], tuple) and not isinstance(
                getattr(kernel, "options", (kernel,))[0], tuple
            )
            same = draw(st.booleans())
            pads = [0, 1, (2, *(1,) * (self.axes - 1)), "valid", *([kernel // 2] if is_number else [])]
            return {
                **draw(channels(mixed=False)),
                "kernel_size": kernel,
                "stride": 1 if same else choice(draw, "stride", [1, 2, (2, *(1,) * (self.axes - 1))]),
                "padding": choice(draw, "padding", ["same", "valid", 0, 1])
                if same
                else draw(st.sampled_from(pads)),
                "dilation": choice(draw, "dilation", [1, 2]),
                "bias": draw(st.booleans()),
                "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
            }

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            kernel = choice(draw, "kernel", draw(st.sampled_from([[1, 3, 5], [3, 5]])))
            dilation = draw(st.sampled_from([1, 2]))
            first: Any = kernel
            half: Any = kernel // 2 * dilation
            if draw(st.booleans()):  # one axis of the kernel alone is chosen
                first = (kernel, *(2,) * (self.axes - 1))
                half = (half, *(1,) * (self.axes - 1))
            stride = draw(st.sampled_from([1, 2]))
            return {
                **draw(channels(mixed=True)),
                "kernel_size": first,
                "stride": stride,
                "padding": "same" if stride == 1 and draw(st.booleans()) else half,
                "dilation": dilation,
                "bias": draw(st.booleans()),
                "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
            }

        return drawn()

    def refused_arguments(self) -> Sequence[Arguments]:
        kernel = ValueChoice([3, 5], label="c")
        return [
            *super().refused_arguments(),
            {**NARROW, "kernel_size": ValueChoice([2, 4], label="c"), "padding": "same"},
            {**NARROW, "kernel_size": kernel, "padding": "valid"},
        ]


class TestConv1d(PlainConvolutionContract):
    operation, plain, axes, size = Conv1d, nn.Conv1d, 1, 11


class TestConv2d(PlainConvolutionContract):
    operation, plain, axes, size = Conv2d, nn.Conv2d, 2, 10


class TestConv3d(PlainConvolutionContract):
    operation, plain, axes, size = Conv3d, nn.Conv3d, 3, 9


class TestConvTranspose2d(ConvolutionContract):
    operation, plain, axes, size = ConvTranspose2d, nn.ConvTranspose2d, 2, 4
    transposed = True

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            return {
                **draw(channels(mixed=False)),
                "kernel_size": choice(draw, "kernel", draw(self.kernels())),
                "stride": choice(draw, "stride", [2, 3, (2, 3)]),
                "padding": choice(draw, "padding", [0, 1, (1, 0)]),
                "output_padding": choice(draw, "output_padding", [0, 1, (0, 1)]),
                "dilation": choice(draw, "dilation", [1, 2]),
                "bias": draw(st.booleans()),
            }

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            kernel = choice(draw, "kernel", draw(st.sampled_from([[1, 3, 5], [3, 5]])))
            dilation = draw(st.sampled_from([1, 2]))
            half = kernel // 2 * dilation
            size, padding = draw(st.sampled_from([(kernel, half), ((kernel, 2), (half, 1))]))
            return {
                **draw(channels(mixed=True)),
                "kernel_size": size,
                "stride": draw(st.sampled_from([1, 2])),
                "padding": padding,
                "dilation": dilation,
                "bias": draw(st.booleans()),
            }

        return drawn()

    def refused_arguments(self) -> Sequence[Arguments]:
        changes = {"stride": 2, "output_padding": ValueChoice([0, 1], label="c")}
        return [*super().refused_arguments(), {**NARROW, **changes}]


@pytest.mark.parametrize(("option", "size"), [(2, 9), (3, 8)])
def test_transposed_convolution_takes_an_output_size_under_every_option(option: int, size: int) -> None:
    kernel = ValueChoice([2, 3], label="kernel")
    conv = ConvTranspose2d(4, 4, kernel, stride=2, padding=kernel // 3)
    space = ModelSpace(conv)
    x = torch.randn(1, 4, 4, 4)
    with space.running(space.gates_of({"kernel": option})):
        output = space(x, output_size=[size, size])
    assert output.shape[2:] == (size, size)
    torch.testing.assert_close(output, space.freeze({"kernel": option})(x, output_size=[size, size]))


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by groups in every combination of options; got 6, 8 and"):
        Conv2d(ValueChoice([6, 8], label="width"), 8, 3, groups=4)


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "kernel_size"])
@pytest.mark.parametrize("size", [8.0, 0, (3, -1), "same"])
def test_sizes_that_are_none_are_refused_by_name(name: str, size: Any) -> None:
    value = ValueChoice([4, size], label="c")
    with pytest.raises(ValueError, match=rf"{name} must be whole, and from 1 up, .* can be .*hwnas\.to_int"):
        Conv2d(**{**NARROW, name: value})


def test_argument_that_cannot_be_a_value_is_refused_by_name() -> None:
    with pytest.raises(
        TypeError, match=r"bias cannot be a value; in_channels, .* can\. Got bias=ValueChoice"
    ):
        Conv2d(4, 4, 3, bias=ValueChoice([False, True], label="c"))  # type: ignore[arg-type]


def test_two_objects_with_one_label_are_one_decision_of_a_depthwise_convolution() -> None:
    widths = [ValueChoice([8, 12], label="width") for _ in range(3)]
    conv = Conv2d(widths[0], widths[1], 3, groups=widths[2])
    conv.check_can_mix()
    assert ModelSpace(conv).freeze({"width": 12}).weight.shape == (12, 1, 3, 3)


def test_held_weight_fits_every_outcome_whose_groups_divide_nothing_else() -> None:
    # 5 channels a group under one option, 4 under the other: no number of groups has both.
    width = ValueChoice([5, 12], label="width")
    conv = Conv2d(width, 15, 1, groups=condition(width > 5, 3, 1))
    space = ModelSpace(conv)
    assert space.freeze({"width": 5}).weight.shape == (15, 5, 1, 1)
    assert space.freeze({"width": 12}).weight.shape == (15, 4, 1, 1)


def test_convolution_without_a_choice_is_the_plain_one() -> None:
    conv = Conv2d(4, 8, 3, padding=1, groups=2)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1, groups=2))
    assert conv.weight.shape == nn.Conv2d(4, 8, 3, groups=2).weight.shape


def test_choices_are_printed() -> None:
    printed = repr(Conv2d(3, ValueChoice([4, 8], label="width"), 3))
    assert printed == (
        "Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), out_channels=ValueChoice([4, 8], label='width'))"
    )
