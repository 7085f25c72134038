"""Progress of long steps: a callback that libraries call, drawn by rich on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from lookup_tables.progress import Progress


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """Draws one bar for each step that reports, with the time that it still needs at its recent speed."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, speed_estimate_period=60.0) as drawn:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = drawn.add_task(what, total=total, completed=done)
            drawn.update(tasks[what], completed=done, total=total)

        yield report


@final
class ReportProgress(pl.Callback):
    """Reports a Lightning fit batch by batch; validation batches count as what they cost.

    Args:
        report: where it goes.
        what: the name of the step.
    """

    def __init__(self, report: Progress, what: str) -> None:
        self._report = report
        self._what = what
        self._validated = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A resumed fit has its first epochs behind it.
        self._validated = trainer.current_epoch * _validation_batches(trainer)
        self._say(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._say(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._validated += 1
            self._say(trainer)

    def _say(self, trainer: pl.Trainer) -> None:
        epochs = trainer.max_epochs or 1
        trained = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        total = epochs * (int(trainer.num_training_batches) + _validation_batches(trainer))
        self._report(self._what, min(trained + self._validated, total), total)


def _validation_batches(trainer: pl.Trainer) -> int:
    return sum(int(count) for count in trainer.num_val_batches)
