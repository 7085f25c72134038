from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hwnas import Gate
from hwnas.gate import mixture


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.sampled_from([(3,), (2, 3, 4)]))
@settings(deadline=None)
def test_mixture_equals_weighted_sum_with_its_gradients(numbers: list[float], shape: tuple[int, ...]) -> None:
    # One-hot weights get a relative gradient, which a test of its own is about.
    assume(sorted(numbers)[-1] != 1.0 or any(sorted(numbers)[:-1]))
    weights = torch.tensor(numbers, dtype=torch.double, requires_grad=True)
    outputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in numbers]
    expected = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    mixed = mixture(weights, outputs)
    torch.testing.assert_close(mixed, expected)
    cotangent = torch.randn_like(mixed)
    found = torch.autograd.grad(mixed, [weights, *outputs], cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [weights, *outputs], cotangent))


def test_one_hot_weights_that_sum_to_one_get_the_gradient_of_the_plain_sum() -> None:
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.double, requires_grad=True)
    outputs = [torch.randn(4, dtype=torch.double) for _ in range(3)]
    cotangent = torch.randn(4, dtype=torch.double)
    soft = logits.softmax(0)
    weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.double) + (soft - soft.detach())
    plain = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    (found,) = torch.autograd.grad(mixture(weights, outputs), logits, cotangent, retain_graph=True)
    (expected,) = torch.autograd.grad(plain, logits, cotangent)
    torch.testing.assert_close(found, expected)


def test_one_hot_mixture_keeps_differences_from_the_picked_output_alone() -> None:
    outputs = [torch.randn(2, 3) for _ in range(3)]
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for asks, count in ((True, 2), (False, 0)):
        kept.clear()
        weights = torch.tensor([0.0, 1.0, 0.0], requires_grad=asks)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mixture(weights, [output.requires_grad_() for output in outputs])
        assert sum(tensor.shape == (2, 3) for tensor in kept) == count


def test_mixture_needs_no_graph_of_an_output_that_is_only_weighed() -> None:
    weights = torch.tensor([1.0, 0.0], requires_grad=True)
    picked, other = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    mixture(weights, [picked, other]).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [0.0, 3.0]  # relative to the picked one: 6 - 3
    assert picked.grad is not None
    assert picked.grad.tolist() == [1.0, 1.0, 1.0]


def test_output_of_weight_zero_cannot_spoil_the_mixture() -> None:
    broken = torch.full((2,), torch.inf)
    assert mixture(torch.tensor([1.0, 0.0]), [torch.ones(2), broken]).tolist() == [1.0, 1.0]


def test_mixture_of_half_and_single_precision_is_single() -> None:
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    mixed = mixture(torch.tensor([0.5, 0.5]), [half, torch.ones(2)])
    assert mixed.dtype == torch.float32
    assert torch.autograd.grad(mixed.sum(), half)[0].dtype == torch.bfloat16


def test_outputs_of_different_shapes_are_never_broadcast() -> None:
    with pytest.raises(
        ValueError, match=r"paths of 'op' must have .* one shape .*\[\(2, 3\), \(1, 3\)\].*ENAS"
    ):
        mixture(torch.ones(2), [torch.ones(2, 3), torch.ones(1, 3)], "paths of 'op'")


def test_outputs_that_are_not_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"each returns one tensor; got \['tuple'\]"):
        mixture(torch.ones(1), [(torch.ones(2), torch.ones(2))])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("gate", "live"),
    [
        (Gate((2,)), (2,)),
        (Gate((0, 1, 2), torch.ones(3) / 3), (0, 1, 2)),
        (Gate((1,), torch.tensor([0.0, 1.0, 0.0]), run=(1, 2)), (1, 2)),
    ],
)
def test_live_options_are_those_that_are_computed(gate: Gate, live: tuple[int, ...]) -> None:
    assert gate.live() == live


def test_mixture_may_be_changed_in_place_like_any_output() -> None:
    weights = torch.tensor([1.0, 0.0], requires_grad=True)
    picked, other = torch.tensor([3.0, -1.0], requires_grad=True), torch.tensor([2.0, 2.0])
    torch.relu_(mixture(weights, [picked, other])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [0.0, -1.0]  # relative to the picked one: 2 - 3
