from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from tests.hwnas.strategies.tiny import STRATEGIES, classification, fit, logits_of

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
