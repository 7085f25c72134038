"""Weight steps that train several paths: what FairNAS and the sandwich rule have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Unpack

import pytorch_lightning as pl
import torch
from torch import Tensor

from hwnas.gate import Gate
from hwnas.strategies.kept_attributes import kept_attributes
from hwnas.strategies.ranks import average
from hwnas.strategies.sampled import SampledOptions, UniformStrategy
from hwnas.strategies.side_effects import captured_logs, muted_loggers, own_random_numbers
from profilers.space import Architecture


class ManyPathsStrategy(UniformStrategy):
    """Trains several paths in each weight step; their gradients are added up.

    Lightning trains the first path; the others follow its backward pass, before gradients are clipped. They
    are scaled as Lightning scales the loss (accumulation, fp16) and averaged over ranks. What the user's step
    logs speaks for the first path. All ranks draw the same paths.

    Args:
        options: as in `SampledStrategy` and `Strategy`.
    """

    def __init__(self, **options: Unpack[SampledOptions]) -> None:
        super().__init__(**options)
        self._others: list[Architecture] = []
        self._batch: tuple[Any, int] | None = None

    @abstractmethod
    def paths(self, generator: torch.Generator) -> list[Architecture]:
        """The paths of one weight step; at least one."""

    @abstractmethod
    def other_loss(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> Tensor | None:
        """The loss of a path after the first, whose gates are installed; None: it is left out."""

    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return self.space.gates_of(self.paths(generator)[0])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        first, *self._others = self.paths(self.generator(trainer, 0))
        self.space.gates = self.space.gates_of(first)
        self._batch = batch, batch_idx

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._batch is not None  # a training batch has begun
        batch, batch_idx = self._batch
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for number, architecture in enumerate(self._others):
            with (
                own_random_numbers(self.step_seed(trainer, 20 + number)),
                kept_attributes(pl_module),
                captured_logs(pl_module, None, 1),
                muted_loggers(trainer),
                self._metrics.installed(),
                self.space.running(self.space.gates_of(architecture)),
                trainer.precision_plugin.train_step_context(),
            ):
                loss = self.other_loss(trainer, pl_module, batch, batch_idx)
            if loss is None:
                continue
            self.check_finite(loss, trainer, "loss of the weight")
            loss = loss / trainer.accumulate_grad_batches
            _add_gradients(pl_module, loss if scaler is None else scaler.scale(loss))

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        self._batch = None
        self._others = []


def _add_gradients(pl_module: pl.LightningModule, loss: Tensor) -> None:
    parameters = [p for p in pl_module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
    average([gradient for _, gradient in pairs])  # all ranks ran the same path
    for parameter, gradient in pairs:
        # Not in place: DDP's gradients are views of its buckets.
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
