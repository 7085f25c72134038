"""What every search strategy promises, as a test case for strategies of your own, too.

::

    from tests.contracts.strategy import StrategyContract

    class TestMine(StrategyContract):
        def make(self, **options):
            return Mine(**options)
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from hwnas import LayerChoice, ModelSpace
from hwnas.classification import Classification
from hwnas.derive import score
from hwnas.recalibrate import recalibrate
from hwnas.strategies import NonFiniteLossError, Strategy
from hwnas.strategies.differentiable import DifferentiableStrategy
from hwnas.strategies.side_effects import random_states
from profilers import LagrangianPenalty, Profiler
from tests.hwnas.strategies.tiny import (
    CLASSES,
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


class StrategyContract(ABC):
    """What every strategy promises, in searches of a few steps in the space of `TinyNet`.

    Subclass it as ``Test…`` and say how the strategy is made.
    """

    trainer_options: ClassVar[Mapping[str, Any]] = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
        "precision": "bf16-mixed",
    }
    """What of Lightning's trainer it works with."""

    learns: ClassVar[bool] = True
    """Whether its probabilities move once the warm-up is over."""

    runs_one_path: ClassVar[bool] = False
    """Whether a weight step trains one path and does nothing else: where all paths are one network, training
    is then as it is without the strategy."""

    paths_of_ranks: ClassVar[Literal["same", "own"] | None] = None
    """Whether the processes of a distributed training train the same paths or each its own; None: either."""

    @abstractmethod
    def make(self, **options: Any) -> Strategy:
        """The strategy, such that a few steps move it.

        Args:
            options: the keywords that every strategy takes (`hwnas.strategies.strategy.StrategyOptions`),
                and what `within` returns.
        """

    def within(self, profiler: Profiler, most: float) -> dict[str, Any]:
        """Keywords for `make` with which it searches under a budget; none: it knows no budget."""
        return {}

    # ---- the answer

    def test_probabilities_of_each_choice_sum_to_one(self) -> None:
        strategy = self._searched()
        found = strategy.probabilities()
        assert found.keys() == strategy.space.options.keys()
        for label, p in found.items():
            assert p.shape == (len(strategy.space.options[label]),)
            assert not p.requires_grad
            assert bool((p >= 0).all())
            assert float(p.sum()) == pytest.approx(1, abs=1e-5)

    def test_everything_returned_keeps_to_the_budgets_that_are_asked_for(self) -> None:
        strategy = self._searched()
        profiler = TableProfiler(strategy.space)
        costs = sorted(profiler.profile(architecture) for architecture in strategy.space.grid())
        for most in (costs[0], costs[2], costs[len(costs) // 2], costs[-1]):
            found = strategy.top_k(4, max_cost={profiler: most})
            assert len(found) == min(4, sum(cost <= most for cost in costs))
            for architecture in (*found, strategy.architecture(max_cost={profiler: most})):
                assert profiler.profile(architecture) <= most
        with pytest.raises(ValueError, match=r"\bms\b"):
            strategy.architecture(max_cost={profiler: costs[0] - 0.5})

    def test_budget_that_was_searched_under_holds_where_none_is_asked_for(self) -> None:
        module = classification()
        profiler = TableProfiler(space_of(module))
        options = self.within(profiler, 4.0)
        strategy = self.make(**options)
        _, made = fit(strategy, module, batches=2)
        assert strategy.budget() == ({profiler: 4.0} if options else {})
        if options:
            for architecture in (*strategy.top_k(5), strategy.architecture(), strategy.validated):
                assert profiler.profile(architecture) <= 4.0
            assert float(made.callback_metrics["expected_ms"]) == pytest.approx(
                strategy.expected_cost(profiler)
            )

    def test_top_k_are_different_networks_and_the_answer_is_the_first(self) -> None:
        strategy = self._searched()
        found = strategy.top_k(10)
        assert found[0] == strategy.top_k(1)[0] == strategy.architecture()
        assert all(strategy.space.canonical(architecture) == architecture for architecture in found)
        assert len({tuple(architecture.items()) for architecture in found}) == 10

    def test_fitted_strategy_is_copied_and_pickled_with_its_answer(self) -> None:
        strategy = self._searched()
        for again in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
            assert again.architecture() == strategy.architecture()
            assert_equal(again.state_dict(), strategy.state_dict())

    def test_expected_cost_is_within_the_bounds_and_the_entropy_is_logged(self) -> None:
        module, strategy = classification(), self.make()
        _, made = fit(strategy, module, batches=1)
        profiler = TableProfiler(strategy.space)
        low, high = profiler.cost.bounds()
        assert low < strategy.expected_cost(profiler) < high
        entropies = [-(p * p.clamp_min(1e-12).log()).sum() for p in strategy.probabilities().values()]
        logged = float(made.callback_metrics["architecture_entropy"])
        assert logged == pytest.approx(float(torch.stack(entropies).mean()), rel=1e-4)

    # ---- in a trainer

    def test_accumulation_clipping_and_low_precision_train_weights_and_policy(self) -> None:
        strategy, module = self.make(), classification(schedule="one-cycle")
        started = AtEpochs(strategy)
        before = {key: value.clone() for key, value in module.named_parameters()}
        _, made = fit(strategy, module, started, max_epochs=2, **self.trainer_options)
        assert made.global_step == 8 // self.trainer_options.get("accumulate_grad_batches", 1)
        assert any(not torch.equal(value, before[key]) for key, value in module.named_parameters())
        assert all(parameter.isfinite().all() for parameter in module.parameters())
        moved = _difference(started.probabilities[0], strategy.probabilities())
        assert (moved > 1e-3) == self.learns

    def test_policy_rests_during_the_warm_up(self) -> None:
        strategy = self.make(warmup_epochs=1)
        started = AtEpochs(strategy)
        fit(strategy, None, started, max_epochs=2)
        assert _difference(started.probabilities[0], started.probabilities[1]) == 0
        moved = _difference(started.probabilities[1], strategy.probabilities())
        assert (moved > 1e-3) == self.learns

    def test_answer_of_each_epoch_and_probabilities_of_some_steps_are_logged(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        strategy = self.make(log_prob_every_n_step=3)
        fit(strategy, batches=4, max_epochs=2, logger=logger, log_every_n_steps=1)
        logger.save()
        (found,) = tmp_path.rglob("metrics.csv")
        header, *rows = (line.split(",") for line in found.read_text().splitlines())
        step, chance, answer = map(header.index, ("step", "probability/op/conv", "architecture/op"))
        assert [row[step] for row in rows if row[chance]] == ["0", "3", "6"]
        told = [float(row[answer]) for row in rows if row[answer]]
        assert len(told) == 2
        assert strategy.validated is not None
        assert told[-1] == strategy.space.options["op"].index(strategy.validated["op"])

    def test_schedule_stops_and_checkpoints_follow_the_subnet(self, tmp_path: Path) -> None:
        best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=1)
        stop = EarlyStopping("val_acc", mode="max", patience=1)
        module = classification(lr=0.0)  # nothing is learned: the second epoch without progress stops
        _, made = fit(self.make(), module, stop, best, max_epochs=20, enable_checkpointing=True)
        assert made.current_epoch < 20
        assert best.best_model_score is not None
        assert best.best_model_score == stop.best_score
        rate = made.optimizers[0].param_groups[0]["lr"]
        assert rate == pytest.approx(made.lr_scheduler_configs[0].scheduler.get_last_lr()[0])

    def test_training_step_may_return_a_dictionary_or_nothing(self) -> None:
        for returned in (as_dictionary, nothing):
            strategy = self.make()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*training_step. returned .None.")
                trainer(strategy).fit(Faulty(9, returned), marked_batches(9), loaders()[1])
            assert strategy.architecture()

    @pytest.mark.slow
    @pytest.mark.timeout(120)
    def test_ranks_end_with_one_policy_one_answer_and_equal_weights(self, tmp_path: Path) -> None:
        first, second = ranks_of(self._search(), tmp_path)
        assert_equal(second["policy"], first["policy"])
        assert_equal(second["weights"], first["weights"])
        assert second["answer"] == first["answer"]
        assert second["metrics"]["supernet_val_loss"] == first["metrics"]["supernet_val_loss"]
        if self.paths_of_ranks is not None:
            assert len(first["paths"]) == len(second["paths"]) == 4
            assert (first["paths"] == second["paths"]) == (self.paths_of_ranks == "same")

    # ---- resuming

    def test_weights_of_a_checkpoint_are_judged_with_its_answer(self, tmp_path: Path) -> None:
        strategy = self.make()
        module, made = fit(strategy)
        made.save_checkpoint(tmp_path / "searched.ckpt")
        again = self.make()
        file = tmp_path / "searched.ckpt"
        trainer(again).test(classification(), loaders()[1], ckpt_path=file, verbose=False)
        assert_equal(again.policy_state(), strategy.policy_state())
        assert again.validated == strategy.architecture()
        made.save_checkpoint(tmp_path / "foreign.ckpt", weights_only=True)
        with pytest.warns(UserWarning, match="holds nothing of"):
            trainer(again).test(module, loaders()[1], ckpt_path=tmp_path / "foreign.ckpt", verbose=False)

    def test_search_resumed_at_the_end_of_an_epoch_equals_an_uninterrupted_one(self, tmp_path: Path) -> None:
        whole = self._search().run(tmp_path)
        for written in ("training", "validation"):
            # The same schedule, ended early: another process goes on from its first checkpoint.
            again = self._search().run(ckpt_path=tmp_path / written / "epoch=0.ckpt", seed=99)
            assert_equal(again.everything(), whole.everything())
            assert again.metrics.of_epoch[1] == whole.metrics.of_epoch[1]

    def test_search_killed_inside_an_epoch_goes_on_from_the_last_checkpoint(self, tmp_path: Path) -> None:
        whole = self._search().run(max_epochs=2)
        with pytest.raises(KilledError):
            self._search(Killer(1, 3)).run(tmp_path, max_epochs=2)
        again = self._search().run(ckpt_path=tmp_path / "training" / "epoch=0.ckpt", seed=99, max_epochs=2)
        assert_equal(again.everything(), whole.everything())

    def test_state_is_tensors_and_plain_python_that_bring_the_policy_back(self) -> None:
        strategy = self._searched()
        file = io.BytesIO()
        torch.save(strategy.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        for comes_first in ("state", "space"):
            again = self.make()
            if comes_first == "space":
                again.prepare_for(strategy.space)
            again.load_state_dict(loaded)
            again.prepare_for(strategy.space)
            assert_equal(again.policy_state(), strategy.policy_state())
            assert_equal(again.probabilities(), strategy.probabilities())
            assert again.architecture() == strategy.architecture()

    # ---- no trace

    def test_what_comes_before_a_step_leaves_weights_gradients_and_buffers_alone(self) -> None:
        module, around = classification(), Around()
        next(module.parameters()).requires_grad_(False)
        trainer(around, self.make(), around).fit(module, *loaders())
        assert around.compared == 4
        assert not next(module.parameters()).requires_grad
        assert space_of(module).gates is None

    def test_what_the_users_module_collects_is_of_its_own_steps_alone(self) -> None:
        module = Collecting()
        logger = DirectLogger()
        _, made = fit(self.make(), module, num_sanity_val_steps=0, logger=logger, log_every_n_steps=1)
        assert module.steps == module._hidden == module.meter.count == module.counting.calls == 4
        assert float(module.total) == float(module.array[0]) == 4.0
        assert [metric.update_count for metric in module.metrics["train"].values()] == [4, 4]
        accuracy = module.metrics["train"]["accuracy"]
        assert int(accuracy.tp.sum() + accuracy.fn.sum()) == 32
        assert module.seen == {"train": [0, 1, 2, 3]}
        assert list(module.recent) == module.meter.batches == [0, 1, 2, 3]
        numbers = random.Random(0)
        for _ in range(4):
            numbers.random()
        assert module.numbers.getstate() == numbers.getstate()
        assert logger.direct == 4
        assert made.callback_metrics["count"] == 2.0

    def test_epoch_that_the_users_hook_ends_leaves_no_gates(self) -> None:
        module = EndsItsEpoch(-1, nothing)
        trainer(self.make()).fit(module, *loaders(4))
        _assert_no_trace(module)

    def test_metrics_are_updated_once_a_batch(self) -> None:
        counts = Counts()
        _, made = fit(self.make(), Watched(TinyNet()), counts)
        assert [count for count, _, _ in counts.found] == [1, 2, 3, 4]
        assert float(made.callback_metrics["train_updates"]) == 32
        assert float(made.callback_metrics["val_seen"]) == 16
        assert float(made.callback_metrics["supernet_val_seen"]) == 16

    def test_random_numbers_and_what_one_path_logs_are_those_without_the_strategy(self) -> None:
        # Not TinyNet: dropout draws as many numbers as there are channels.
        expected, found = _watched(None), _watched(self.make())
        assert_equal(found["random"], expected["random"])
        names = {"train_loss_epoch", "train_acc_epoch", "train_f1_epoch", "b_epoch"}
        assert names < expected["logged"].keys()
        if self.runs_one_path:
            for key in ("counts", "module"):
                assert_equal(found[key], expected[key])
            assert_equal({n: found["logged"][n] for n in expected["logged"]}, expected["logged"])

    def test_error_in_a_step_leaves_no_trace(self) -> None:
        for module in (Faulty(9, failing), FaultyValidation(-1, nothing)):
            with pytest.raises(KilledError):
                trainer(self.make()).fit(module, marked_batches(9), loaders()[1])
            _assert_no_trace(module)

    def test_loss_that_is_no_number_stops_before_any_weight_is_touched(self) -> None:
        module, keep = Faulty(9, not_a_number), Weights()
        with pytest.raises(NonFiniteLossError, match=r"step is nan in epoch 0, step 2.*resume"):
            trainer(keep, self.make()).fit(module, marked_batches(9), loaders()[1])
        assert_equal(dict(module.named_parameters()), keep.before)

    # ---- validation

    def test_validation_judges_the_recalibrated_subnet_and_leaves_the_supernet_alone(self) -> None:
        strategy, module, recorder = self.make(), classification(), Recorder()
        training, validation = DataLoader(Noisy(32, 1, 0.0), batch_size=8), loaders(noise=0.0)[1]
        made = trainer(strategy, recorder)
        made.fit(module, training, validation)
        assert strategy.validated is not None
        subnet = recalibrate(strategy.space.freeze(strategy.validated), training).eval()
        losses = [F.cross_entropy(subnet(images), labels).detach() for images, labels in validation]
        assert float(made.callback_metrics["val_loss"]) == pytest.approx(float(sum(losses) / 2), rel=1e-5)
        assert float(made.callback_metrics["supernet_val_loss"]) != float(made.callback_metrics["val_loss"])
        assert recorder.validations == 2  # Lightning's sanity check is one

    def test_weights_that_are_swapped_for_validation_are_seen(self) -> None:
        for order in (1, -1):
            made = trainer(*[ZeroedHead(), self.make()][::order])
            made.fit(classification(), *loaders(batches=1))
            assert float(made.callback_metrics["val_loss"]) == pytest.approx(math.log(CLASSES))
            assert float(made.callback_metrics["supernet_val_loss"]) == pytest.approx(math.log(CLASSES))

    def test_two_validation_loaders_are_told_apart(self) -> None:
        made = trainer(self.make())
        training, validation = loaders(batches=1)
        made.fit(TwoLoaders(-1, nothing), training, [validation, loaders()[1]])
        for index in (0, 1):
            assert float(made.callback_metrics[f"val_which/dataloader_idx_{index}"]) == index
            assert float(made.callback_metrics[f"supernet_val_which/dataloader_idx_{index}"]) == index

    # ---- errors

    def test_network_without_one_space_and_manual_optimisation_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"the one ModelSpace inside.*Classification contains 0"):
            trainer(self.make()).fit(Classification(nn.Flatten(), CLASSES), *loaders())
        two = Faulty(-1, nothing)
        two.other = ModelSpace(TinyNet())
        with pytest.raises(ValueError, match="Faulty contains 2"):
            trainer(self.make()).fit(two, *loaders())
        manual = Faulty(-1, nothing)
        manual.automatic_optimization = False
        with pytest.raises(ValueError, match="automatic_optimization = False"):
            trainer(self.make()).fit(manual, *loaders())

    def test_architecture_before_the_fit_says_what_is_missing(self) -> None:
        with pytest.raises(RuntimeError, match=r"has not seen a space yet.*Trainer\(callbacks="):
            self.make().architecture()

    def test_impossible_counts_are_refused(self) -> None:
        for options in ({"warmup_epochs": -1}, {"recalibration_batches": 0}):
            with pytest.raises(ValueError, match="warmup_epochs must be at least 0"):
                self.make(**options)

    # ---- helpers

    def _searched(self) -> Strategy:
        """After two steps and a validation."""
        fit(strategy := self.make(), batches=2)
        return strategy

    def _search(self, *callbacks: pl.Callback) -> Search:
        module = classification()
        strategy = self.make(**self.within(TableProfiler(space_of(module)), 4.0))
        accumulated = self.trainer_options.get("accumulate_grad_batches", 1)
        return Search(strategy, module, accumulated, *callbacks)


class DifferentiableStrategyContract(StrategyContract):
    """What a strategy promises besides whose logits learn by gradient, from batches of their own.

    `make` takes the keywords that all of these share
    (`hwnas.strategies.differentiable.DifferentiableOptions`).
    """

    @abstractmethod
    def make(self, **options: Any) -> DifferentiableStrategy:
        """The strategy, with a learning rate of about 0.1."""

    def within(self, profiler: Profiler, most: float) -> dict[str, Any]:
        return {"penalty": LagrangianPenalty(profiler, baseline=most)}

    def test_schedule_of_the_architectures_learning_rate_goes_on_each_epoch_after_the_warm_up(self) -> None:
        schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1)
        strategy = self.make(arch_scheduler=schedule, warmup_epochs=1)
        rates: list[float] = []

        class Look(pl.Callback):
            def on_train_epoch_end(self, *_: Any) -> None:
                rates.append(strategy.policy_state()["optimizer"]["param_groups"][0]["lr"])

        fit(strategy, None, Look(), max_epochs=4, batches=1)
        assert rates == pytest.approx([rates[0], rates[0], rates[0] / 10, rates[0] / 100])

    def test_architectures_come_in_the_order_of_their_score(self) -> None:
        strategy = self._searched()
        scores = score(strategy.space, strategy.probabilities())
        found = [scores.of(architecture) for architecture in strategy.top_k(10)]
        expected = sorted((scores.of(architecture) for architecture in strategy.space.grid()), reverse=True)
        assert found == pytest.approx(expected[:10])

    def test_one_architecture_step_opens_each_accumulation_window(self) -> None:
        strategy = self.make()
        steps, window = Steps(strategy), self.trainer_options.get("accumulate_grad_batches", 1)
        _, made = fit(strategy, None, steps, batches=5, max_epochs=2, accumulate_grad_batches=window)
        opening = list(range(0, 5, window))  # the last window of an epoch may be short
        assert steps.moved_in == opening * 2
        assert made.global_step == 2 * len(opening)

    def test_architecture_parameters_are_in_no_optimizer_of_the_user(self) -> None:
        strategy = self.make()
        module, made = fit(strategy, batches=1)
        mine = {id(parameter) for parameter in strategy.logits.parameters()}
        assert mine
        assert not mine & {id(parameter) for parameter in module.parameters()}
        groups = made.optimizers[0].param_groups
        assert not mine & {id(parameter) for group in groups for parameter in group["params"]}

    def test_error_in_an_architecture_step_leaves_no_trace(self) -> None:
        module = Plain(9, failing)
        with pytest.raises(KilledError):
            trainer(self.make(arch_dataloader=marked_batches(9))).fit(module, marked_batches(1))
        assert all(parameter.requires_grad for parameter in module.parameters())
        _assert_no_trace(module)

    def test_architecture_step_may_return_a_dictionary_or_nothing(self) -> None:
        for returned in (as_dictionary, nothing):
            strategy = self.make(arch_dataloader=marked_batches(9, ordinary=0))
            trainer(strategy).fit(Plain(9, returned), marked_batches(1))
            moved = [p.max() - p.min() > 2e-3 for p in strategy.probabilities().values()]
            assert all(moved) if returned is as_dictionary else not any(moved)

    def test_architecture_loss_that_is_no_number_stops_before_any_weight_is_touched(self) -> None:
        module, keep = Plain(9, not_a_number), Weights()
        strategy = self.make(arch_dataloader=marked_batches(9))
        with pytest.raises(NonFiniteLossError, match=r"architecture step is nan in epoch 0, step 2.*resume"):
            trainer(keep, strategy).fit(module, marked_batches(1))
        assert_equal(dict(module.named_parameters()), keep.before)
        assert all(p.isfinite().all() for p in strategy.probabilities().values())

    def test_architecture_batches_must_come_from_somewhere(self) -> None:
        with pytest.raises(ValueError, match=r"arch_dataloader=…\), or validation batches"):
            trainer(self.make()).fit(Plain(-1, nothing), loaders()[0])
        with pytest.raises(ValueError, match="loader of the architecture batches is empty"):
            trainer(self.make(arch_dataloader=[])).fit(Plain(-1, nothing), loaders()[0])

    def test_checkpoint_of_another_space_names_the_choices(self) -> None:
        strategy, other = self.make(), self.make()
        strategy.prepare_for(ModelSpace(TinyNet()))
        other.prepare_for(ModelSpace(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="op"))))
        with pytest.raises(
            ValueError, match=r"another space.*'act' \(2 there, 0 here\).*'op' \(3 there, 2 here\)"
        ):
            other.load_state_dict(strategy.state_dict())


# ---- what is watched


class AtEpochs(pl.Callback):
    """The probabilities as each epoch begins, before its first step."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.probabilities: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.probabilities.append({n: p.clone() for n, p in self.strategy.probabilities().items()})


class Steps(pl.Callback):
    """The batches of each epoch before which the logits have moved."""

    def __init__(self, strategy: DifferentiableStrategy) -> None:
        self.strategy = strategy
        self.moved_in: list[int] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._before = self._now()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        now = self._now()
        if any(not torch.equal(now[label], self._before[label]) for label in now):
            self.moved_in.append(batch_idx)
        self._before = now

    def _now(self) -> dict[str, Tensor]:
        return self.strategy.logits.state_dict()


class Around(pl.Callback):
    """Stands before and after the strategy, and compares what must not move between."""

    def __init__(self) -> None:
        self.before: dict[str, Any] | None = None
        self.compared = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        now = {
            "state": {key: value.clone() for key, value in module.state_dict().items()},
            "gradients": [p.grad if p.grad is None else p.grad.clone() for p in module.parameters()],
            "asking": [p.requires_grad for p in module.parameters()],
        }
        if self.before is None:
            self.before = now
        else:
            assert_equal(now, self.before)
            self.before, self.compared = None, self.compared + 1


class Weights(pl.Callback):
    """The weights as the last training batch began."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.before = {key: nn.Parameter(value.detach().clone()) for key, value in module.named_parameters()}


class Recorder(pl.Callback):
    """The supernet's state around each validation."""

    def __init__(self) -> None:
        self.validations = 0

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._before = {key: value.clone() for key, value in space_of(module).state_dict().items()}

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert_equal(dict(space_of(module).state_dict()), self._before)
        self.validations += 1


class ZeroedHead(pl.Callback):
    """Swaps weights for the validation, as averaged weights (EMA) are swapped in."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._kept = {key: value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad():
            for parameter in space_of(module).network.head.parameters():
                parameter.zero_()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.load_state_dict(self._kept)


class Metrics(pl.Callback):
    """What was logged by the end of each epoch."""

    def __init__(self) -> None:
        self.of_epoch: dict[int, dict[str, float]] = {}

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._keep(trainer, trainer.current_epoch - 1)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._keep(trainer, trainer.current_epoch - 1)

    def _keep(self, trainer: pl.Trainer, epoch: int) -> None:
        self.of_epoch[epoch] = {name: float(value) for name, value in trainer.callback_metrics.items()}


class Counts(pl.Callback):
    """What a `Watched` has counted after each batch."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Watched, *_: Any) -> None:
        self.found.append((int(module.updates.count), int(module.updates.images), module.total.clone()))


class WrittenDown(pl.Callback):
    """Weights, policy, answer and metrics of this rank, and the paths that it trained."""

    def __init__(self, strategy: Strategy, folder: Path) -> None:
        self.strategy = strategy
        self.folder = folder
        self.paths: list[Any] = []

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        gates = space_of(module).gates
        assert gates is not None
        self.paths.append([gate.picked for gate in gates.values()])

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found = {
            "weights": dict(module.named_parameters()),
            "policy": self.strategy.policy_state(),
            "answer": self.strategy.architecture(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "paths": self.paths,
        }
        torch.save(found, self.folder / f"rank-{trainer.global_rank}.pt")


class KilledError(Exception):
    pass


class Killer(pl.Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise KilledError


# ---- what is searched


class AtTheEndOfValidation(ModelCheckpoint):
    """Of a class of its own, so that a trainer takes two."""


class Search:
    """One search with everything that must come back."""

    def __init__(
        self, strategy: Strategy, module: pl.LightningModule, accumulated: int, *callbacks: pl.Callback
    ) -> None:
        self.strategy, self.module, self.accumulated = strategy, module, accumulated
        self.metrics = Metrics()
        self.callbacks = (self.metrics, *callbacks)

    def run(
        self,
        folder: Path | None = None,
        ckpt_path: Path | None = None,
        seed: int = 5,
        max_epochs: int = 3,
    ) -> Search:
        """With ``folder``, each epoch is saved there, at the end of its validation and of its training."""
        savers: list[pl.Callback] = []
        if folder is not None:
            every: dict[str, Any] = {"filename": "{epoch}", "save_top_k": -1}
            savers = [
                ModelCheckpoint(folder / "training", save_on_train_epoch_end=True, **every),
                AtTheEndOfValidation(folder / "validation", save_on_train_epoch_end=False, **every),
            ]
        with warnings.catch_warnings():
            # Who goes on saves nothing.
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used")
            _, self.trainer = fit(
                self.strategy, self.module, *self.callbacks, *savers, ckpt_path=ckpt_path, seed=seed,
                max_epochs=max_epochs, accumulate_grad_batches=self.accumulated,
                enable_checkpointing=bool(savers),
            )  # fmt: skip
        return self

    def everything(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "strategy": self.strategy.state_dict(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "schedule": self.trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
            "random": torch.get_rng_state(),
            "metrics": self.metrics.of_epoch[max(self.metrics.of_epoch)],
        }


def ranks_of(search: Search, folder: Path) -> list[dict[str, Any]]:
    """What both ranks of a search on two processes end with."""
    several = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True, start_method="fork")
    written = WrittenDown(search.strategy, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's and torch's, on how processes are started
        made = trainer(search.strategy, written, max_epochs=2, devices=2, strategy=several)
        made.fit(search.module, *loaders())
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


class Plain(pl.LightningModule):
    """Trains, and returns what it is told to for batches whose first label is ``at``."""

    def __init__(self, at: int, returned: Any) -> None:
        super().__init__()
        self.space = ModelSpace(TinyNet())
        self.at, self.returned = at, returned

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        loss = F.cross_entropy(self.space(images), labels.clamp(max=CLASSES - 1))
        return self.returned(loss) if int(labels[0]) == self.at else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Faulty(Plain):
    """One with a validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.space(images), labels))


class FaultyValidation(Plain):
    """One whose validation fails half-way."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise KilledError
        self.log("val_loss", self.space(batch[0]).sum())


class Collecting(pl.LightningModule):
    """Collects what its steps see, and logs at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ModelSpace(TinyNet())
        self.seen: dict[str, list[int]] = {"train": []}
        self.validated: list[int] = []
        self.steps = 0
        self._hidden = 0
        self.total = torch.zeros(())
        self.array = np.zeros(1)
        self.recent: deque[int] = deque(maxlen=9)
        self.meter = Meter()
        self.numbers = random.Random(0)
        self.counting = CountingLoss()
        scores = {"accuracy": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)}
        self.metrics = {"train": MetricCollection(scores, compute_groups=False)}  # no child of the module

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.seen["train"].append(batch_idx)
        self._hidden += 1
        self.total += 1
        self.array[0] += 1
        self.recent.append(batch_idx)
        self.meter.count += 1
        self.meter.batches.append(batch_idx)
        self.metrics["train"].update(torch.eye(3)[batch[1]], batch[1])
        self.numbers.random()
        assert self.logger is not None
        self.logger.log_metrics({"direct": 1.0})
        loss: Tensor = self.counting(self.network(batch[0]), batch[1])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch_idx)
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.log("count", float(len(self.validated)))
        self.validated.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Meter:
    """What users keep an average with."""

    def __init__(self) -> None:
        self.count = 0
        self.batches: list[int] = []


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(scores, labels)


class DirectLogger(DummyLogger):
    """Counts what a step writes to ``self.logger`` itself."""

    direct = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.direct += "direct" in metrics


class EndsItsEpoch(Faulty):
    """One that skips the rest of an epoch, as Lightning lets it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class TwoLoaders(Plain):
    """One whose validation knows its loader."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.space(images), labels))
        self.log("val_which", float(dataloader_idx))


def marked_batches(mark: int, ordinary: int = 2) -> DataLoader[Any]:
    """Ordinary batches, then one that is marked by its label."""
    labels = [*[torch.zeros(4, dtype=torch.long)] * ordinary, torch.full((4,), mark)]
    return DataLoader([(torch.randn(4, 1, 8, 8), label) for label in labels], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def nothing(loss: Tensor) -> Any:
    return None


def as_dictionary(loss: Tensor) -> Any:
    return {"loss": loss, "more": 1}


def not_a_number(loss: Tensor) -> Any:
    return loss * torch.nan


def failing(loss: Tensor) -> Any:
    raise KilledError


class Updates(Metric):
    """How often, and on how many images, it was updated."""

    full_state_update = False
    count: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        self.count += 1
        self.images += len(scores)

    def compute(self) -> Tensor:
        return self.images.float()


class Same(nn.Module):
    """Every option is one network: training is the same whatever a strategy of one path picks."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.op = LayerChoice([shared, shared, shared], label="op")
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.op(images))
        return scores


class Watched(pl.LightningModule):
    """Logs in every way that a user may, and counts what its metrics see."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.space = ModelSpace(Same() if network is None else network)
        self.updates = Updates()
        self.several = MetricCollection(
            {"acc": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES)}, prefix="train_"
        )
        self.inner = nn.ModuleDict({"acc": MulticlassAccuracy(CLASSES)})
        self.seen = Updates()
        self.register_buffer("total", torch.zeros(()))
        self.total: Tensor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        scores = self.space(images)
        loss = F.cross_entropy(scores, labels)
        self.total = self.total + loss.detach()  # a buffer that is replaced
        self.updates(scores)
        self.inner["acc"](scores, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_inner", self.inner["acc"], on_epoch=True)
        self.log_dict({"a": loss.detach() * 2, "b": scores.detach().sum()}, on_epoch=True)
        self.log_dict(self.several(scores, labels), on_epoch=True)
        self.log("train_updates", self.updates, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        scores = self.space(images)
        self.seen(scores)
        self.log("val_seen", self.seen)
        self.log("val_loss", F.cross_entropy(scores, labels))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


# ---- how it is compared


def _watched(strategy: Strategy | None) -> dict[str, Any]:
    """A training of two epochs, in a space in which all paths are one."""
    counts = Counts()
    random.seed(3)
    module, made = fit(strategy, Watched(), counts, max_epochs=2)
    # What is validated is another network with a strategy: a recalibrated subnet.
    logged = {n: v for n, v in made.callback_metrics.items() if not n.startswith("val_")}
    return {
        "logged": logged,
        "module": module.state_dict(),
        "counts": counts.found,
        "random": random_states(),
    }


def _difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The greatest of any option's probability."""
    return max(float((before[label] - after[label]).abs().max()) for label in before)


def _assert_no_trace(module: Plain) -> None:
    assert module.space.gates is None
    assert module.space._stand_in is None
    assert "log" not in vars(module)
