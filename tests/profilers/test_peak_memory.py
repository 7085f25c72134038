from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace, ValueChoice
from hwnas.derive import ranked
from hwnas.nn import Conv2d
from hwnas.sampling import Sampler
from lookup_tables import to_onnx
from profilers import LagrangianPenalty, PeakMemoryProfiler, RangeProfilerFilter, peak_memory
from profilers.peak_memory import graph_peak
from tests.hwnas.matrix import IMAGES, KINDS

MAP = 8 * 8 * 4  # bytes of one channel


class Residual(nn.Module):
    """What `inside` makes is added to what went in."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, images: Tensor) -> Tensor:
        return images + self.inside(images)


NEEDED: dict[str, tuple[nn.Module, int]] = {  # channels at once
    "one layer": (nn.Conv2d(2, 6, 1), 2 + 6),
    "in place": (nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU()), 2 + 6),
    "folded": (nn.Sequential(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)), 6 + 3),
    "freed": (nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 1, 1), nn.Conv2d(1, 6, 1)), 2 + 6),
    "a sum takes over a term": (Residual(nn.Conv2d(2, 2, 1)), 2 + 2),
    "the input is held": (Residual(nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1))), 2 + 6 + 2),
    "a view": (nn.Sequential(nn.Conv2d(2, 6, 1), nn.Flatten()), 2 + 6),
}


def test_peak_is_what_is_needed_at_once() -> None:
    images = torch.zeros(1, 2, 8, 8)
    files = to_onnx({name: (network.eval(), (images,)) for name, (network, _) in NEEDED.items()})
    peaks = {name: graph_peak(onnx.load_from_string(file), ["dies"]).bytes for name, file in files.items()}
    assert peaks == {name: channels * MAP for name, (_, channels) in NEEDED.items()}
    network, channels = NEEDED["in place"]
    assert peak_memory(network, [images]).bytes == channels * MAP


def test_weights_that_are_an_input_of_an_operator_are_no_activation() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, 2, 8, 8))
            self.op = LayerChoice([nn.ReLU(), nn.Tanh()], label="op")

        def forward(self, images: Tensor) -> Tensor:
            return self.op(images) + self.bias

    memory = PeakMemoryProfiler(ModelSpace(Biased()), torch.zeros(1, 2, 8, 8), limit_bytes=1)
    assert memory.profile({"op": 0}) == 2 * MAP


@pytest.mark.parametrize("kind", ["input choice", "cell"])
def test_every_architecture_has_the_peak_of_its_exported_network(kind: str) -> None:
    torch.manual_seed(0)
    space = ModelSpace(KINDS[kind]()).eval()
    images = IMAGES[:1]
    memory = PeakMemoryProfiler(space, images, limit_bytes=1)
    generator = torch.Generator().manual_seed(0)
    drawn = {str(n): space.random(generator) for n in range(8)}
    files = to_onnx({name: (space.freeze(found), (images,)) for name, found in drawn.items()})
    peaks = {name: graph_peak(onnx.load_from_string(file), ["dies"]).bytes for name, file in files.items()}
    assert {name: memory.profile(found) for name, found in drawn.items()} == peaks
    assert len(set(peaks.values())) > 1


def skipping() -> ModelSpace:
    """A width that lies beside a branch for a later sum."""
    width = ValueChoice([2, 4], label="width")
    inside = LayerChoice(
        {
            "wide": nn.Sequential(Conv2d(width, 12, 1), Conv2d(12, width, 1)),
            "thin": nn.Sequential(Conv2d(width, 1, 1), Conv2d(1, width, 1)),
        },
        label="op",
    )
    return ModelSpace(nn.Sequential(Conv2d(1, width, 1), Residual(inside), Conv2d(width, 6, 1)))


def test_what_lies_beside_a_branch_counts() -> None:
    memory = PeakMemoryProfiler(skipping(), torch.zeros(1, 1, 8, 8), limit_bytes=1)
    found = {(w, op): memory.profile({"width": w, "op": op}) for w in (2, 4) for op in ("wide", "thin")}
    assert found == {
        (2, "wide"): (2 + 12 + 2) * MAP,
        (4, "wide"): (4 + 12 + 4) * MAP,
        (2, "thin"): (2 + 6) * MAP,
        (4, "thin"): (4 + 6) * MAP,
    }


def test_cost_keeps_to_the_limit_exactly_where_the_peak_does() -> None:
    space = skipping()
    limit = (2 + 12 + 2) * MAP
    memory = PeakMemoryProfiler(space, torch.zeros(1, 1, 8, 8), limit_bytes=limit)
    within = [a for a in space.grid() if memory.profile(a) <= limit]
    assert 0 < len(within) < space.size
    for architecture in space.grid():
        cost = memory.cost.of(architecture)
        assert (cost == limit) == (architecture in within)
        assert cost >= memory.profile(architecture) or architecture in within
    sampler = Sampler(space, RangeProfilerFilter(memory, max=limit))
    drawn = sampler.draw_many(50, torch.Generator().manual_seed(0))
    assert {str(a) for a in drawn} == {str(a) for a in within}
    wishes = {"width": torch.tensor([0.1, 0.9]), "op": torch.tensor([0.9, 0.1])}
    assert all(memory.profile(a) <= limit for a in ranked(space, wishes, {memory: limit}))


def test_gradient_leads_away_from_what_needs_too_much() -> None:
    limit = (2 + 12 + 2) * MAP
    memory = PeakMemoryProfiler(skipping(), torch.zeros(1, 1, 8, 8), limit_bytes=limit)
    logits = {label: torch.zeros(2, requires_grad=True) for label in ("width", "op")}
    probabilities = {label: found.softmax(0) for label, found in logits.items()}
    LagrangianPenalty(memory, baseline=limit)(torch.zeros(()), probabilities).backward()
    assert logits["width"].grad is not None
    assert logits["width"].grad[1] > 0  # 4 channels
    assert logits["op"].grad is not None
    assert logits["op"].grad[0] > 0  # wide


def test_a_limit_that_nothing_keeps_to_is_refused_where_it_is_asked_for() -> None:
    memory = PeakMemoryProfiler(skipping(), torch.zeros(1, 1, 8, 8), limit_bytes=MAP)
    with pytest.raises(ValueError, match="the space has"):
        RangeProfilerFilter(memory, max=MAP)
    with pytest.raises(ValueError, match="bytes above 0; got 0"):
        PeakMemoryProfiler(skipping(), torch.zeros(1, 1, 8, 8), limit_bytes=0)
