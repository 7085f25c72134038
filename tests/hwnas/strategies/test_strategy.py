from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from profilers.penalty import LagrangianPenalty
from tests.hwnas.strategies.tiny import (
    STRATEGIES,
    TableProfiler,
    assert_equal,
    classification,
    fit,
    logits_of,
    space_of,
)

# Going on in the folder of before is what resuming is.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


class Steps(pl.Callback):
    """Counts optimizer steps, and the architecture steps by what a fit of the strategy shows."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.optimizer_steps = 0
        self.moved_in: list[int] = []
        self._before: dict[str, Tensor] = {}

    def on_before_zero_grad(self, *_: Any) -> None:
        self.optimizer_steps += 1

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        now = logits_of(self.strategy)
        if self._before and any(not torch.equal(now[label], self._before[label]) for label in now):
            self.moved_in.append(batch_idx)
        self._before = now

    def on_train_epoch_start(self, *_: Any) -> None:
        self._before = logits_of(self.strategy)


@every_strategy
def test_one_architecture_step_opens_each_accumulation_window(name: str) -> None:
    strategy = STRATEGIES[name](arc_learning_rate=0.1)
    steps = Steps(strategy)
    _, trainer = fit(strategy, None, steps, batches=5, max_epochs=2, accumulate_grad_batches=2)
    assert steps.moved_in == [0, 2, 4] * 2  # the last window of an epoch is short
    assert trainer.global_step == 6


@every_strategy
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    ],
    ids=["clipping", "bf16", "all"],
)
def test_trainer_options_train_weights_and_logits(name: str, options: dict[str, Any]) -> None:
    strategy = STRATEGIES[name](arc_learning_rate=0.1)
    module = classification(schedule="one-cycle")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    _, trainer = fit(strategy, module, max_epochs=2, **options)
    assert trainer.global_step == 8 // options.get("accumulate_grad_batches", 1)
    assert any(not torch.equal(value, before[key]) for key, value in module.named_parameters())
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(p.max() - p.min() > 0.01 for p in strategy.probabilities().values())


@every_strategy
def test_schedule_stops_and_checkpoints_follow_the_subnet(name: str, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=1)
    stop = EarlyStopping("val_acc", mode="max", patience=1)
    strategy = STRATEGIES[name](arc_learning_rate=0.1)
    module = classification(lr=0.0)  # nothing is learned: the second epoch without progress stops
    _, trainer = fit(strategy, module, stop, best, max_epochs=20, enable_checkpointing=True)
    assert trainer.current_epoch < 20
    assert best.best_model_score is not None
    assert best.best_model_score == stop.best_score
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])


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


class KilledError(Exception):
    pass


class Killer(pl.Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise KilledError


class Search:
    """One search of three epochs with everything that must come back."""

    def __init__(self, name: str, folder: Path, *callbacks: pl.Callback, at_train_end: bool = True) -> None:
        self.module = classification()
        penalty = LagrangianPenalty(TableProfiler(space_of(self.module)), baseline=4.0)
        self.strategy = STRATEGIES[name](arc_learning_rate=0.1, penalty=penalty)
        self.metrics = Metrics()
        saver = ModelCheckpoint(folder, save_last=True, save_top_k=-1, save_on_train_epoch_end=at_train_end)
        self.callbacks = (self.metrics, saver, *callbacks)

    def run(self, ckpt_path: Path | None = None, seed: int = 5, max_epochs: int = 3) -> Search:
        options: dict[str, Any] = {"enable_checkpointing": True, "accumulate_grad_batches": 2}
        _, self.trainer = fit(
            self.strategy, self.module, *self.callbacks, ckpt_path=ckpt_path, seed=seed,
            max_epochs=max_epochs, **options,
        )  # fmt: skip
        return self

    def everything(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "strategy": self.strategy.state_dict(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "schedule": self.trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
            "random": torch.get_rng_state(),
            "metrics": self.metrics.of_epoch[2],
        }


@every_strategy
@pytest.mark.parametrize("at_train_end", [True, False], ids=["train-end", "validation-end"])
def test_resumed_search_equals_uninterrupted_one(name: str, at_train_end: bool, tmp_path: Path) -> None:
    whole = Search(name, tmp_path, at_train_end=at_train_end).run()
    # The same schedule, ended early: another process goes on from its first checkpoint.
    (first,) = tmp_path.glob("epoch=0-*.ckpt")
    again = Search(name, tmp_path, at_train_end=at_train_end).run(first, seed=99)
    assert_equal(again.everything(), whole.everything())
    assert again.metrics.of_epoch[1] == whole.metrics.of_epoch[1]


@every_strategy
def test_search_killed_inside_an_epoch_goes_on_from_the_last_checkpoint(name: str, tmp_path: Path) -> None:
    whole = Search(name, tmp_path / "whole").run()
    with pytest.raises(KilledError):
        Search(name, tmp_path / "killed", Killer(2, 3)).run()
    again = Search(name, tmp_path / "killed").run(tmp_path / "killed" / "last.ckpt", seed=99)
    assert_equal(again.everything(), whole.everything())


@every_strategy
def test_checkpoint_holds_tensors_and_plain_python_only(name: str, tmp_path: Path) -> None:
    Search(name, tmp_path).run(max_epochs=1)
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert any("logits" in str(state) for state in loaded["callbacks"].values())
