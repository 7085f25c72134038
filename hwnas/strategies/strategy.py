"""What every strategy is: a Lightning callback that decides the gates and judges what it would return."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from hwnas.derive import Budget
from hwnas.gate import Gate
from hwnas.non_finite import check_finite
from hwnas.recalibrate import recalibrate
from hwnas.space import ModelSpace
from hwnas.strategies.collapse import Watch
from hwnas.strategies.kept_attributes import Restore, kept_attributes, kept_now
from hwnas.strategies.ranks import average
from hwnas.strategies.side_effects import (
    Logged,
    StandIns,
    captured_logs,
    kept_buffers,
    muted_loggers,
    own_loader_numbers,
    own_random_numbers,
    random_states,
    set_random_states,
)
from hwnas.values import values_in
from profilers.profile import Profiler
from profilers.space import Architecture

Judged = list[tuple[Architecture, dict[str, float]]]
"""Architectures with what validation logged of each."""


_USED_UP = 0.9  # of a budget


class StrategyOptions(TypedDict, total=False):
    """What every strategy takes as a keyword; see `Strategy`."""

    warmup_epochs: int
    recalibration_batches: int
    validate_supernet: bool
    stop_at_non_finite_loss: bool
    log_prob_every_n_step: int
    seed: int


class Strategy(pl.Callback, ABC):
    """Decides the gates of each step, and validates the architecture that it would return now.

    The user's ``LightningModule`` contains one `ModelSpace` and stays in automatic optimisation. Nothing of
    it is wrapped: gradient clipping, accumulation, mixed precision, schedules, EMA and checkpoints are
    Lightning's own.

    Validation runs the current answer (`architecture`) as a frozen subnet whose BatchNorm statistics were
    recalibrated on a fixed set of training batches, in the space's place; what the user logs as ``val_*``
    speaks for it. Beside it the supernet is validated, or the architectures that the strategy compares
    (`candidates`); their mean is logged as ``supernet_val_*``. Each epoch logs the entropy of the
    probabilities, the expected cost and, as the number of each choice's option, the answer; a search that
    collapses is warned of (`hwnas.strategies.collapse`).

    Lightning's sanity check before the training, and ``Trainer.validate``, have no training batches:
    there the subnet keeps the supernet's statistics. ``Trainer.test`` and ``Trainer.predict`` run the
    current answer, too.

    A search resumes exactly from a checkpoint that was written at the end of an epoch. Inside an epoch,
    Lightning starts the epoch's batches again: save at epoch ends (``ModelCheckpoint``'s default). Global
    random numbers are restored, so a shuffling loader repeats; a loader that was given a ``generator`` of
    its own is the user's to restore.

    Args:
        warmup_epochs: epochs in which the weights are trained alone.
        recalibration_batches: how many training batches set a subnet's BatchNorm statistics.
        validate_supernet: whether validation also runs the supernet (candidates are always run).
        stop_at_non_finite_loss: whether a loss that is no number ends the search with an error, before
            any weight is touched.
        log_prob_every_n_step: how often the probabilities are logged, in steps; 0: never.
        seed: of all that the strategy draws. What is drawn at a step depends on the seed and the step
            alone; global random numbers are neither used nor moved.

    Attributes:
        validated: the architecture that the last validation ran.
    """

    def __init__(
        self,
        *,
        warmup_epochs: int = 0,
        recalibration_batches: int = 10,
        validate_supernet: bool = True,
        stop_at_non_finite_loss: bool = True,
        log_prob_every_n_step: int = 0,
        seed: int = 0,
    ) -> None:
        if warmup_epochs < 0 or recalibration_batches < 1:
            raise ValueError(
                "warmup_epochs must be at least 0 and recalibration_batches at least 1; "
                f"got {warmup_epochs} and {recalibration_batches}"
            )
        self.warmup_epochs = warmup_epochs
        self.recalibration_batches = recalibration_batches
        self.validate_supernet = validate_supernet
        self.stop_at_non_finite_loss = stop_at_non_finite_loss
        self.log_prob_every_n_step = log_prob_every_n_step
        self.seed = seed
        self._space: ModelSpace | None = None
        self._stand_ins: StandIns | None = None
        self._training_batches: list[Any] = []
        self._validation = contextlib.ExitStack()
        self._is_validating = False
        self.validated: Architecture | None = None
        self._beside: list[_Contender] = []
        self._watch = Watch()
        self._loaded_random_states: dict[str, Any] | None = None
        self._is_resumed = False

    # ---- what a strategy is

    @abstractmethod
    def prepare(self, space: ModelSpace) -> None:
        """Makes the policy for a space; called once, before the first step. Refuses what it cannot search."""

    @abstractmethod
    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        """The gates of a weight step."""

    @abstractmethod
    def architecture(self, max_cost: Budget | None = None) -> Architecture:
        """The best architecture that the strategy knows now.

        Args:
            max_cost: profilers with what the architecture may cost at most by each; None: the budget that
                the strategy searched under, if any.

        Raises:
            ValueError: nothing in the space keeps to the budget.
            RuntimeError: the strategy has not seen a space yet.
        """

    @abstractmethod
    def top_k(self, k: int, max_cost: Budget | None = None) -> list[Architecture]:
        """The best ``k`` architectures, best first; fewer where the budget leaves fewer."""

    @abstractmethod
    def probabilities(self) -> dict[str, Tensor]:
        """Each label with the probabilities of its options."""

    @abstractmethod
    def budget(self) -> Budget:
        """What ``max_cost`` is where nothing is said: what the strategy searches under."""

    @abstractmethod
    def expected_cost(self, profiler: Profiler) -> float:
        """The mean cost of what the policy draws, in the profiler's unit."""

    @abstractmethod
    def candidates(self) -> list[Architecture]:
        """Architectures that validation judges beside the answer; none: the supernet is judged."""

    @abstractmethod
    def judge(self, found: Judged) -> None:
        """Learns what validation, on all ranks, logged of each of the candidates."""

    def misses(self, logged: Mapping[str, float]) -> bool:
        """Whether a candidate cannot be judged by what ``validation_step`` logged of it alone.

        Then the module's ``on_validation_epoch_end`` is called for each candidate, as well.
        """
        return False

    @abstractmethod
    def policy_state(self) -> dict[str, Any]:
        """What the policy has learned, as tensors and plain Python."""

    @abstractmethod
    def load_policy_state(self, state: Mapping[str, Any]) -> None:
        """Takes it back. The space may not be known yet."""

    # ---- set-up

    @property
    def space(self) -> ModelSpace:
        """The space that is searched. Raises ``RuntimeError`` before a trainer has shown one."""
        if self._space is None:
            raise RuntimeError(
                f"{type(self).__name__} has not seen a space yet: give it to Trainer(callbacks=[…]) and "
                "fit a LightningModule that contains a ModelSpace"
            )
        return self._space

    def prepare_for(self, space: ModelSpace) -> None:
        """Takes a space on, once; a trainer does it, or who has a checkpoint's policy and no trainer."""
        for value in values_in(space.settings):
            raise ValueError(
                f"the setting {value!r} is no part of the network: it decides how a network is trained, so "
                "that no training of a supernet can choose it; search it by trials, each of which trains a "
                "network of its own, or leave it out of the settings"
            )
        for profiler in self.budget():
            space.check_cost(profiler.cost)
        if self._space is not space:
            self._space = space
            self.prepare(space)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        spaces = [module for module in pl_module.modules() if isinstance(module, ModelSpace)]
        if len(spaces) != 1:
            raise ValueError(
                f"{type(self).__name__} searches the one ModelSpace inside the LightningModule; "
                f"{type(pl_module).__name__} contains {len(spaces)}"
            )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # made by a connector
        strategies = [found for found in callbacks if isinstance(found, Strategy)]
        if len(strategies) > 1:
            raise ValueError(
                "one strategy decides the gates of a step; the trainer has "
                f"{[type(found).__name__ for found in strategies]}: give it one of them"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(self).__name__} acts between Lightning's own optimizer steps and needs automatic "
                f"optimisation; {type(pl_module).__name__} sets automatic_optimization = False"
            )
        self.prepare_for(spaces[0])
        self._stand_ins = StandIns(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded_random_states is not None:
            # Not before: the loop draws a seed for its first iterator, when depends on the schedule.
            set_random_states(self._loaded_random_states)
            self._loaded_random_states = None
            self._is_resumed = True
        combined = trainer.fit_loop._combined_loader
        assert combined is not None  # the loop made it before this hook
        with own_random_numbers(self.seed), own_loader_numbers(combined.flattened, self.seed):
            for loader in combined.flattened:
                set_epoch(loader, 0)
            # Of the loop's own kind: several loaders give a structure of batches.
            again = CombinedLoader(combined.iterables, combined._mode)
            again.flattened = [_beside(loader) for loader in combined.flattened]
            again.limits = combined.limits
            batches = (batch for batch, _, _ in iter(again))
            self._training_batches = list(itertools.islice(batches, self.recalibration_batches))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        is_going_on = loop.epoch_loop.restarting or getattr(loop, "is_resuming", False)  # since 2.6
        if self._is_resumed and is_going_on:
            # Lightning goes on with an iterator from before the random states were those of the checkpoint;
            # uninterrupted, it makes one here.
            assert loop._data_fetcher is not None  # the loop made it before this hook
            iter(loop._data_fetcher)
        self._is_resumed = False

    # ---- the weight step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._is_resumed = False
        # Ranks draw for themselves: a step of several ranks then trains several paths.
        self.space.gates = self.weight_gates(self.generator(trainer, 100 * trainer.global_rank))
        if self.log_prob_every_n_step and trainer.global_step % self.log_prob_every_n_step == 0:
            self._log_probabilities(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.check_finite(loss, trainer, "loss of the weight")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.space.gates = None

    def on_exception(self, *_: Any) -> None:
        self._leave_validation()
        if self._space is not None:
            self._space.gates = None

    def check_finite(self, number: Tensor, trainer: pl.Trainer, what: str) -> None:
        """Raises `NonFiniteLossError`, unless that was switched off."""
        if self.stop_at_non_finite_loss:
            check_finite(number, trainer, what)

    def generator(self, trainer: pl.Trainer, stream: int) -> torch.Generator:
        """Random numbers of this batch: a function of the seed, the batch's number and ``stream``."""
        return torch.Generator().manual_seed(self.step_seed(trainer, stream))

    def step_seed(self, trainer: pl.Trainer, stream: int) -> int:
        """A seed for this batch: a function of the strategy's seed, the batch's number and ``stream``."""
        return mixed_seed(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, stream)

    # ---- validation

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Not at the start of the validation: callbacks that swap weights (EMA) do it there.
        if not self._is_validating:
            self._beside = self._contenders(pl_module)
            self._enter_validation(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        arguments, suffix = [batch, batch_idx], ""
        if len(trainer.num_val_batches) > 1:
            arguments.append(dataloader_idx)
            suffix = f"/dataloader_idx_{dataloader_idx}"
        for contender in self._beside:
            gates = self.weight_gates(torch.Generator().manual_seed(mixed_seed(self.seed, batch_idx, 1)))
            with (
                self._in_place_of_the_answer(pl_module, contender, batch, suffix),
                own_random_numbers(mixed_seed(self.seed, batch_idx, 2)),
                self.space.running(gates),
                trainer.precision_plugin.val_step_context(),
            ):
                pl_module.validation_step(*arguments)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for contender in self._beside:
            if self.misses(contender.logged.means()) and is_overridden("on_validation_epoch_end", pl_module):
                with self._in_place_of_the_answer(pl_module, contender, None, ""):
                    pl_module.on_validation_epoch_end()
        for name, value in _mean([contender.logged.means() for contender in self._beside]).items():
            # The names say already which loader they speak for.
            is_shared = trainer.world_size > 1
            pl_module.log(f"supernet_{name}", value, sync_dist=is_shared, add_dataloader_idx=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_validation()
        beside, self._beside = self._beside, []
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self.validated is None:
            return
        found = [(contender.architecture, contender.logged.means()) for contender in beside]
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        supernet = _mean([means for _, means in found])
        use = [p.profile(self.validated) / limit for p, limit in self.budget().items() if limit > 0]
        is_bound = max(use, default=0.0) > _USED_UP
        for sign in self._watch.of_validation(self.space, self.validated, logged, supernet, is_bound):
            warnings.warn(f"{type(self).__name__}: {sign}", stacklevel=2)
        self.judge([(a, _over_ranks(means, pl_module.device)) for a, means in found if a is not None])
        options = self.space.options
        row = {f"architecture/{n}": float(options[n].index(o)) for n, o in self.validated.items()}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_policy_on(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_policy_on(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_policy_on(trainer)

    def _take_policy_on(self, trainer: pl.Trainer) -> None:
        """What was learned with the weights of ``ckpt_path``; outside of a fit Lightning loads them alone."""
        if trainer.state.fn == TrainerFn.FITTING or not trainer.ckpt_path:
            return
        state = trainer.strategy.load_checkpoint(trainer.ckpt_path).get("callbacks", {}).get(self.state_key)
        if state is None:
            warnings.warn(
                f"'{trainer.ckpt_path}' holds nothing of {type(self).__name__}: its weights are judged with "
                "the architecture that the strategy knows now",
                stacklevel=2,
            )
        else:
            self.load_policy_state(state["policy"])

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self._is_validating:
            self._enter_validation(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_validation()

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self._is_validating:
            self._enter_validation(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_validation()

    def _contenders(self, pl_module: pl.LightningModule) -> list[_Contender]:
        """What runs beside the answer."""
        found = [
            _Contender(
                StandIns(pl_module), kept_now(pl_module), architecture, self.subnet(pl_module, architecture)
            )
            for architecture in self.candidates()
        ]
        if not found and self.validate_supernet:
            found.append(_Contender(StandIns(pl_module), kept_now(pl_module)))
        return found

    @contextlib.contextmanager
    def _in_place_of_the_answer(
        self, pl_module: pl.LightningModule, contender: _Contender, batch: Any, suffix: str
    ) -> Iterator[None]:
        """The user's hooks judge the contender: with its own metrics, and what it collected so far."""
        with (
            self._on_the_side(pl_module, contender.logged, batch, suffix, contender.metrics),
            self.space.represented_by(contender.subnet),
        ):
            contender.collect()
            yield
            contender.collect = kept_now(pl_module)

    def _enter_validation(self, pl_module: pl.LightningModule) -> None:
        self.validated = self.architecture()
        self._is_validating = True
        subnet = self.subnet(pl_module, self.validated)
        self._validation.enter_context(self.space.represented_by(subnet))

    def _leave_validation(self) -> None:
        self._validation.close()
        self._is_validating = False

    def subnet(self, pl_module: pl.LightningModule, architecture: Architecture) -> torch.nn.Module:
        """An architecture's subnet with recalibrated BatchNorm statistics, in evaluation mode."""
        subnet = self.space.freeze(architecture).eval()
        if not self._training_batches:
            return subnet

        def run(batch: Any) -> None:
            moved = moved_batch(pl_module.trainer, batch)
            with self._on_the_side(pl_module, None, moved), self.space.represented_by(subnet):
                pl_module.training_step(moved, 0)

        with own_random_numbers(self.seed), pl_module.trainer.precision_plugin.val_step_context():
            return recalibrate(subnet, self._training_batches, run)

    @property
    def _metrics(self) -> StandIns:
        assert self._stand_ins is not None  # setup made them
        return self._stand_ins

    @contextlib.contextmanager
    def _on_the_side(
        self,
        pl_module: pl.LightningModule,
        logged: Logged | None,
        batch: Any,
        suffix: str = "",
        metrics: StandIns | None = None,
    ) -> Iterator[None]:
        """The user's step can be run here: its metrics, logs, attributes and buffers are as before."""
        with (
            kept_attributes(pl_module),
            (metrics or self._metrics).installed(),
            captured_logs(pl_module, logged, _batch_size(batch), suffix),
            muted_loggers(pl_module.trainer),
            kept_buffers(pl_module),
        ):
            yield

    # ---- logs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.space.gates = None  # a hook of the user may have ended the epoch inside a step
        entropies = [-(p * p.clamp_min(1e-12).log()).sum() for p in self.probabilities().values()]
        is_shared = trainer.world_size > 1
        pl_module.log("architecture_entropy", torch.stack(entropies).mean().float(), sync_dist=is_shared)
        for profiler in self.budget():
            pl_module.log(f"expected_{profiler.unit}", self.expected_cost(profiler), sync_dist=is_shared)

    def _log_probabilities(self, trainer: pl.Trainer) -> None:
        """Writes each option's probability to the trainer's loggers."""
        rows = {
            f"probability/{label}/{option}": float(p)
            for label, found in self.probabilities().items()
            for option, p in zip(self.space.options[label], found, strict=True)
        }
        for logger in trainer.loggers:
            logger.log_metrics(rows, step=trainer.global_step)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy_state(), "random": random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.load_policy_state(state_dict["policy"])
        self._loaded_random_states = state_dict["random"]


@dataclass
class _Contender:
    """What validation runs beside the answer: the supernet, or one architecture's subnet.

    Attributes:
        metrics: its metrics.
        collect: brings back what the user's module has collected of it so far.
        architecture, subnet: None for the supernet.
        logged: what was logged of it.
    """

    metrics: StandIns
    collect: Restore
    architecture: Architecture | None = None
    subnet: torch.nn.Module | None = None
    logged: Logged = field(default_factory=Logged)


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what all have logged."""
    names = [name for name in found[0] if all(name in means for means in found)] if found else []
    return {name: sum(means[name] for means in found) / len(found) for name in names}


def _over_ranks(means: Mapping[str, float], device: torch.device) -> dict[str, float]:
    # NCCL takes tensors on its own device alone.
    values = [torch.tensor(value, dtype=torch.float32, device=device) for value in means.values()]
    average(values)
    return dict(zip(means, map(float, values), strict=True))


def mixed_seed(*parts: int) -> int:
    """One seed of several numbers; neighbouring numbers give unrelated seeds."""
    mixed = 0
    for part in parts:
        # The mixing step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
        mixed = (mixed + part + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


def moved_batch(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch as the trainer's own loop hands it to a step: converted, transferred, hooks called."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader's samplers which epoch it is, those that want to know."""
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        tell = getattr(sampler, "set_epoch", None)
        if tell is not None:
            tell(epoch)


def _beside(loader: Any) -> Any:
    """The loader for an iterator beside the trainer's: one with persistent workers has but one iterator."""
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    copied._iterator = None
    return copied


def _batch_size(batch: Any) -> int:
    try:
        return int(extract_batch_size(batch))
    except MisconfigurationException:
        return 1  # nothing in it has a length: every batch counts the same
