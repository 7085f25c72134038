"""The sandwich rule: the largest, the smallest and a few random networks in each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, final

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hwnas.space import ModelSpace
from hwnas.strategies.differentiable import loss_of
from hwnas.strategies.many_paths import ManyPathsStrategy
from hwnas.strategies.sampled import SampledOptions
from profilers.params import ParamsProfiler
from profilers.profile import Profiler
from profilers.program import minimise
from profilers.space import Architecture

Distillation = Callable[[Any, Any], Tensor]


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean cross-entropy of scores ``(N, classes, ...)`` against another network's (arXiv 1503.02531).

    >>> scores = torch.tensor([[2.0, 0.0]])
    >>> float(soft_cross_entropy(scores, scores)) < float(soft_cross_entropy(-scores, scores))
    True
    """
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"soft_cross_entropy compares tensors of scores; the network returns a {type(teacher).__name__}: "
            "give Sandwich(distillation=…) a loss of two such outputs, or None to train on the labels"
        )
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()


@final
class Sandwich(ManyPathsStrategy):
    """The sandwich rule with in-place distillation (BigNAS, arXiv 2003.11142, sections 3.1 and 3.2).

    Each step trains the dearest network inside the filters on the labels, and the cheapest and some random
    ones on the dearest one's outputs; one optimizer step follows the sum of their gradients. The rule is
    that of universally slimmable networks (arXiv 1903.05134). What the user's step logs speaks for the
    dearest.

    The outputs are those of the `ModelSpace`, which the user's ``training_step`` has to call once.

    Args:
        n_random: how many networks besides the two extremes; the paper's 2.
        distillation: loss of a network's output and the dearest one's, which is detached; None: all
            networks are trained on the labels.
        profiler: by what the dearest and the cheapest are told; None: the number of parameters.
        options: as in `SampledStrategy` (`filter`, `n_candidates`, ...) and `Strategy` (`seed`, ...).

    Raises:
        ValueError: a negative ``n_random``.
        RuntimeError: the user's step did not call the space.
    """

    def __init__(
        self,
        n_random: int = 2,
        distillation: Distillation | None = soft_cross_entropy,
        profiler: Profiler | None = None,
        **options: Unpack[SampledOptions],
    ) -> None:
        super().__init__(**options)
        if n_random < 0:
            raise ValueError(f"n_random must be at least 0; got {n_random}")
        self.n_random = n_random
        self.distillation = distillation
        self.profiler = profiler
        self._extremes: list[Architecture] = []
        self._watching: RemovableHandle | None = None
        self._taught: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None

    def prepare(self, space: ModelSpace) -> None:
        super().prepare(space)
        cost = (self.profiler or ParamsProfiler(space)).cost
        limits = [limit for found in self.filters for limit in found.limits]
        extremes = minimise(-cost, limits), minimise(cost, limits)
        self._extremes = [space.canonical({**space.default(), **found}) for found in extremes if found]

    def paths(self, generator: torch.Generator) -> list[Architecture]:
        return [*self._extremes, *(self.sample(generator) for _ in range(self.n_random))]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.distillation is not None:
            self._watching = self.space.register_forward_hook(self._keep, with_kwargs=True)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self._stop_watching()

    def other_loss(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> Tensor | None:
        if self.distillation is None:
            return loss_of(pl_module.training_step(batch, batch_idx))
        if self._taught is None:
            raise RuntimeError(
                f"Sandwich distils what the ModelSpace returns; {type(pl_module).__name__}.training_step did "
                "not call it. Call the space itself, or train on labels: Sandwich(distillation=None)"
            )
        inputs, keywords, taught = self._taught
        return self.distillation(self.space(*inputs, **keywords), taught)

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        self._forget()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._forget()

    def on_exception(self, *rest: Any) -> None:
        super().on_exception(*rest)
        self._forget()

    def _keep(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        self._taught = inputs, keywords, _detached(output)

    def _forget(self) -> None:
        self._stop_watching()
        self._taught = None

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.remove()
            self._watching = None


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, list | tuple):
        return type(output)(_detached(item) for item in output)
    if isinstance(output, dict):
        return {name: _detached(item) for name, item in output.items()}
    return output
