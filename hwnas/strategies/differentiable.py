"""Search by gradients: an architecture step of its own before each optimizer step of the weights."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Unpack

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from hwnas.derive import Budget, check_k, ranked
from hwnas.gate import Gate
from hwnas.space import ModelSpace
from hwnas.strategies.architecture_batches import ArchitectureBatches, architecture_loader
from hwnas.strategies.blends import check_blends
from hwnas.strategies.logits import Logits
from hwnas.strategies.ranks import average
from hwnas.strategies.side_effects import frozen_weights, own_random_numbers
from hwnas.strategies.strategy import Judged, Strategy, StrategyOptions, moved_batch
from profilers.penalty import Penalty
from profilers.profile import Profiler
from profilers.space import Architecture

ArchOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
ArchScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class DifferentiableOptions(StrategyOptions, total=False):
    """What every differentiable strategy takes as a keyword; see `DifferentiableStrategy`."""

    penalty: Penalty | None
    arch_dataloader: Iterable[Any] | None
    arch_scheduler: ArchScheduler | None


@dataclass(frozen=True)
class ArchitectureStep:
    """What an architecture step runs on.

    Attributes:
        pl_module: the user's module.
        batch: the batch of the architecture.
        train_batch: the batch of the weight step that comes next.
        gates: those of `architecture_gates`.
        run: the user's loss on a batch under gates, with the same random numbers each time; None where
            the user's step skips the batch.
        objective: the loss with the penalty; raises where it is no number.
    """

    pl_module: pl.LightningModule
    batch: Any
    train_batch: Any
    gates: Mapping[str, Gate]
    run: Callable[[Any, Mapping[str, Gate]], Tensor | None]
    objective: Callable[[Tensor], Tensor]


class DifferentiableStrategy(Strategy):
    """Learns logits by gradient; between Lightning's optimizer steps it takes an architecture step.

    The step runs the user's ``training_step`` on a batch for the architecture, under the policy's gates
    and Lightning's own precision context, and differentiates its loss, after the penalty, with respect
    to the logits alone: no weight gradient is computed. Metrics, logs, buffers and random numbers of the
    user's module are as before afterwards. There is one such step for one optimizer step, at the start of
    an accumulation window, before the module's own ``on_train_batch_start``, as Lightning orders its hooks.

    Under DDP all ranks draw the same gates, so that their logits stay equal, and the logits' gradients are
    averaged over the ranks' batches: give ``arch_dataloader`` a ``DistributedSampler`` (Lightning gives
    one to validation loaders).

    Args:
        arc_learning_rate: of the architecture optimiser.
        penalty: makes the cost part of the loss.
        arch_dataloader: batches of the architecture steps; None: the trainer's (first) validation loader.
        arch_optimizer: ``(parameters, arc_learning_rate)`` to an optimiser.
        arch_scheduler: the optimiser to a schedule of its learning rate, which goes on with each epoch
            that takes architecture steps; None: the learning rate stays.
        options: as in `Strategy`.
    """

    def __init__(
        self,
        arc_learning_rate: float,
        arch_optimizer: ArchOptimizer,
        *,
        penalty: Penalty | None = None,
        arch_dataloader: Iterable[Any] | None = None,
        arch_scheduler: ArchScheduler | None = None,
        **options: Unpack[StrategyOptions],
    ) -> None:
        super().__init__(**options)
        if not isinstance(penalty, Penalty | None):
            raise TypeError(
                "a differentiable search takes a penalty of expected costs (ExpectationProfilerPenalty, "
                f"LagrangianPenalty); got {type(penalty).__name__}"
            )
        self.arc_learning_rate = arc_learning_rate
        self.penalty = penalty
        self.arch_dataloader = arch_dataloader
        self._make_scheduler = arch_scheduler
        self._scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self._make_optimizer = arch_optimizer
        self._logits: Logits | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._batches: ArchitectureBatches | None = None
        self._position = (0, 0)

    @abstractmethod
    def architecture_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        """The gates of an architecture step, whose weights lead to the logits."""

    def differentiate(self, step: ArchitectureStep) -> Sequence[Tensor | None] | None:
        """The objective's gradient for each vector of logits; None: the user's step skipped the batch."""
        with frozen_weights(step.pl_module):
            loss = step.run(step.batch, step.gates)
            if loss is None:
                return None
            return torch.autograd.grad(step.objective(loss), self.logits.parameters(), allow_unused=True)

    def penalised(self, gates: Mapping[str, Gate]) -> dict[str, Tensor]:
        """The probabilities whose expected cost the penalty is of, differentiable."""
        return self.space.derived_probabilities(self.logits.probabilities())

    def after_architecture_step(self, gates: Mapping[str, Gate], before: Mapping[str, Tensor]) -> None:
        """What the method does to the logits after the optimiser; ``before`` are those before it."""

    # ---- the answer

    @property
    def logits(self) -> Logits:
        """The policy. Raises ``RuntimeError`` before a space is known."""
        if self._logits is None:
            _ = self.space  # says what is missing
        assert self._logits is not None
        return self._logits

    def probabilities(self) -> dict[str, Tensor]:
        return {label: found.detach() for label, found in self.logits.probabilities().items()}

    def architecture(self, max_cost: Budget | None = None) -> Architecture:
        return self.top_k(1, max_cost)[0]

    def top_k(self, k: int, max_cost: Budget | None = None) -> list[Architecture]:
        """The best ``k`` by `hwnas.derive.score`, exactly; fewer where the budget leaves fewer."""
        check_k(k)
        max_cost = self.budget() if max_cost is None else max_cost
        found = list(islice(ranked(self.space, self.probabilities(), max_cost), k))
        if not found:
            raise ValueError(f"no architecture of the space keeps to all of {max_cost}")
        return found

    def budget(self) -> Budget:
        return {} if self.penalty is None else {self.penalty.profiler: self.penalty.baseline}

    def expected_cost(self, profiler: Profiler) -> float:
        return float(profiler.cost.expected(self.space.derived_probabilities(self.probabilities())))

    def candidates(self) -> list[Architecture]:
        return []

    def judge(self, found: Judged) -> None:
        """The logits know best."""

    # ---- set-up

    def prepare(self, space: ModelSpace) -> None:
        space.check_can_mix()
        self._logits = Logits(space.options, torch.Generator().manual_seed(self.seed))
        self._optimizer = self._make_optimizer(self._logits.parameters(), self.arc_learning_rate)
        self._scheduler = None if self._make_scheduler is None else self._make_scheduler(self._optimizer)
        if self._loaded is not None:
            self.load_policy_state(self._loaded)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.logits.to(pl_module.device)
        for state in self._arch_optimizer.state.values():
            state.update({name: _moved(value, pl_module.device) for name, value in state.items()})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for batch in self._training_batches[:1]:
            self._check_blends(trainer, pl_module, batch)
        loader = architecture_loader(trainer, self.arch_dataloader, type(self).__name__)
        self._batches = ArchitectureBatches(loader, self.seed, self._position)

    def _check_blends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        batch = moved_batch(trainer, batch)
        with self._on_the_side(pl_module, None, batch), own_random_numbers(self.seed):
            check_blends(self.space, lambda: pl_module.training_step(batch, 0), self.seed)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self._batches is not None:
            # An iterator of a loader can be neither copied nor pickled; a strategy can.
            self._position, self._batches = self._batches.position, None

    @property
    def _arch_optimizer(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None  # prepare made it
        return self._optimizer

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self._scheduler is not None:
            advance(self._scheduler, trainer.current_epoch - self.warmup_epochs)

    # ---- the architecture step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        opens_window = batch_idx % trainer.accumulate_grad_batches == 0
        if opens_window and trainer.current_epoch >= self.warmup_epochs:
            self._architecture_step(trainer, pl_module, batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _architecture_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, train_batch: Any, batch_idx: int
    ) -> None:
        assert self._batches is not None  # on_train_start made them
        batch = moved_batch(trainer, self._batches.next())
        gates = self.architecture_gates(self.generator(trainer, 3))
        parameters = self.logits.parameters()

        def run(batch: Any, gates: Mapping[str, Gate]) -> Tensor | None:
            with (
                own_random_numbers(self.step_seed(trainer, 4)),
                self.space.running(gates),
                trainer.precision_plugin.train_step_context(),
            ):
                return loss_of(pl_module.training_step(batch, batch_idx))

        def objective(loss: Tensor) -> Tensor:
            if self.penalty is not None:
                loss = self.penalty(loss, self.penalised(gates))
            self.check_finite(loss, trainer, "loss of the architecture")
            return loss

        with self._on_the_side(pl_module, None, batch):
            # Inside, while the buffers are still those of the forward pass: autograd checks them.
            gradients = self.differentiate(
                ArchitectureStep(pl_module, batch, train_batch, gates, run, objective)
            )
        if gradients is None:
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        average(own)
        total = torch.cat([gradient.flatten() for gradient in own]).sum()
        self.check_finite(total, trainer, "gradient of the architecture")
        before = self.logits.state_dict()
        self._arch_optimizer.step()
        self._arch_optimizer.zero_grad()
        self.after_architecture_step(gates, before)
        if self.penalty is not None:
            self.penalty.update({label: found.detach() for label, found in self.penalised(gates).items()})

    # ---- logs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        steps = trainer.current_epoch + 1 - self.warmup_epochs, (trainer.max_epochs or 0) - self.warmup_epochs
        for sign in self._watch.of_probabilities(self.probabilities(), *steps):
            warnings.warn(f"{type(self).__name__}: {sign}", stacklevel=2)
        if self.penalty is not None:
            for name, value in self.penalty.state_dict().items():
                pl_module.log(f"penalty_{name}", float(value), sync_dist=trainer.world_size > 1)

    # ---- checkpoints

    def policy_state(self) -> dict[str, Any]:
        if self._logits is None:
            return dict(self._loaded or {})
        return {
            "logits": self._logits.state_dict(),
            "optimizer": self._arch_optimizer.state_dict(),
            "scheduler": {} if self._scheduler is None else self._scheduler.state_dict(),
            "penalty": {} if self.penalty is None else self.penalty.state_dict(),
            "batches": self._position if self._batches is None else self._batches.position,
        }

    def load_policy_state(self, state: Mapping[str, Any]) -> None:
        if self._logits is None:
            self._loaded = state
            return
        self._logits.load_state_dict(state["logits"])
        self._arch_optimizer.load_state_dict(dict(state["optimizer"]))
        if self._scheduler is not None and state["scheduler"]:
            self._scheduler.load_state_dict(dict(state["scheduler"]))
        if self.penalty is not None and state["penalty"]:
            self.penalty.load_state_dict(state["penalty"])
        self._position = state["batches"]
        self._batches = None


def advance(schedule: torch.optim.lr_scheduler.LRScheduler, epoch: int) -> None:
    """Takes a schedule to the number of epochs that were searched."""
    with warnings.catch_warnings():
        # A resumed search has taken its steps before.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
        while schedule.last_epoch < epoch:
            schedule.step()


def loss_of(output: Any) -> Tensor | None:
    """What a ``training_step`` may return: a loss, a dictionary with one, or nothing to skip the batch."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is not None and not isinstance(loss, Tensor):
        raise TypeError(
            "training_step must return a loss tensor, a dictionary with 'loss', or None; "
            f"got {type(output).__name__}"
        )
    return loss


def _moved(value: Any, device: torch.device) -> Any:
    # Adam keeps its step counters on the CPU: they have no dimension.
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value
