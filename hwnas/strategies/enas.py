"""ENAS: a recurrent controller draws the paths and learns from their validation metric."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Unpack, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwnas.derive import Budget
from hwnas.gate import Gate
from hwnas.sampling import Sampler
from hwnas.space import ModelSpace
from hwnas.strategies.architecture_batches import ArchitectureBatches, architecture_loader
from hwnas.strategies.controller import Controller, Learner, Reinforce, controller_adam
from hwnas.strategies.differentiable import ArchOptimizer, ArchScheduler, advance
from hwnas.strategies.ranks import average
from hwnas.strategies.sampled import SampledOptions, SampledStrategy
from hwnas.strategies.side_effects import Logged, own_random_numbers
from hwnas.strategies.strategy import mixed_seed, moved_batch
from profilers.penalty import SampleProfilerPenalty
from profilers.space import Architecture

MakeLearner = Callable[[Controller, torch.optim.Optimizer, float, float, float], Learner]

_FEWEST_DRAWS = 32  # at once, where some will be outside of the filters
_MOST_ROUNDS = 30


@final
class ENAS(SampledStrategy):
    """A controller that draws paths and learns which are good (arXiv 1802.03268, section 2).

    A weight step trains one path, drawn from the controller (`hwnas.strategies.controller.Controller`).
    From time to time the weights rest and the controller learns: it draws a path, the user's own
    ``validation_step`` runs it on one batch, and what that logs as ``reward_metric_name`` is the reward;
    a metric that is to be small counts with the opposite sign. ``batches_per_update`` such episodes
    make one update. As in the paper, that happens after each epoch of the weights, ``updates`` times; with
    ``update_every_n_steps``, after every so many optimizer steps.

    In an episode BatchNorm normalises by the batch at hand, as in the authors' code (melodyguan/enas,
    ``src/cifar10/general_child.py``): the supernet's statistics mix all paths. So a batch needs more than
    one example. Departures from that code: dropout rests in an episode; the answer is the best of
    ``n_candidates`` candidates, judged on all validation batches as recalibrated subnets: the most probable
    architecture, the last answer, and some that the controller draws (there: of 10 draws, on one batch
    each); and what is named in `Controller` and `Learner`.

    With a filter, draws outside of it are drawn again; what is still missing after about a thousand is drawn
    uniformly within the filter, and the controller learns from that, too. A penalty's baseline is the budget
    of the answer. TuNAS's absolute reward (arXiv 2008.06120, equation 1) is
    ``SampleProfilerPenalty(profiler, baseline=target, scale=0.07, nonlinear="absolute")``, its ``beta``
    being ``-scale``.

    Under DDP each rank draws its own path for a weight step: give the trainer
    ``strategy="ddp_find_unused_parameters_true"``. In an episode all ranks draw the same path, run it on
    their own batches and average the rewards, so that their controllers stay equal: give ``arch_dataloader``
    a ``DistributedSampler`` (Lightning gives one to validation loaders).

    Args:
        arc_learning_rate: of the controller. The authors' macro search has 1e-3, their micro search 3.5e-3;
            both make tens of thousands of episodes, and a short search needs more.
        batches_per_update: episodes for one update of the controller, one batch each.
        updates: how many updates the controller makes each time.
        update_every_n_steps: how many optimizer steps of the weights lie between; None: an epoch.
        penalty: makes the cost part of the reward.
        arch_dataloader: batches of the episodes; None: the trainer's (first) validation loader.
        learner: `hwnas.strategies.controller.Reinforce` or `PPO`; ``functools.partial(PPO, clip=0.1)`` sets
            what they have besides.
        entropy_weight, skip_weight, baseline_decay: as in `hwnas.strategies.controller.Learner`. The
            authors' macro search has a ``skip_weight`` of 0.8.
        hidden_size, temperature, tanh_constant, skip_target: as in `Controller`.
        arch_optimizer: ``(parameters, arc_learning_rate)`` to an optimiser.
        arch_scheduler: the optimiser to a schedule of its learning rate, which goes on with each epoch
            after the warm-up; None: the learning rate stays.
        options: as in `SampledStrategy` (`filter`, `n_candidates`, `reward_metric_name`, ...) and `Strategy`
            (`warmup_epochs`, in which the controller does not learn, `seed`, ...).

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        arc_learning_rate: float = 1e-3,
        batches_per_update: int = 20,
        updates: int = 50,
        update_every_n_steps: int | None = None,
        *,
        penalty: SampleProfilerPenalty | None = None,
        arch_dataloader: Iterable[Any] | None = None,
        learner: MakeLearner = Reinforce,
        entropy_weight: float = 1e-4,
        skip_weight: float = 0.0,
        baseline_decay: float = 0.99,
        hidden_size: int = 64,
        temperature: float = 1.0,
        tanh_constant: float | None = 1.5,
        skip_target: float = 0.4,
        arch_optimizer: ArchOptimizer = controller_adam,
        arch_scheduler: ArchScheduler | None = None,
        **options: Unpack[SampledOptions],
    ) -> None:
        super().__init__(**options)
        if min(batches_per_update, updates, 1 if update_every_n_steps is None else update_every_n_steps) < 1:
            raise ValueError(
                "batches_per_update, updates and update_every_n_steps (or None) must be at least 1; "
                f"got {batches_per_update}, {updates} and {update_every_n_steps}"
            )
        if not isinstance(penalty, SampleProfilerPenalty | None):
            raise TypeError(
                "ENAS takes a penalty of single architectures (SampleProfilerPenalty); "
                f"got {type(penalty).__name__}"
            )
        self.arc_learning_rate = arc_learning_rate
        self.batches_per_update = batches_per_update
        self.updates = updates
        self.update_every_n_steps = update_every_n_steps
        self.penalty = penalty
        self.arch_dataloader = arch_dataloader
        self._make_learner = learner
        self._learning = entropy_weight, skip_weight, baseline_decay
        self._controlling: dict[str, Any] = {
            "hidden_size": hidden_size,
            "temperature": temperature,
            "tanh_constant": tanh_constant,
            "skip_target": skip_target,
        }
        self._make_optimizer = arch_optimizer
        self._make_scheduler = arch_scheduler
        self._learner: Learner | None = None
        self._scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._batches: ArchitectureBatches | None = None
        self._position = (0, 0)

    # ---- the policy

    @property
    def learner(self) -> Learner:
        """What teaches the controller. Raises ``RuntimeError`` before a space is known."""
        if self._learner is None:
            _ = self.space  # says what is missing
        assert self._learner is not None
        return self._learner

    @property
    def controller(self) -> Controller:
        """The policy. Raises ``RuntimeError`` before a space is known."""
        return self.learner.controller

    def prepare(self, space: ModelSpace) -> None:
        super().prepare(space)
        Sampler(
            space, [*self.filters, *self._limits(None)]
        )  # refuses a budget that no filter leaves room for
        controller = Controller(space, seed=self.seed, **self._controlling)
        optimizer = self._make_optimizer(controller.parameters(), self.arc_learning_rate)
        self._learner = self._make_learner(controller, optimizer, *self._learning)
        self._scheduler = None if self._make_scheduler is None else self._make_scheduler(optimizer)
        if self._loaded is not None:
            self.load_policy_state(self._loaded)

    def sample_many(self, count: int, generator: torch.Generator) -> list[Architecture]:
        if not self.filters:
            return self.controller.sample(count, generator).architectures
        found: list[Architecture] = []
        for _ in range(_MOST_ROUNDS):
            drawn = self.controller.sample(max(count, _FEWEST_DRAWS), generator).architectures
            found += [a for a in drawn if all(limit.filter(a) for limit in self.filters)]
            if len(found) >= count:
                return found[:count]
        return found + self.sampler.draw_many(count - len(found), generator)

    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return self.space.gates_of(self.sample(generator))

    def budget(self) -> Budget:
        found = dict(super().budget())
        if self.penalty is not None:
            profiler = self.penalty.profiler
            found[profiler] = min(self.penalty.baseline, found.get(profiler, math.inf))
        return found

    def candidates(self) -> list[Architecture]:
        limits = self._limits(None)
        found: list[Architecture] = []
        for architecture in (self.controller.greedy(), *(best for best, _ in self._judged[:1])):
            is_within = all(limit.filter(architecture) for limit in (*self.filters, *limits))
            if is_within and architecture not in found:
                found.append(architecture)
        found = found[: self.n_candidates]
        return found + self._drawn(self.n_candidates - len(found), limits, excluded=found)

    # ---- when the controller learns

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not is_overridden("validation_step", pl_module):
            raise ValueError(
                f"ENAS rewards what validation_step logs; {type(pl_module).__name__} has none: give it one "
                "that logs an accuracy or a loss"
            )
        loader = architecture_loader(trainer, self.arch_dataloader, "ENAS")
        self._batches = ArchitectureBatches(loader, self.seed, self._position)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self._batches is not None:
            # An iterator of a loader can be neither copied nor pickled; a strategy can.
            self._position, self._batches = self._batches.position, None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self._scheduler is not None:
            advance(self._scheduler, trainer.current_epoch - self.warmup_epochs)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.current_epoch < self.warmup_epochs:
            return
        # The end of the epoch's last batch comes before the validation.
        is_due = trainer.is_last_batch
        if self.update_every_n_steps is not None:
            has_stepped = trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
            is_due = has_stepped and trainer.global_step % self.update_every_n_steps == 0
        if is_due:
            for index in range(self.updates):
                self._update(trainer, pl_module, mixed_seed(self.step_seed(trainer, 5), index))

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seed: int) -> None:
        # The same on all ranks.
        drawn = self.sample_many(self.batches_per_update, torch.Generator().manual_seed(seed))
        own = [
            self._episode(trainer, pl_module, architecture, mixed_seed(seed, index))
            for index, architecture in enumerate(drawn)
        ]
        rewards = torch.tensor(own, dtype=torch.float32, device=pl_module.device)
        average([rewards])
        self.check_finite(rewards.sum(), trainer, "reward of the controller")
        found = [(a, r) for a, r in zip(drawn, rewards.tolist(), strict=True) if math.isfinite(r)]
        if not found:
            return
        said = self.learner.update([architecture for architecture, _ in found], [r for _, r in found])
        row = {
            "controller_reward": sum(r for _, r in found) / len(found),
            "controller_entropy": float(said.entropy.mean()),
            "controller_baseline": float(self.learner.baseline or 0.0),
        }
        is_shared = trainer.world_size > 1
        pl_module.log_dict(row, on_step=False, on_epoch=True, batch_size=1, sync_dist=is_shared)

    def _episode(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, architecture: Architecture, seed: int
    ) -> float:
        """The reward of an architecture on the next batch."""
        assert self._batches is not None  # on_train_start made them
        batch = moved_batch(trainer, self._batches.next())
        arguments, suffix = [batch, 0], ""
        if len(trainer.num_val_batches) > 1:
            arguments.append(0)
            suffix = "/dataloader_idx_0"
        logged = Logged()
        self._metrics.reset()
        with (
            torch.no_grad(),
            self._on_the_side(pl_module, logged, batch, suffix),
            _batch_statistics(pl_module),
            own_random_numbers(seed),
            self.space.running(self.space.gates_of(architecture)),
            trainer.precision_plugin.val_step_context(),
        ):
            pl_module.validation_step(*arguments)
            if self.misses(logged.means()) and is_overridden("on_validation_epoch_end", pl_module):
                pl_module.on_validation_epoch_end()
        return self._reward(logged.means(), architecture)

    def _reward(self, metrics: Mapping[str, float], architecture: Architecture) -> float:
        name = self.reward_name(metrics)
        value = metrics[name]
        if self._is_minimised(name):
            return -(value if self.penalty is None else self.penalty(value, architecture))
        return value if self.penalty is None else self.penalty.reward(value, architecture)

    # ---- checkpoints

    def policy_state(self) -> dict[str, Any]:
        if self._learner is None:
            return dict(self._loaded or {})
        return {
            **super().policy_state(),
            "learner": self._learner.state_dict(),
            "scheduler": {} if self._scheduler is None else self._scheduler.state_dict(),
            "batches": self._position if self._batches is None else self._batches.position,
        }

    def load_policy_state(self, state: Mapping[str, Any]) -> None:
        if self._learner is None:
            self._loaded = state
            return
        super().load_policy_state(state)
        self._learner.load_state_dict(state["learner"])
        if self._scheduler is not None and state["scheduler"]:
            self._scheduler.load_state_dict(dict(state["scheduler"]))
        self._position = state["batches"]
        self._batches = None


@contextlib.contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Evaluation mode in which BatchNorm normalises by the batch; all modes are as before afterwards."""
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        for child in modes:
            if isinstance(child, _BatchNorm):
                child.training = True
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
