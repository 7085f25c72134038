from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor
from torch.utils.data import DataLoader

from hwnas import LayerChoice, ModelSpace
from hwnas.recalibrate import recalibrate
from hwnas.strategies import DARTS, RandomOneShot
from profilers import Cost, CostTable, LagrangianPenalty, Profiler, RangeProfilerFilter
from tests.contracts.strategy import StrategyContract
from tests.hwnas.strategies.tiny import (
    Noisy,
    TableProfiler,
    TinyNet,
    classification,
    fit,
    loaders,
    space_of,
    trainer,
)


class TestRandomOneShot(StrategyContract):
    learns = False
    runs_one_path = True
    paths_of_ranks = "own"

    def make(self, **options: Any) -> RandomOneShot:
        return RandomOneShot(**options)

    def within(self, profiler: Profiler, most: float) -> dict[str, Any]:
        return {"filter": RangeProfilerFilter(profiler, max=most)}


class Paths(pl.Callback):
    """The paths that weight steps train."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        space = space_of(module)
        assert space.gates is not None
        self.seen.append({n: space.options[n][gate.picked[0]] for n, gate in space.gates.items()})


def test_trained_paths_are_uniform_over_the_canonical_architectures() -> None:
    strategy, module = RandomOneShot(), classification()
    strategy.prepare_for(space := space_of(module))
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(strategy.sample(generator).values()) for _ in range(40 * space.size))
    assert len(drawn) == space.size
    assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_every_trained_judged_and_returned_path_is_in_the_range() -> None:
    module, paths = classification(), Paths()
    profiler = TableProfiler(space_of(module))
    found = RangeProfilerFilter(profiler, min=4.0, max=8.0)
    strategy = RandomOneShot(filter=found)
    fit(strategy, module, paths, max_epochs=3)
    returned = strategy.top_k(6)
    assert len(paths.seen) == 12
    assert len({tuple(a.values()) for a in returned}) == 6
    for architecture in (*paths.seen, *strategy.candidates(), *returned, strategy.architecture()):
        assert found.filter(architecture)
    assert {tuple(path.values()) for path in paths.seen} > {tuple(paths.seen[0].values())}


def test_answer_is_the_candidate_that_validation_finds_best() -> None:
    module = classification()
    training, validation = DataLoader(Noisy(64, 1, 0.0), batch_size=8), loaders(noise=0.0)[1]
    strategy = RandomOneShot(n_candidates=5, reward_metric_name="val_loss")
    trainer(strategy, max_epochs=3).fit(module, training, validation)
    losses = {}
    for architecture in strategy.candidates():
        subnet = recalibrate(strategy.space.freeze(architecture), training).eval()
        found = [torch.nn.functional.cross_entropy(subnet(x), y).detach() for x, y in validation]
        losses[tuple(architecture.values())] = float(sum(found) / len(found))
    assert tuple(strategy.architecture().values()) == min(losses, key=losses.__getitem__)
    assert [tuple(a.values()) for a in strategy.top_k(5)] == sorted(losses, key=losses.__getitem__)


def test_logged_supernet_metrics_are_the_mean_over_the_candidates() -> None:
    strategy, module = RandomOneShot(n_candidates=3), classification()
    _, made = fit(strategy, module, max_epochs=2)
    scores = [score for _, score in strategy.policy_state()["judged"]]
    assert len(scores) == 3
    assert float(made.callback_metrics["supernet_val_acc"]) == pytest.approx(sum(scores) / 3)


def test_budget_that_no_candidate_keeps_to_is_answered_by_a_fresh_draw() -> None:
    strategy, module = RandomOneShot(), classification()
    fit(strategy, module)
    profiler = TableProfiler(strategy.space)
    low, _ = profiler.cost.bounds()
    answer = strategy.architecture(max_cost={profiler: low})
    assert profiler.profile(answer) == low
    with pytest.raises(ValueError, match=r"no architecture costs at most [\d.]+ ms; the space has"):
        strategy.architecture(max_cost={profiler: 0.5 * low})


def test_metric_that_is_not_logged_is_named() -> None:
    with pytest.raises(ValueError, match=r"by \('val_f1',\).*it logs \['val_acc', 'val_loss'\]"):
        fit(RandomOneShot(reward_metric_name="val_f1"))


@pytest.mark.parametrize("name", ["val_loss", "val_error", "val_mse", "val_acc"])
def test_losses_are_minimised_and_scores_maximised(name: str) -> None:
    strategy = RandomOneShot(reward_metric_name=name)
    strategy.judge([({"op": 0}, {name: 1.0}), ({"op": 1}, {name: 2.0})])
    assert strategy.policy_state()["judged"][0][0] == {"op": 1 if name == "val_acc" else 0}
    flipped = RandomOneShot(reward_metric_name=name, reward_mode="max")
    flipped.judge([({"op": 0}, {name: 1.0}), ({"op": 1}, {name: 2.0})])
    assert flipped.policy_state()["judged"][0][0] == {"op": 1}


def test_score_that_is_no_number_is_the_worst() -> None:
    for mode in ("max", "min"):
        strategy = RandomOneShot(reward_metric_name="f", reward_mode=mode)
        scores = [math.nan, 1.0, math.nan, 2.0, math.nan]
        strategy.judge([({"op": i}, {"f": score}) for i, score in enumerate(scores)])
        best, second = (3, 1) if mode == "max" else (1, 3)
        assert [a["op"] for a, _ in strategy.policy_state()["judged"]][:2] == [best, second]


def test_answer_of_a_checkpoint_keeps_to_a_filter_that_is_tighter_now(tmp_path: Path) -> None:
    module = classification()
    profiler = TableProfiler(space_of(module))
    low, high = profiler.cost.bounds()
    first = RandomOneShot(filter=RangeProfilerFilter(profiler, min=(low + high) / 2))
    _, made = fit(first, module)
    made.save_checkpoint(tmp_path / "a.ckpt")
    resumed = RandomOneShot(filter=RangeProfilerFilter(profiler, max=(low + high) / 2))
    made = trainer(resumed, max_epochs=1)
    made.fit(module, *loaders(), ckpt_path=tmp_path / "a.ckpt")
    assert max(map(profiler.profile, [resumed.architecture(), *resumed.top_k(4)])) <= (low + high) / 2


def test_filter_of_another_kind_or_space_is_refused() -> None:
    module = classification()
    profiler = TableProfiler(space_of(module))
    with pytest.raises(TypeError, match="is a RangeProfilerFilter or a list of them; got LagrangianPenalty"):
        RandomOneShot(filter=[LagrangianPenalty(profiler, 5.0)])  # type: ignore[list-item]  # on purpose
    other = ModelSpace(torch.nn.Sequential(LayerChoice([torch.nn.ReLU(), torch.nn.Tanh()], label="op")))
    foreign = Profiler(Cost(other.options, 0.0, [CostTable(("op",), np.array([1.0, 2.0]))], "MAC"))
    with pytest.raises(ValueError, match=r"a cost in MAC belongs to another space.*'op': \(0, 1\)"):
        fit(RandomOneShot(filter=RangeProfilerFilter(foreign, max=1.5)))
    with pytest.raises(ValueError, match="belongs to another space"):
        fit(DARTS(penalty=LagrangianPenalty(foreign, 1.5)))


@pytest.mark.parametrize("make", [RandomOneShot, DARTS])
@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_fewer_than_one_architecture_cannot_be_asked_for(make: Any, k: Any) -> None:
    strategy = make()
    strategy.prepare_for(space_of(classification()))
    with pytest.raises(ValueError, match=f"whole number of at least 1; got {k}"):
        strategy.top_k(k)


def test_without_validation_the_answer_is_random_and_that_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"RandomOneShot compares architectures in validation, and there is none"
    ):
        fit(RandomOneShot(), batches=1, limit_val_batches=0)


def test_what_was_judged_in_one_space_says_nothing_in_another() -> None:
    strategy = RandomOneShot()
    fit(strategy)
    assert strategy.policy_state()["judged"]
    strategy.prepare_for(space_of(classification()))
    assert not strategy.policy_state()["judged"]


class InItsSteps(pl.LightningModule):
    """Logs what it gives to the right class, batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.space = ModelSpace(TinyNet())
        self.right: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.space(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.accurate(batch).mean())

    def accurate(self, batch: Any) -> Tensor:
        return self.space(batch[0]).softmax(1)[range(len(batch[1])), batch[1]]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AtItsEnd(InItsSteps):
    """Collects it, and logs the mean when all batches are through."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.right.append(self.accurate(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val_acc", torch.cat(self.right).mean())
        self.right.clear()


@pytest.mark.parametrize("name", [None, "val_acc"])
def test_candidates_are_judged_by_what_is_logged_at_the_end_of_the_validation(name: str | None) -> None:
    judged = []
    for module in (InItsSteps(), AtItsEnd()):
        strategy = RandomOneShot(reward_metric_name=name)
        _, made = fit(strategy, module)
        judged.append((strategy.policy_state()["judged"], float(made.callback_metrics["supernet_val_acc"])))
    assert len({score for _, score in judged[0][0]}) > 1
    (expected, expected_mean), (found, mean) = judged
    assert [a for a, _ in found] == [a for a, _ in expected]
    assert [s for _, s in found] == pytest.approx([s for _, s in expected])
    assert mean == pytest.approx(expected_mean)
