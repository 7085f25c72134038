from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from hwnas.strategies import DARTS, ENAS, NonFiniteLossError
from profilers.penalty import LagrangianPenalty, SampleProfilerPenalty
from tests.contracts.strategy import Plain, marked_batches, not_a_number
from tests.hwnas.strategies.tiny import (
    EVERY,
    STRATEGIES,
    TableProfiler,
    classification,
    loaders,
    space_of,
    trainer,
)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
def test_checkpoint_before_a_loss_that_is_no_number_can_be_resumed_from(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    batches = marked_batches(9)

    class SecondEpoch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            module.at = 9 if trainer.current_epoch == 1 else -1

    def run(*callbacks: pl.Callback, **options: Any) -> None:
        strategy = DARTS(arch_dataloader=marked_batches(1))
        made = trainer(strategy, saver, *callbacks, max_epochs=2, enable_checkpointing=True)
        made.fit(Plain(-1, not_a_number), batches, **options)

    with pytest.raises(NonFiniteLossError):
        run(SecondEpoch())
    run(ckpt_path=tmp_path / "last.ckpt")


def test_two_strategies_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one strategy decides.*\['DARTS', 'RandomOneShot'\]"):
        trainer(EVERY["darts"](), EVERY["random-one-shot"]()).fit(classification(), *loaders())


@pytest.mark.parametrize("name", [*STRATEGIES, "enas"])
def test_penalty_of_another_kind_is_refused(name: str) -> None:
    profiler = TableProfiler(space_of(classification()))
    make: Any = ENAS if name == "enas" else STRATEGIES[name]
    wrong = (LagrangianPenalty if name == "enas" else SampleProfilerPenalty)(profiler, 5.0)
    with pytest.raises(TypeError, match=f"takes a penalty of .*; got {type(wrong).__name__}"):
        make(penalty=wrong)
