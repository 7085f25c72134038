from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from hwnas import LayerChoice, ModelSpace
from hwnas.strategies import ENAS, PPO, NonFiniteLossError, Reinforce
from hwnas.strategies.controller import Learner
from profilers import Profiler, RangeProfilerFilter
from profilers.penalty import SampleProfilerPenalty
from tests.contracts.strategy import StrategyContract
from tests.hwnas.strategies.test_random_one_shot import Paths
from tests.hwnas.strategies.tiny import (
    Noisy,
    TableProfiler,
    TinyNet,
    assert_equal,
    classification,
    fit,
    loaders,
    space_of,
    trainer,
)

T = TypeVar("T")

# Going on in the folder of before is what resuming is.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")

without_validation = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no:UserWarning"
)

FEW: Mapping[str, Any] = {"batches_per_update": 3, "updates": 2}


class TestENAS(StrategyContract):
    runs_one_path = True

    def make(self, **options: Any) -> ENAS:
        return ENAS(0.1, **FEW, **options)

    def within(self, profiler: Profiler, most: float) -> dict[str, Any]:
        return {"penalty": SampleProfilerPenalty(profiler, most)}


class Scored(pl.LightningModule):
    """Logs, in an episode, a number that the drawn architecture alone decides."""

    def __init__(self, score: Callable[[Mapping[str, Any]], float], name: str = "val_acc") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.space = ModelSpace(TinyNet())
        self.score, self.name = score, name

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.space(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        found = self.space.default()
        if not (self.trainer.validating or self.trainer.sanity_checking):
            assert self.space.gates is not None
            options = self.space.options
            found = {label: options[label][gate.picked[0]] for label, gate in self.space.gates.items()}
        self.log(self.name, self.score(found))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Episodes:
    """A learner that writes down what it is given."""

    def __init__(self) -> None:
        self.of_update: list[tuple[list[dict[str, Any]], list[float]]] = []

    def __call__(self, *arguments: Any) -> Learner:
        made = Reinforce(*arguments)
        update = made.update

        def watched(architectures: Any, rewards: Any) -> Any:
            self.of_update.append((list(architectures), list(rewards)))
            return update(architectures, rewards)

        made.update = watched  # type: ignore[method-assign]  # a spy
        return made

    def all(self) -> list[tuple[dict[str, Any], float]]:
        return [pair for update in self.of_update for pair in zip(*update, strict=True)]


def is_conv(architecture: Mapping[str, Any]) -> float:
    return float(architecture["op"] == "conv")


# ---- when the controller learns


class Moved(pl.Callback):
    """After which batches of which epochs the controller has moved; stands behind the strategy."""

    def __init__(self, strategy: ENAS) -> None:
        self.strategy = strategy
        self.found: list[tuple[int, int]] = []

    def on_train_start(self, *_: Any) -> None:
        self._before = self.strategy.controller.state_dict()["weights"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *rest: Any) -> None:
        now = self.strategy.controller.state_dict()["weights"]
        if any(not torch.equal(now[name], self._before[name]) for name in now):
            self.found.append((trainer.current_epoch, rest[-1]))
        self._before = now


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0, 4), (1, 4)]),
        ({"warmup_epochs": 1}, [(1, 4)]),
        # Optimizer steps: the windows of two batches end with batches 1, 3 and, cut short, 4.
        ({"update_every_n_steps": 1}, [(e, b) for e in range(2) for b in (1, 3, 4)]),
        ({"update_every_n_steps": 2}, [(0, 3), (1, 1), (1, 4)]),
        ({"update_every_n_steps": 2, "warmup_epochs": 1}, [(1, 1), (1, 4)]),
    ],
)
def test_controller_learns_when_stated(options: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    strategy = ENAS(**{**FEW, **options})
    moved = Moved(strategy)
    fit(strategy, None, moved, batches=5, max_epochs=2, accumulate_grad_batches=2)
    assert moved.found == expected


def test_each_update_takes_its_episodes_one_batch_each() -> None:
    episodes = Episodes()
    strategy = ENAS(batches_per_update=5, updates=3, learner=episodes)
    fit(strategy, Scored(is_conv), max_epochs=2)
    assert [len(rewards) for _, rewards in episodes.of_update] == [5] * 6
    # Two batches a pass: thirty episodes are fifteen passes.
    assert strategy.policy_state()["batches"] in ((14, 2), (15, 0))


def test_controller_learns_before_the_validation_of_its_epoch() -> None:
    strategy = ENAS(**FEW)
    judged_by: list[bool] = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = strategy.controller.state_dict()["weights"]["heads"]

        def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                now = strategy.controller.state_dict()["weights"]["heads"]
                judged_by.append(not torch.equal(now, self.start))

    fit(strategy, None, Look(), max_epochs=2)
    assert judged_by == [True, True]


# ---- what it is rewarded for


def test_episodes_and_trained_paths_are_draws_of_the_controller() -> None:
    episodes, paths = Episodes(), Paths()
    strategy = ENAS(batches_per_update=40, updates=1, learner=episodes, arc_learning_rate=1e-9)
    fit(strategy, Scored(is_conv), paths, batches=60, max_epochs=2)
    assert episodes.of_update[0] != episodes.of_update[1]
    assert paths.seen[:60] != paths.seen[60:]
    space = strategy.space
    drawn = [architecture for architecture, _ in episodes.all()]
    assert all(space.canonical(architecture) == architecture for architecture in (*drawn, *paths.seen))
    for found in (drawn, paths.seen):
        shares = [sum(a["op"] == option for a in found) / len(found) for option in space.options["op"]]
        # Four standard deviations of a share of 80 draws from a controller that is all but uniform.
        assert shares == pytest.approx([1 / 3] * 3, abs=0.21)
    assert {reward for a, reward in episodes.all() if a["op"] == "conv"} == {1.0}
    assert {reward for a, reward in episodes.all() if a["op"] != "conv"} == {0.0}


@pytest.mark.parametrize(("name", "sign"), [("val_acc", 1.0), ("val_loss", -1.0)])
def test_metric_to_be_minimised_counts_with_the_opposite_sign(name: str, sign: float) -> None:
    episodes = Episodes()
    fit(ENAS(**FEW, learner=episodes), Scored(lambda a: 2.0 + is_conv(a), name))
    assert all(reward == sign * (2.0 + is_conv(a)) for a, reward in episodes.all())
    assert len(episodes.all()) == 6


@pytest.mark.parametrize("name", ["val_acc", "val_loss"])
@pytest.mark.parametrize("aggregate", ["add", "mul"])
def test_penalty_takes_from_the_reward_what_an_architecture_costs(name: str, aggregate: Any) -> None:
    module, episodes = Scored(lambda _: 0.5, name), Episodes()
    profiler = TableProfiler(module.space)
    penalty = SampleProfilerPenalty(profiler, 5.0, scale=0.3, aggregate=aggregate)
    fit(ENAS(batches_per_update=12, updates=2, penalty=penalty, learner=episodes), module)
    for architecture, reward in episodes.all():
        ratio = profiler.profile(architecture) / 5.0
        if aggregate == "add":
            expected = (0.5 if name == "val_acc" else -0.5) - 0.3 * (ratio - 1)
        else:
            expected = 0.5 * ratio**-0.3 if name == "val_acc" else -0.5 * ratio**0.3
        assert reward == pytest.approx(expected, rel=1e-6)
    pairs = sorted((profiler.profile(a), -reward) for a, reward in episodes.all())
    assert pairs == sorted(pairs, key=lambda pair: pair[1])  # the dearer, the worse
    assert pairs[0][0] < pairs[-1][0]


def test_absolute_penalty_is_the_reward_of_tunas() -> None:
    module, episodes, beta = Scored(lambda a: 0.5 + 0.1 * is_conv(a)), Episodes(), -0.07
    profiler = TableProfiler(module.space)
    penalty = SampleProfilerPenalty(profiler, 8.0, scale=-beta, nonlinear="absolute")
    fit(ENAS(batches_per_update=12, penalty=penalty, updates=2, learner=episodes), module)
    for architecture, reward in episodes.all():
        quality = 0.5 + 0.1 * is_conv(architecture)
        excess = abs(profiler.profile(architecture) / 8.0 - 1)
        assert reward == pytest.approx(quality + beta * excess, rel=1e-6)
    assert {profiler.profile(a) > 8.0 for a, _ in episodes.all()} == {True, False}


class Notes(list[T]):
    """Steps on the side leave a module's lists as they were; nobody looks into one of another class."""


class Normed(Scored):
    """Notes modes and outputs of its episodes."""

    def __init__(self) -> None:
        super().__init__(is_conv)
        self.seen: Notes[tuple[dict[type, bool], Tensor, Any, Tensor]] = Notes()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.validating and not self.trainer.sanity_checking and self.space.training is False:
            scores = self.space(batch[0])
            modes = {type(child): child.training for child in self.modules()}
            self.seen.append((modes, batch[0], dict(self.space.gates or {}), scores))


def test_episode_runs_in_evaluation_mode_with_the_statistics_of_its_batch() -> None:
    module = Normed()
    reference: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
            if rest[-1] == 3:
                reference.append(copy.deepcopy(module.space))

    # In front of the strategy: the weights with which its episodes run.
    made = trainer(Keep(), ENAS(**FEW))
    made.fit(module, *loaders(noise=0.0))
    episodes = [found for found in module.seen if found[2] and found[0][nn.Dropout] is False]
    space = reference[0].eval()
    for child in space.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.training = True
    modes, images, gates, scores = episodes[0]
    assert [kind.__name__ for kind, is_training in modes.items() if is_training] == ["BatchNorm2d"]
    with space.running(gates):
        torch.testing.assert_close(scores, space(images).detach())
    assert module.training


class Around(pl.Callback):
    """Stands before and after the strategy, and compares what must not move between."""

    def __init__(self) -> None:
        self.before: Any = None
        self.compared = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        now = {
            "state": {key: value.clone() for key, value in module.state_dict().items()},
            "gradients": [p.grad if p.grad is None else p.grad.clone() for p in module.parameters()],
            "asking": [p.requires_grad for p in module.parameters()],
            "modes": [child.training for child in module.modules()],
            "metrics": {
                name: copy.deepcopy(dict(getattr(child, "metric_state", {})))
                for name, child in module.named_children()
            },
            "random": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))],  # type: ignore[union-attr, index]  # the legacy tuple
        }
        if self.before is None:
            self.before = now
        else:
            assert_equal(now, self.before)
            self.before, self.compared = None, self.compared + 1


def test_episodes_leave_no_trace_in_the_users_module() -> None:
    around, module = Around(), classification()
    next(module.parameters()).requires_grad_(False)
    made = trainer(around, ENAS(**FEW), around, max_epochs=2)
    made.fit(module, *loaders())
    assert around.compared == 8
    assert space_of(module).gates is None
    assert "log" not in vars(module)


class Stateful(Scored):
    """Logs a metric that gathers, and draws global random numbers."""

    def __init__(self) -> None:
        super().__init__(is_conv)
        self.mean = MeanMetric()
        self.batches: Notes[float] = Notes()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = torch.rand(()) + float(np.random.rand())
        self.mean(value)
        self.log("val_acc", self.mean)
        if not (self.trainer.validating or self.trainer.sanity_checking):
            self.batches.append(float(value))


def test_metric_that_gathers_starts_anew_with_each_episode() -> None:
    episodes, module, around = Episodes(), Stateful(), Around()
    made = trainer(around, ENAS(**FEW, learner=episodes), around)
    made.fit(module, *loaders())
    assert [reward for _, reward in episodes.all()] == pytest.approx(list(module.batches))
    assert len(set(module.batches)) == 6
    assert around.compared == 4


def test_error_in_an_episode_leaves_no_trace() -> None:
    def fail(_: Any) -> float:
        raise KeyError

    module = Scored(fail)
    with pytest.raises(KeyError):
        trainer(ENAS(**FEW), num_sanity_val_steps=0).fit(module, *loaders())
    assert module.space.gates is None
    assert all(child.training for child in module.modules())
    assert "log" not in vars(module)


# ---- what it finds


@pytest.mark.parametrize("learner", [Reinforce, PPO, partial(PPO, clip=0.1, epochs=2)])
def test_best_architecture_becomes_the_most_probable(learner: Any) -> None:
    best = {"width": 4, "op": "point", "act": "tanh", "depth": 1}
    module = Scored(lambda a: sum(a[label] == option for label, option in best.items()) / 4)
    strategy = ENAS(0.02, batches_per_update=10, updates=20, learner=learner)
    _, made = fit(strategy, module, max_epochs=2)
    assert strategy.controller.greedy() == best
    assert float(made.callback_metrics["controller_reward"]) > 0.65  # 0.46 on average over all
    assert float(made.callback_metrics["controller_entropy"]) < 3.4  # of 3.58 nats
    assert 0.5 < float(made.callback_metrics["controller_baseline"]) < 1.0


def test_penalty_makes_the_sampled_architectures_cheaper() -> None:
    found = {}
    for scale in (0.0, 3.0):
        module = classification()
        profiler = TableProfiler(space_of(module))
        penalty = SampleProfilerPenalty(profiler, baseline=4.0, scale=scale)
        strategy = ENAS(0.02, batches_per_update=10, updates=15, penalty=penalty)
        _, made = fit(strategy, module, max_epochs=2)
        found[scale] = strategy.expected_cost(profiler)
        assert float(made.callback_metrics["expected_ms"]) == pytest.approx(found[scale])
    assert found[3.0] < 0.8 * found[0.0]


def test_every_path_that_is_trained_rewarded_judged_or_returned_is_in_the_range() -> None:
    module, paths, episodes = classification(), Paths(), Episodes()
    profiler = TableProfiler(space_of(module))
    found = RangeProfilerFilter(profiler, min=4.0, max=8.0)
    strategy = ENAS(**FEW, filter=found, learner=episodes)
    fit(strategy, module, paths, max_epochs=3)
    rewarded = [architecture for architecture, _ in episodes.all()]
    assert len(paths.seen) == 12
    assert len(rewarded) == 18
    for architecture in (*paths.seen, *rewarded, *strategy.candidates(), *strategy.top_k(6)):
        assert found.filter(architecture)


def test_range_that_the_controller_hardly_meets_is_drawn_from_uniformly() -> None:
    strategy, module = ENAS(), classification()
    strategy.filters = (RangeProfilerFilter(TableProfiler(space_of(module)), max=1.6),)
    strategy.prepare_for(space_of(module))
    with torch.no_grad():
        for weight in strategy.controller.parameters():
            weight.mul_(50)  # all but decided
    strategy.controller.tanh_constant = 30.0
    assert not strategy.filters[0].filter(strategy.controller.greedy())
    drawn = strategy.sample_many(40, torch.Generator().manual_seed(0))
    assert len(drawn) == 40
    assert all(strategy.filters[0].filter(architecture) for architecture in drawn)


def test_baseline_of_the_penalty_is_the_budget_of_the_answer() -> None:
    module = classification()
    profiler = TableProfiler(space_of(module))
    low, high = profiler.cost.bounds()
    strategy = ENAS(**FEW, penalty=SampleProfilerPenalty(profiler, baseline=3.0), n_candidates=6)
    fit(strategy, module)
    assert strategy.budget() == {profiler: 3.0}
    for architecture in (strategy.architecture(), *strategy.candidates(), *strategy.top_k(8)):
        assert profiler.profile(architecture) <= 3.0
    assert any(profiler.profile(a) > 3.0 for a in strategy.top_k(20, max_cost={profiler: high}))
    assert profiler.profile(strategy.architecture(max_cost={profiler: low})) == low


def test_candidates_are_the_most_probable_the_last_answer_and_draws() -> None:
    strategy = ENAS(**FEW, n_candidates=4)
    strategy.prepare_for(space_of(classification()))
    last = {"width": 4, "op": "conv", "act": "tanh", "depth": 2}
    strategy.judge([(last, {"val_acc": 0.9}), (strategy.space.default(), {"val_acc": 0.1})])
    found = strategy.candidates()
    assert found[:2] == [strategy.controller.greedy(), last]
    assert len({tuple(architecture.values()) for architecture in found}) == 4
    assert strategy.architecture() == last


@without_validation
def test_answer_without_a_validation_is_the_most_probable_architecture() -> None:
    strategy = ENAS(0.02, batches_per_update=10, updates=20, arch_dataloader=loaders()[1])
    trainer(strategy).fit(Scored(is_conv), loaders()[0])
    assert strategy.architecture() == strategy.controller.greedy()
    assert strategy.architecture()["op"] == "conv"


# ---- options and surroundings


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_controller_stays_in_float32(precision: str) -> None:
    strategy = ENAS(0.01, **FEW)
    before = ENAS(**FEW)
    before.prepare_for(space_of(classification()))
    _, made = fit(strategy, Scored(is_conv), precision=precision, max_epochs=2)
    weights = strategy.controller.state_dict()["weights"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not torch.equal(weights["heads"], before.controller.state_dict()["weights"]["heads"])
    assert math.isfinite(float(made.callback_metrics["controller_reward"]))


def test_arguments_reach_the_controller_and_its_learner() -> None:
    strategy = ENAS(
        0.5, learner=partial(PPO, epochs=7), entropy_weight=0.2, skip_weight=0.8, baseline_decay=0.7,
        hidden_size=12, temperature=5.0, tanh_constant=2.5, skip_target=0.3, seed=3,
    )  # fmt: skip
    strategy.prepare_for(space_of(classification()))
    made, controller = strategy.learner, strategy.controller
    assert isinstance(made, PPO)
    assert (made.epochs, made.entropy_weight, made.skip_weight, made.baseline_decay) == (7, 0.2, 0.8, 0.7)
    assert (controller.temperature, controller.tanh_constant, controller.skip_target) == (5.0, 2.5, 0.3)
    assert made.optimizer.param_groups[0]["lr"] == 0.5
    assert {weight.shape[1] for weight in controller.parameters()} == {12}


def test_schedule_of_the_controllers_learning_rate_goes_on_each_epoch_after_the_warm_up() -> None:
    rates: list[float] = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            rates.append(strategy.learner.optimizer.param_groups[0]["lr"])

    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1)
    strategy = ENAS(0.1, **FEW, arch_scheduler=schedule, warmup_epochs=1)
    fit(strategy, None, Look(), max_epochs=4)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


class TwoLoaders(Scored):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_acc", float(dataloader_idx))


def test_episodes_take_the_first_of_two_validation_loaders() -> None:
    episodes = Episodes()
    training, validation = loaders()
    strategy = ENAS(**FEW, learner=episodes, reward_metric_name="val_acc/dataloader_idx_0")
    trainer(strategy).fit(TwoLoaders(is_conv), training, [validation, loaders()[1]])
    assert {reward for _, reward in episodes.all()} == {0.0}


class KilledError(Exception):
    pass


class Killer(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (2, 1):
            raise KilledError


def test_resumed_search_equals_uninterrupted_one_with_everything_on(tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> tuple[ENAS, Any]:
        module = classification()
        profiler = TableProfiler(space_of(module))
        strategy = ENAS(
            0.05,
            batches_per_update=3,
            updates=2,
            update_every_n_steps=3,
            learner=PPO,
            arch_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
            arch_dataloader=DataLoader(Noisy(24, 7), batch_size=4, shuffle=True),
            penalty=SampleProfilerPenalty(profiler, 5.0),
            filter=RangeProfilerFilter(profiler, max=12.0),
        )
        saver = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        fit(strategy, module, saver, *callbacks, max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        return strategy, module

    whole, module = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", Killer())
    again, resumed = run(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt")
    assert_equal(again.state_dict(), whole.state_dict())
    assert_equal(dict(resumed.state_dict()), dict(module.state_dict()))


class OfTheBatch(Scored):
    """Logs, and keeps, a number that hangs on the batch of the rank."""

    def __init__(self) -> None:
        super().__init__(is_conv)
        self.values: Notes[float] = Notes()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.values.append(float(batch[0].mean()))
        self.log("val_acc", self.values[-1], sync_dist=True)


class Saved(pl.Callback):
    """Writes down, on each rank, what was learned from what."""

    def __init__(self, strategy: ENAS, episodes: Episodes, paths: Paths, folder: Path) -> None:
        self.strategy, self.episodes, self.paths, self.folder = strategy, episodes, paths, folder

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        module.values.clear()

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        found = {"policy": self.strategy.policy_state(), "episodes": self.episodes.all()}
        found = {**found, "paths": self.paths.seen, "values": list(module.values)}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def test_ranks_share_their_episodes_and_keep_equal_controllers(tmp_path: Path) -> None:
    episodes, paths = Episodes(), Paths()
    strategy = ENAS(0.05, **FEW, learner=episodes)
    made = trainer(
        strategy, paths, Saved(strategy, episodes, paths, tmp_path), num_sanity_val_steps=0,
        devices=2, strategy="ddp_fork_find_unused_parameters_true",
    )  # fmt: skip
    made.fit(OfTheBatch(), *loaders(batches=8))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal(first["policy"], second["policy"])
    assert first["episodes"] == second["episodes"]
    means = [(a + b) / 2 for a, b in zip(first["values"], second["values"], strict=True)]
    assert first["values"] != second["values"]
    assert [reward for _, reward in first["episodes"]] == pytest.approx(means)
    assert first["paths"] != second["paths"]


# ---- errors


@without_validation
def test_batches_for_episodes_must_come_from_somewhere() -> None:
    with pytest.raises(ValueError, match=r"ENAS\(arch_dataloader=…\), or validation batches"):
        trainer(ENAS()).fit(Scored(is_conv), loaders()[0])
    with pytest.raises(ValueError, match="loader of the architecture batches is empty"):
        trainer(ENAS(arch_dataloader=[])).fit(Scored(is_conv), loaders()[0])


class WithoutValidation(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.space = ModelSpace(TinyNet())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.space(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_module_without_a_validation_step_is_refused() -> None:
    with pytest.raises(
        ValueError, match="ENAS rewards what validation_step logs; WithoutValidation has none"
    ):
        trainer(ENAS(arch_dataloader=loaders()[1])).fit(WithoutValidation(), loaders()[0])


def test_metric_that_is_not_logged_is_named() -> None:
    with pytest.raises(ValueError, match=r"by \('val_f1',\).*it logs \['val_acc', 'val_loss'\]"):
        fit(ENAS(reward_metric_name="val_f1"), num_sanity_val_steps=0)


def test_reward_that_is_no_number_ends_the_search_or_is_left_out() -> None:
    def score(architecture: Mapping[str, Any]) -> float:
        return math.nan if architecture["op"] == "conv" else 0.5

    with pytest.raises(NonFiniteLossError, match="reward of the controller step is nan in epoch 0"):
        fit(ENAS(batches_per_update=20), Scored(score))
    episodes = Episodes()
    fit(
        ENAS(batches_per_update=20, updates=2, learner=episodes, stop_at_non_finite_loss=False), Scored(score)
    )
    assert len(episodes.of_update) == 2
    assert {a["op"] for a, _ in episodes.all()} == {"skip", "point"}
    assert {reward for _, reward in episodes.all()} == {0.5}


def test_checkpoint_of_another_space_names_the_choices() -> None:
    strategy, other = ENAS(**FEW), ENAS(**FEW)
    fit(strategy)
    other.prepare_for(ModelSpace(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="op"))))
    with pytest.raises(
        ValueError, match=r"another space.*'act' \(2 there, 0 here\).*'op' \(3 there, 2 here\)"
    ):
        other.load_state_dict(strategy.state_dict())


@pytest.mark.parametrize("name", ["batches_per_update", "updates", "update_every_n_steps"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be at least 1; got"):
        ENAS(**{name: 0})


def test_filter_and_penalty_that_leave_nothing_are_refused_at_the_start() -> None:
    module = classification()
    profiler = TableProfiler(space_of(module))
    low, high = profiler.cost.bounds()
    strategy = ENAS(
        penalty=SampleProfilerPenalty(profiler, low), filter=RangeProfilerFilter(profiler, min=high), **FEW
    )
    with pytest.raises(ValueError, match=r"\bms\b"):
        strategy.prepare_for(space_of(module))
