"""Widths that couple layers, under mixing weights: against the mixture of the sliced paths."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas import Gate, ModelSpace, ValueChoice
from hwnas.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose2d,
    Dropout,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    MultiheadAttention,
)
from hwnas.strategies import DARTS, Proxyless
from profilers import FlopsProfiler, count_macs
from tests.hwnas.strategies.tiny import CLASSES, fit


def paths_of(space: ModelSpace, label: str, x: Tensor) -> Tensor:
    """The outputs of every option of one choice, others at their default."""
    outputs = []
    for option in space.options[label]:
        with space.running(space.gates_of({**space.default(), label: option})):
            outputs.append(space(x))
    return torch.stack(outputs)


def plain_width_network(width: ValueChoice) -> nn.Module:
    return nn.Sequential(Conv2d(3, width, 3), BatchNorm2d(width), nn.ReLU(), Conv2d(width, 4, 3))


def depthwise_network(width: ValueChoice) -> nn.Module:
    middle = width * 2
    return nn.Sequential(
        Conv2d(3, middle, 1, bias=False),
        BatchNorm2d(middle),
        nn.ReLU(),
        Conv2d(middle, middle, 3, padding=1, groups=middle),
        BatchNorm2d(middle),
        nn.ReLU(),
        Conv2d(middle, 4, 1),
    )


def flattened_network(width: ValueChoice) -> nn.Module:
    return nn.Sequential(Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), Linear(width * 36, 4))


def grouped_network(width: ValueChoice) -> nn.Module:
    middle = width * 4
    return nn.Sequential(
        Conv2d(3, middle, 1),
        GroupNorm(width, middle),
        nn.ReLU(),
        Conv2d(middle, middle, 3, padding=1, groups=width),
        GroupNorm(width * 2, middle),
        nn.ReLU(),
        ConvTranspose2d(middle, 4, 2, stride=2),
    )


def sequence_network(width: ValueChoice) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(2), Conv1d(3, width, 5, stride=3), BatchNorm1d(width), nn.ReLU(), Conv1d(width, 4, 3)
    )


def volume_network(width: ValueChoice) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(3, (2, 4)), Conv3d(3, width, 2), BatchNorm3d(width), nn.ReLU(), Conv3d(width, 4, 1)
    )


@pytest.mark.parametrize(
    "make",
    [
        plain_width_network,
        depthwise_network,
        flattened_network,
        grouped_network,
        sequence_network,
        volume_network,
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float, 1e-6)])
def test_coupled_width_equals_mixture_of_sliced_paths(
    make: object, training: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    space = ModelSpace(make(ValueChoice([2, 4, 7], label="width"))).to(dtype).train(training)  # type: ignore[operator]
    space.check_can_mix()
    x = torch.randn(5, 3, 8, 8, dtype=dtype)
    # Of logits: only weights that sum to 1 make a mixture (the consumer's bias is added once).
    logits = torch.tensor([0.5, -0.2, 0.3], dtype=dtype, requires_grad=True)
    weights = logits.softmax(0)

    with space.running({"width": Gate((0, 1, 2), weights)}):
        blended = space(x)
    mixture = torch.tensordot(weights, paths_of(space, "width", x), dims=1)
    torch.testing.assert_close(blended, mixture, rtol=10 * tolerance, atol=tolerance)

    parameters = [logits, *space.parameters()]
    found = torch.autograd.grad(blended.square().mean(), parameters, retain_graph=True)
    brute = torch.autograd.grad(mixture.square().mean(), parameters)
    torch.testing.assert_close(found, brute, rtol=100 * tolerance, atol=100 * tolerance)


def test_depthwise_with_width_and_kernel_choices_equals_joint_mixture() -> None:
    width, kernel = ValueChoice([2, 4], label="width"), ValueChoice([3, 5], label="kernel")
    depthwise = Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
    space = ModelSpace(nn.Sequential(Conv2d(3, width, 1), nn.ReLU(), depthwise, Conv2d(width, 4, 1))).double()
    space.check_can_mix()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    logits = [torch.randn(2, dtype=torch.double, requires_grad=True) for _ in range(2)]
    weights = {"width": logits[0].softmax(0), "kernel": logits[1].softmax(0)}
    with space.running({label: Gate((0, 1), w) for label, w in weights.items()}):
        blended = space(x)
    mixture = torch.zeros_like(blended)
    for i, w in enumerate((2, 4)):
        for j, k in enumerate((3, 5)):
            with space.running(space.gates_of({"width": w, "kernel": k})):
                mixture = mixture + weights["width"][i] * weights["kernel"][j] * space(x)
    torch.testing.assert_close(blended, mixture, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(blended.square().sum(), logits, retain_graph=True)
    brute = torch.autograd.grad(mixture.square().sum(), logits)
    torch.testing.assert_close(found, brute, rtol=1e-11, atol=1e-11)


def test_two_paths_of_a_width_under_one_hot_weights_equal_the_picked_path() -> None:
    space = ModelSpace(plain_width_network(ValueChoice([2, 4, 7], label="width"))).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    one_hot = torch.tensor([0.0, 1.0, 0.0], dtype=torch.double, requires_grad=True)
    with space.running({"width": Gate((1,), one_hot, run=(1, 2))}):
        output = space(x)
    torch.testing.assert_close(output, paths_of(space, "width", x)[1], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(output.sum(), one_hot)
    sums = paths_of(space, "width", x).sum(dim=(1, 2, 3, 4))
    assert gradient[0] == 0  # not computed
    torch.testing.assert_close(gradient[2] - gradient[1], sums[2] - sums[1])


def test_choice_of_one_option_is_not_mixed() -> None:
    width = ValueChoice([4], label="width")
    space = ModelSpace(Linear(width, 3))
    weights = torch.ones(1, requires_grad=True)
    with space.running({"width": Gate((0,), weights)}):
        output = space(torch.randn(2, 4))
    (to_weights,) = torch.autograd.grad(output.sum(), weights, allow_unused=True)
    assert to_weights is None  # nothing was masked on the way


class EveryOperation(nn.Module):
    """8x8 images through every operation that can be mixed, each with a choice of its own."""

    def __init__(self) -> None:
        super().__init__()
        groups, middle = ValueChoice([1, 2], label="groups"), ValueChoice([4, 6], label="middle")
        volume, tokens = ValueChoice([2, 4], label="volume"), ValueChoice([3, 6], label="tokens")
        kernel, memory = ValueChoice([1, 3], label="kernel"), ValueChoice([4, 8], label="memory")
        wide = groups * 4
        self.image = nn.Sequential(
            Conv2d(1, wide, 3, stride=2, padding=1),
            GroupNorm(groups, wide),
            Conv2d(wide, wide, kernel, padding=kernel // 2, groups=groups),
            BatchNorm2d(wide),
            nn.ReLU(),
            ConvTranspose2d(wide, middle, 2, stride=2),
            nn.Flatten(2),
            Conv1d(middle, 8, 4, stride=4),
            BatchNorm1d(8),
            nn.Unflatten(2, (2, 2, 4)),
            Conv3d(8, volume, 1),
            BatchNorm3d(volume),
            nn.ReLU(),
            Conv3d(volume, 8, 1),
            nn.Flatten(2),
        )
        self.memory = Embedding(5, memory)
        self.attention = MultiheadAttention(8, 2, vdim=memory, kdim=8, batch_first=True)
        self.keys = nn.Parameter(torch.randn(1, 5, 8))
        drop = Dropout(ValueChoice([0.0, 0.3], label="p"))
        self.head = nn.Sequential(Linear(8, tokens), nn.ReLU(), drop, Linear(tokens, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        sequence = self.image(images).transpose(1, 2)
        keys = self.keys.expand(len(images), -1, -1)
        values = self.memory(torch.arange(5, device=images.device).expand(len(images), -1))
        attended, _ = self.attention(sequence, keys, values, need_weights=False)
        scores: Tensor = self.head((sequence + attended).mean(1))
        return scores


class Classifies(pl.LightningModule):
    def __init__(self, space: ModelSpace) -> None:
        super().__init__()
        self.space = space

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.space(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.space.parameters(), lr=0.01)


@pytest.mark.parametrize("strategy", [DARTS, Proxyless])
def test_search_over_every_operation_reaches_every_choice_and_keeps_to_its_budget(strategy: Any) -> None:
    torch.manual_seed(0)
    space = ModelSpace(EveryOperation())
    example = torch.zeros(1, 1, 8, 8)
    profiler = FlopsProfiler(space, example)
    low, high = profiler.cost.bounds()
    budget = (low + high) / 2
    search = strategy(arc_learning_rate=0.1)
    fit(search, Classifies(space), max_epochs=4)
    with space.running(search.architecture_gates(torch.Generator().manual_seed(0))):
        loss = space(torch.randn(4, 1, 8, 8)).square().sum()
    gradients = torch.autograd.grad(loss, search.logits.parameters())
    assert all((gradient != 0).all() for gradient in gradients)
    architecture = search.architecture({profiler: budget})
    subnet = space.freeze(architecture).eval()
    assert count_macs(subnet, [example]).headline == profiler.profile(architecture) <= budget
    with space.eval().running(space.gates_of(architecture)):
        torch.testing.assert_close(space(example), subnet(example))


@pytest.mark.parametrize(
    "layer",
    [
        LayerNorm(ValueChoice([4, 8], label="width")),
        MultiheadAttention(ValueChoice([4, 8], label="width"), 2),
    ],
    ids=["LayerNorm", "MultiheadAttention"],
)
def test_strategy_that_mixes_refuses_what_cannot_be_blended_before_the_first_step(layer: nn.Module) -> None:
    space = ModelSpace(nn.Sequential(nn.Identity(), layer))
    with pytest.raises(ValueError, match=r"'1' cannot be searched with mixing weights: .*LayerChoice.*ENAS"):
        DARTS().prepare_for(space)


def test_argument_that_is_changed_between_two_runs_is_taken() -> None:
    layer = Conv2d(1, ValueChoice([2, 4], label="width"), 3)
    space = ModelSpace(layer)
    gates = space.gates_of({"width": 2})
    with space.running(gates):
        before = space(torch.zeros(1, 1, 9, 9)).shape
        layer.stride = (2, 2)
        after = space(torch.zeros(1, 1, 9, 9)).shape
    assert (before, after) == ((1, 2, 7, 7), (1, 2, 4, 4))


def test_arguments_and_values_may_be_lists_and_may_be_replaced_between_two_runs() -> None:
    layer = Conv2d(1, ValueChoice([2, 4], label="width"), 3, padding=1)
    space = ModelSpace(layer)
    with space.running(space.gates_of({"width": 2})):
        assert space(torch.zeros(1, 1, 9, 9)).shape[1] == 2
        layer.padding = [0, 0]  # type: ignore[assignment]  # as an operation of one's own may hold it
        layer.values = {"out_channels": layer.values["out_channels"] + 1}
        assert space(torch.zeros(1, 1, 9, 9)).shape == (1, 3, 7, 7)


def test_values_that_have_run_are_copied_and_pickled_without_what_they_ran() -> None:
    width = ValueChoice([2, 4], label="width")
    space = ModelSpace(nn.Sequential(Conv2d(1, width, 1), Conv2d(width, width * 2, 1)))
    size = len(pickle.dumps(space))
    weights = torch.tensor([0.5, 0.5], requires_grad=True) * 1.0  # no leaf: it cannot be copied
    with space.running({"width": Gate((0, 1), weights)}):
        space(torch.zeros(1, 1, 4, 4))
    assert len(pickle.dumps(space)) == size
    assert copy.deepcopy(space).size == 2
