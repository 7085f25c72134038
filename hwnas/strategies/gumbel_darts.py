"""GumbelDARTS: one Gumbel-softmax draw a step, which the forward pass and the penalty share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Unpack, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from hwnas.gate import Gate
from hwnas.strategies.differentiable import ArchOptimizer, DifferentiableOptions, DifferentiableStrategy

Temperature = float | tuple[float, float] | Callable[[float], float]


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """FBNet's architecture optimiser (arXiv 1812.03443, section 4.1): weight decay 5e-4."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=5e-4)


@final
class GumbelDARTS(DifferentiableStrategy):
    """Mixing weights drawn from the Gumbel-softmax of the logits (FBNet, arXiv 1812.03443, section 3.3).

    Each step draws ``softmax((log p + g) / temperature)`` with Gumbel noise ``g`` for every choice
    (equation 10); all options run, mixed by it. The penalty is of the same draw: the mean cost under the
    drawn weights, as in FBNet's equation 8. SNAS (arXiv 1812.09926) is this method with another penalty.

    ``hard=True`` rounds the draw to the picked option in the forward pass and keeps its gradient
    (straight-through; Jang et al., arXiv 1611.01144, section 2.2): one path counts, those beside it run
    without a graph. A weight step then runs and trains the picked path alone.

    Departures: derivation is exact under a budget (`hwnas.derive`), where FBNet samples; BatchNorm
    statistics do not move in architecture steps.

    Args:
        arc_learning_rate: FBNet's 0.01.
        temperature: a number stays; a pair falls linearly from the first to the second, which the last epoch
            has; a function takes the share of the search that is done, 0 in the first epoch and 1 in
            the last (FBNet's ``5 * exp(-0.045 * epoch)`` over 90 epochs is ``lambda t: 5 * exp(-4 * t)``).
        hard: whether one option is picked in the forward pass.
        arch_optimizer: ``(parameters, learning rate)`` to an optimiser.
        options: as in `DifferentiableStrategy` (`penalty`, `arch_dataloader`, ...) and `Strategy`
            (`warmup_epochs`, `seed`, ...).

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(
        self,
        arc_learning_rate: float = 0.01,
        temperature: Temperature = (1.0, 0.33),
        hard: bool = False,
        arch_optimizer: ArchOptimizer = adam,
        **options: Unpack[DifferentiableOptions],
    ) -> None:
        super().__init__(arc_learning_rate, arch_optimizer, **options)
        self._schedule = _schedule(temperature)
        self.hard = hard
        self.temperature = self._at(0.0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        last = _epochs(trainer) - 1
        self.temperature = self._at(1.0 if last < 1 else min(trainer.current_epoch / last, 1.0))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log("temperature", self.temperature)

    def architecture_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return {label: self._gate(logits, generator) for label, logits in self.logits.of.items()}

    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        drawn = {label: self._gate(x.detach(), generator) for label, x in self.logits.of.items()}
        return {label: Gate(gate.picked) for label, gate in drawn.items()} if self.hard else drawn

    def penalised(self, gates: Mapping[str, Gate]) -> dict[str, Tensor]:
        drawn = {label: gate.weights for label, gate in gates.items() if gate.weights is not None}
        return self.space.derived_probabilities(drawn)

    def _gate(self, logits: Tensor, generator: torch.Generator) -> Gate:
        # -log of a unit exponential is a Gumbel variable.
        noise = -torch.empty(logits.shape).exponential_(generator=generator).clamp_min(1e-30).log()
        soft = ((logits.log_softmax(0) + noise.to(logits.device)) / self.temperature).softmax(0)
        if not self.hard:
            return Gate(tuple(range(len(soft))), soft)
        on = int(soft.argmax())
        one_hot = torch.zeros_like(soft)
        one_hot[on] = 1.0
        # Grouped so that the forward value is exactly 0 or 1.
        return Gate((on,), one_hot + (soft - soft.detach()))

    def _at(self, done: float) -> float:
        temperature = float(self._schedule(done))
        if not temperature > 0:
            raise ValueError(
                f"a temperature must be positive; got {temperature} after {done:.0%} of the search"
            )
        return temperature


def _schedule(temperature: Temperature) -> Callable[[float], float]:
    if callable(temperature):
        return temperature
    ends = temperature if isinstance(temperature, list | tuple) else (temperature, temperature)
    if len(ends) != 2 or not all(isinstance(end, int | float) and end > 0 for end in ends):
        raise ValueError(
            "a temperature is a number, a pair of them or a function, and must be positive; "
            f"got {temperature!r}"
        )
    first, last = ends
    return partial(_between, first, last)


def _epochs(trainer: pl.Trainer) -> int:
    """How many epochs there will be, by the limit of epochs or of steps; 1 where there is neither."""
    limits = [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs > 0 else []
    if trainer.max_steps > 0 and math.isfinite(trainer.num_training_batches):
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        limits.append(math.ceil(trainer.max_steps / steps))
    return min(limits, default=1)


def _between(first: float, last: float, done: float) -> float:
    return (1 - done) * first + done * last  # exactly the last one at the end
