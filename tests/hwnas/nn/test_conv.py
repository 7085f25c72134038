from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import Gate, ModelSpace, ValueChoice
from hwnas.nn import Conv2d


def pair(size: Any) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def slice_of(conv: nn.Conv2d, chosen: dict[str, Any]) -> tuple[slice, ...]:
    """Reference: channels from the front, kernels from the centre."""
    cuts = [slice(chosen["out_channels"]), slice(chosen["in_channels"] // chosen["groups"])]
    for largest, size in zip(conv.weight.shape[2:], pair(chosen["kernel_size"]), strict=True):
        cuts.append(slice((largest - size) // 2, (largest - size) // 2 + size))
    return tuple(cuts)


def freshly_built(conv: Conv2d, chosen: dict[str, Any]) -> nn.Conv2d:
    plain = nn.Conv2d(**chosen, bias=conv.bias is not None, padding_mode=conv.padding_mode).double()
    with torch.no_grad():
        plain.weight.copy_(conv.weight[slice_of(conv, chosen)])
        if conv.bias is not None and plain.bias is not None:
            plain.bias.copy_(conv.bias[: chosen["out_channels"]])
    return plain


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a Conv2d, some of them choices; every combination is a valid torch.nn.Conv2d."""

    def maybe_choice(name: str, pool: list[Any]) -> Any:
        options = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True))
        return ValueChoice(options, label=name) if len(options) > 1 else options[0]

    channels = maybe_choice("in", [4, 8, 12])
    kind = draw(st.sampled_from(["dense", "grouped", "groups chosen", "depthwise"]))
    groups: Any = {"dense": 1, "grouped": 4, "depthwise": channels}.get(kind)
    kernel = maybe_choice("kernel", draw(st.sampled_from([[1, 3, 5], [2, 3, 4], [(1, 3), (3, 1), (5, 3)]])))
    is_square = isinstance(kernel, int) or (isinstance(kernel, ValueChoice) and kernel.options[0] in range(9))
    same = draw(st.booleans())
    halves = [kernel // 2] if is_square else []
    padding = "same" if same else draw(st.sampled_from([0, 1, (2, 1), "valid", *halves]))
    return {
        "in_channels": channels,
        "out_channels": channels if kind == "depthwise" else maybe_choice("out", [4, 8, 16]),
        "kernel_size": kernel,
        "stride": 1 if same else maybe_choice("stride", [1, 2, (1, 2)]),
        "padding": padding,
        "dilation": maybe_choice("dilation", [1, 2]),
        "groups": maybe_choice("groups", [1, 2, 4]) if groups is None else groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(arguments(), st.data())
@settings(deadline=None, max_examples=150)
def test_sampled_path_equals_freshly_built_convolution(given_arguments: dict[str, Any], data: Any) -> None:
    conv = Conv2d(**given_arguments).double()
    width = ValueChoice([1, 2], label="other")  # so that a space without a choice in the conv is one
    conv.other = width
    space = ModelSpace(conv)
    architecture = {label: data.draw(st.sampled_from(options)) for label, options in space.options.items()}
    sizes = {k: v for k, v in given_arguments.items() if k not in ("bias", "padding_mode")}
    chosen = {k: v.of(architecture) if hasattr(v, "of") else v for k, v in sizes.items()}
    plain = freshly_built(conv, chosen)
    x = torch.randn(2, chosen["in_channels"], 11, 13, dtype=torch.double, requires_grad=True)

    with space.running(space.gates_of(architecture)):
        output = space(x)
    expected = plain(x)
    torch.testing.assert_close(output, expected)

    cotangent = torch.randn_like(expected)
    to_x, to_weight = torch.autograd.grad(output, (x, conv.weight), cotangent)
    expected_to_x, expected_to_weight = torch.autograd.grad(expected, (x, plain.weight), cotangent)
    torch.testing.assert_close(to_x, expected_to_x)
    embedded = torch.zeros_like(conv.weight)
    embedded[slice_of(conv, chosen)] = expected_to_weight
    torch.testing.assert_close(to_weight, embedded)

    frozen = space.freeze(architecture)
    assert type(frozen) is nn.Conv2d
    torch.testing.assert_close(frozen(x), expected)


def mixing(space: ModelSpace, logits: dict[str, Tensor]) -> dict[str, Gate]:
    return {
        label: Gate(tuple(range(len(options))), logits[label].softmax(0))
        for label, options in space.options.items()
    }


def assert_blend_is_mixture(space: ModelSpace, x: Tensor) -> None:
    """One blended forward equals the weighted sum over all architectures, value and gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = {
        label: torch.randn(len(options), dtype=torch.double, generator=generator).requires_grad_()
        for label, options in space.options.items()
    }
    with space.running(mixing(space, logits)):
        blended = space(x)
    expected = torch.zeros_like(blended)
    for chosen in itertools.product(*(range(len(options)) for options in space.options.values())):
        weight = torch.ones((), dtype=torch.double)
        for label, index in zip(space.options, chosen, strict=True):
            weight = weight * logits[label].softmax(0)[index]
        options = zip(space.options.items(), chosen, strict=True)
        with space.running(space.gates_of({label: all_[index] for (label, all_), index in options})):
            path = space(x)
        expected = expected + weight * path
    torch.testing.assert_close(blended, expected, rtol=1e-12, atol=1e-12)

    parameters = [*logits.values(), *space.parameters()]
    cotangent = torch.randn_like(blended)
    found = torch.autograd.grad(blended, parameters, cotangent)
    brute = torch.autograd.grad(expected, parameters, cotangent)
    torch.testing.assert_close(found, brute, rtol=1e-10, atol=1e-11)


@given(
    st.sampled_from([[1, 3, 5], [3, 7], [(1, 3), (3, 1), (3, 5)]]),
    st.sampled_from(["same", "half"]),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
)
@settings(deadline=None, max_examples=40)
def test_blended_kernel_equals_weighted_sum_of_convolutions(
    kernels: list[Any], padding: str, mode: Any, dilation: int, groups: int
) -> None:
    kernel = ValueChoice(kernels, label="kernel")
    pads: Any = "same"
    if padding == "half" and isinstance(kernels[0], int):
        pads = kernel // 2 * dilation
    conv = Conv2d(4, 4, kernel, padding=pads, dilation=dilation, groups=groups, padding_mode=mode).double()
    conv.check_can_mix()
    assert_blend_is_mixture(ModelSpace(conv), torch.randn(2, 4, 10, 9, dtype=torch.double))


def test_strided_blended_kernel_equals_weighted_sum() -> None:
    kernel = ValueChoice([3, 5, 7], label="kernel")
    conv = Conv2d(4, 6, kernel, stride=2, padding=kernel // 2 - 1).double()
    conv.check_can_mix()
    assert_blend_is_mixture(ModelSpace(conv), torch.randn(2, 4, 12, 11, dtype=torch.double))


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": ValueChoice([1, 2], label="c")},
        {"dilation": ValueChoice([1, 2], label="c")},
        {"groups": ValueChoice([1, 2], label="c")},
        {"groups": 2, "out_channels": ValueChoice([8, 16], label="c")},
        {"kernel_size": ValueChoice([2, 4], label="c"), "padding": "same"},
        {"kernel_size": ValueChoice([2, 3], label="c")},
        {"kernel_size": ValueChoice([3, 5], label="c"), "padding": 1},
        {"kernel_size": ValueChoice([3, 5], label="c"), "padding": "valid"},
        {"padding": ValueChoice([0, 1], label="c")},
    ],
    ids=str,
)
def test_what_no_blended_kernel_equals_is_refused(arguments: dict[str, Any]) -> None:
    conv = Conv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **arguments})
    space = ModelSpace(nn.Sequential(nn.Identity(), conv))
    with pytest.raises(ValueError, match=r"'1' cannot be searched with mixing weights: .*LayerChoice"):
        space.check_can_mix()


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by groups in every combination of options; got 6, 8 and"):
        Conv2d(ValueChoice([6, 8], label="width"), 8, 3, groups=4)


def test_two_objects_with_one_label_are_one_decision_of_a_depthwise_convolution() -> None:
    widths = [ValueChoice([8, 12], label="width") for _ in range(3)]
    conv = Conv2d(widths[0], widths[1], 3, groups=widths[2])
    conv.check_can_mix()
    assert ModelSpace(conv).freeze({"width": 12}).weight.shape == (12, 1, 3, 3)


def test_convolution_without_a_choice_is_the_plain_one() -> None:
    conv = Conv2d(4, 8, 3, padding=1, groups=2)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1, groups=2))
    assert conv.weight.shape == nn.Conv2d(4, 8, 3, groups=2).weight.shape
