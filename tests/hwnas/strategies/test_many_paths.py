from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hwnas import LayerChoice, ModelSpace
from hwnas.strategies import FairNAS, Sandwich
from hwnas.strategies.sandwich import soft_cross_entropy
from profilers import ParamsProfiler, Profiler, RangeProfilerFilter
from tests.contracts.strategy import StrategyContract
from tests.hwnas.strategies.tiny import TinyNet, trainer

# Steps are looked at here, no answers: some searches have no validation, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:[A-Za-z]+ compares architectures in validation:UserWarning")


class TestFairNAS(StrategyContract):
    learns = False
    paths_of_ranks = "same"

    def make(self, **options: Any) -> FairNAS:
        return FairNAS(**options)

    def within(self, profiler: Profiler, most: float) -> dict[str, Any]:
        return {"filter": RangeProfilerFilter(profiler, max=most)}


class TestSandwich(StrategyContract):
    learns = False
    paths_of_ranks = "same"

    def make(self, **options: Any) -> Sandwich:
        return Sandwich(**options)

    def within(self, profiler: Profiler, most: float) -> dict[str, Any]:
        return {"filter": RangeProfilerFilter(profiler, max=most)}


class Plain(pl.LightningModule):
    """Three options, then two; nothing random in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), nn.Identity()]
        second = [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))]
        self.space = ModelSpace(
            nn.Sequential(LayerChoice(first, label="first"), LayerChoice(second, label="second"))
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.space(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Gradients(pl.Callback):
    """Weights and gradients as each optimizer step finds them."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, list[Tensor]]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
        self.seen.append((copy.deepcopy(module.space), found))


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        [
            (torch.randn(8, 3, generator=generator), torch.randint(4, (8,), generator=generator))
            for _ in range(4)
        ],  # type: ignore[arg-type]  # a list is a dataset
        batch_size=None,
    )


def gradient(space: ModelSpace, architecture: Any, batch: Any, teacher: Any = None) -> list[Tensor]:
    space.zero_grad()
    with space.running(space.gates_of(architecture)):
        scores = space(batch[0])
    if teacher is None:
        loss = F.cross_entropy(scores, batch[1])
    else:
        with torch.no_grad(), space.running(space.gates_of(teacher)):
            taught = space(batch[0])
        loss = F.cross_entropy(scores, taught.softmax(1))  # torch's own with soft targets
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in space.parameters()]


def test_every_option_is_trained_equally_often_in_a_step() -> None:
    strategy = FairNAS()
    strategy.prepare_for(ModelSpace(TinyNet()))
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        paths = strategy.paths(generator)
        for label, options in strategy.space.options.items():
            counts = Counter(path[label] for path in paths)
            if len(paths) % len(options) == 0:
                assert set(counts.values()) == {len(paths) // len(options)}
            assert max(counts.values()) - min(counts.values()) <= 1
        seen.add(tuple(path["op"] for path in paths))
    assert len(seen) == 6  # all orders of three options


@pytest.mark.parametrize("accumulated", [1, 2])
def test_fair_gradients_are_the_sum_over_the_paths(accumulated: int) -> None:
    strategy, gradients = FairNAS(), Gradients()
    drawn: list[Any] = []
    original = strategy.paths

    def paths(generator: torch.Generator) -> Any:
        drawn.append(original(generator))
        return drawn[-1]

    strategy.paths = paths  # type: ignore[method-assign]  # watched
    trainer(strategy, gradients, accumulate_grad_batches=accumulated).fit(Plain(), batches())
    steps = [found for i, found in enumerate(drawn) if i % 2]  # once for the gates, once for all paths
    assert len(gradients.seen) == 4 // accumulated
    for number, (space, found) in enumerate(gradients.seen):
        expected = [torch.zeros_like(p) for p in space.parameters()]
        for place in range(number * accumulated, (number + 1) * accumulated):
            batch = list(batches())[place]
            for path in steps[place]:
                for total, part in zip(expected, gradient(space, path, batch), strict=True):
                    total += part / accumulated
        torch.testing.assert_close(found, expected)


def test_gradients_of_all_paths_are_clipped_together() -> None:
    norms = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            found = [p.grad for p in module.parameters() if p.grad is not None]
            if found:
                norms.append(float(torch.cat([g.flatten() for g in found]).norm()))

    trainer(FairNAS(), Norm(), gradient_clip_val=0.01).fit(Plain(), batches())
    assert norms
    assert max(norms) <= 0.0101


def test_sandwich_trains_the_largest_on_labels_and_the_others_on_its_outputs() -> None:
    strategy, gradients = Sandwich(n_random=1), Gradients()
    module = Plain()
    trainer(strategy, gradients).fit(module, batches())
    for number, (space, found) in enumerate(gradients.seen):
        generator = strategy.generator(strategy_trainer(number), 0)
        largest, *others = strategy.paths(generator)
        assert largest == {"first": 1, "second": 1}
        assert others[0] == {"first": 2, "second": 0}
        batch = list(batches())[number]
        parts = [gradient(space, largest, batch)]
        parts += [gradient(space, path, batch, teacher=largest) for path in others]
        torch.testing.assert_close(found, [sum(column) for column in zip(*parts, strict=True)])


def strategy_trainer(batch: int) -> Any:
    """What `Strategy.generator` reads of a trainer."""

    class Namespace:
        pass

    made, made.fit_loop, made.fit_loop.epoch_loop = Namespace(), Namespace(), Namespace()  # type: ignore[attr-defined]
    made.fit_loop.epoch_loop.total_batch_idx = batch  # type: ignore[attr-defined]
    return made


def test_sandwich_stays_inside_its_filter() -> None:
    module = Plain()
    found = RangeProfilerFilter(ParamsProfiler(module.space), min=20, max=60)
    strategy = Sandwich(n_random=3, filter=found)
    strategy.prepare_for(module.space)
    paths = strategy.paths(torch.Generator().manual_seed(0))
    costs = [found.profiler.profile(path) for path in paths]
    assert all(20 <= cost <= 60 for cost in costs)
    assert costs[0] == max(costs)
    assert costs[1] == min(costs)


def test_soft_cross_entropy_is_least_where_outputs_agree() -> None:
    teacher = torch.randn(5, 4)
    student = teacher.clone().requires_grad_()
    (slope,) = torch.autograd.grad(soft_cross_entropy(student, teacher), student)
    assert slope.abs().max() < 1e-7


class Elsewhere(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.space.network[1][0](batch[0]), batch[1])


def test_soft_cross_entropy_of_what_is_no_tensor_says_what_to_give() -> None:
    with pytest.raises(TypeError, match=r"returns a dict: give Sandwich\(distillation=…\)"):
        soft_cross_entropy({"out": 1}, {"out": 1})  # type: ignore[arg-type]  # on purpose


def test_a_step_that_does_not_call_the_space_cannot_be_distilled() -> None:
    with pytest.raises(RuntimeError, match=r"Elsewhere.training_step did not call it"):
        trainer(Sandwich()).fit(Elsewhere(), batches())
    trainer(Sandwich(distillation=None)).fit(Elsewhere(), batches())


def test_negative_numbers_of_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="n_random must be at least 0; got -1"):
        Sandwich(n_random=-1)
