"""Stops a training whose loss is no number, before any weight is touched by it."""

from __future__ import annotations

import math
from typing import final

import pytorch_lightning as pl
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became infinite or not a number; no weight was changed by it."""


def check_finite(number: Tensor, trainer: pl.Trainer, what: str) -> None:
    """Raises `NonFiniteLossError` that says where ``what`` stopped being a number, and what to do."""
    value = float(number.detach())
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the {what} step is {value} in epoch {trainer.current_epoch}, step {trainer.global_step}; no "
            "weight was changed by it, and what was saved before is good: lower the learning rate or clip "
            "gradients (Trainer(gradient_clip_val=…)) and resume from the last checkpoint, if there is one"
        )


@final
class StopAtNonFiniteLoss(pl.Callback):
    """Ends a training with `NonFiniteLossError` at the first loss that is no number."""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        check_finite(loss, trainer, "loss of the weight")
