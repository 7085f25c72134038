"""Strategies that run one path a step and compare whole architectures."""

from __future__ import annotations

import math
import re
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

import pytorch_lightning as pl
import torch
from torch import Tensor

from hwnas.derive import Budget, check_k
from hwnas.sampling import Filters, Sampler, as_filters
from hwnas.space import ModelSpace
from hwnas.strategies.strategy import Judged, Strategy, StrategyOptions, mixed_seed
from profilers.penalty import RangeProfilerFilter
from profilers.profile import Profiler
from profilers.space import Architecture

_ERRORS = ("mse", "rmse", "mae", "mape", "wer", "cer")  # words in a metric's name
_DRAWS = 1_000  # that stand for the policy where its probabilities are asked for
_TRIES = 100  # draws of the policy for each architecture that is asked for


class SampledOptions(StrategyOptions, total=False):
    """What every strategy that samples takes as a keyword; see `SampledStrategy`."""

    filter: Filters
    n_candidates: int
    reward_metric_name: str | None
    reward_mode: Literal["max", "min"] | None


class SampledStrategy(Strategy):
    """Compares whole architectures by a validation metric: there is no score that adds up over choices.

    In each validation the candidates, as recalibrated subnets, run beside the answer; the answer is the
    candidate that the last validation found best. Whatever is returned keeps to the filters and to
    ``max_cost``: where no candidate does, an architecture is drawn that does, which nobody has judged.

    Args:
        filter: ranges of cost that all that is drawn and returned has to keep to.
        n_candidates: how many architectures each validation compares.
        reward_metric_name: the metric that compares them, as the user's ``validation_step`` logs it; None:
            the first whose name says accuracy, or else loss.
        reward_mode: whether ``"max"`` or ``"min"`` is best; None: the least where the name says loss,
            error (also as mse, rmse, mae, mape, wer, cer) or perplexity, otherwise the most.
        options: as in `Strategy`.
    """

    def __init__(
        self,
        *,
        filter: Filters = None,
        n_candidates: int = 4,
        reward_metric_name: str | None = None,
        reward_mode: Literal["max", "min"] | None = None,
        **options: Unpack[StrategyOptions],
    ) -> None:
        super().__init__(**options)
        if not isinstance(n_candidates, int) or n_candidates < 1:
            raise ValueError(f"n_candidates must be a whole number of at least 1; got {n_candidates}")
        if reward_mode not in (None, "max", "min"):
            raise ValueError(f"reward_mode must be 'max', 'min' or None; got {reward_mode!r}")
        self.filters = as_filters(filter)
        self.n_candidates = n_candidates
        self.reward_metric_name = reward_metric_name
        self.reward_mode = reward_mode
        self._judged: list[tuple[Architecture, float]] = []
        self._sampler: Sampler | None = None

    @abstractmethod
    def sample_many(self, count: int, generator: torch.Generator) -> list[Architecture]:
        """Canonical architectures within the filters, each as the policy draws it now."""

    def sample(self, generator: torch.Generator) -> Architecture:
        """One of them."""
        return self.sample_many(1, generator)[0]

    # ---- the answer

    @property
    def sampler(self) -> Sampler:
        """Uniform draws within the filters. Raises ``RuntimeError`` before a space is known."""
        if self._sampler is None:
            self._sampler = Sampler(self.space, self.filters)
        return self._sampler

    def prepare(self, space: ModelSpace) -> None:
        if self._sampler is not None:  # what was judged is of another space
            self._judged = []
        self._sampler = Sampler(space, self.filters)

    def budget(self) -> Budget:
        return {f.profiler: f.max for f in self.filters if f.max < float("inf")}

    def architecture(self, max_cost: Budget | None = None) -> Architecture:
        return self.top_k(1, max_cost)[0]

    def top_k(self, k: int, max_cost: Budget | None = None) -> list[Architecture]:
        """The best ``k`` that the last validation judged; where they do not suffice, others."""
        check_k(k)
        limits = self._limits(max_cost)
        # The filters, too: a checkpoint may have judged under others.
        within = (*self.filters, *limits)
        found = [a for a, _ in self._judged if all(limit.filter(a) for limit in within)][:k]
        if len(found) < k:
            others = [a for a in self.candidates() if a not in found]
            found += [a for a in others if all(limit.filter(a) for limit in limits)][: k - len(found)]
        if len(found) < k:
            found += self._drawn(k - len(found), limits, excluded=found)
        return found

    def probabilities(self) -> dict[str, Tensor]:
        """The share of each option among draws of the policy."""
        rows = self._sample_many()
        found = {}
        for label, options in self.space.options.items():
            counts = Counter(architecture[label] for architecture in rows)
            found[label] = torch.tensor([counts[option] / len(rows) for option in options])
        return found

    def expected_cost(self, profiler: Profiler) -> float:
        rows = self._sample_many()
        return float(profiler.cost.of_many(profiler.cost.indices(rows)).mean())

    def _sample_many(self) -> list[Architecture]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, 11))
        return self.sample_many(_DRAWS, generator)

    def _limits(self, max_cost: Budget | None) -> list[RangeProfilerFilter]:
        """What an answer has to keep to beside the filters; None: the strategy's own budget."""
        wanted = self.budget() if max_cost is None else max_cost
        return [
            RangeProfilerFilter(profiler, max=most)
            for profiler, most in wanted.items()
            if not any(found.profiler is profiler and found.max <= most for found in self.filters)
        ]

    def _drawn(
        self, count: int, limits: Sequence[RangeProfilerFilter], excluded: Sequence[Architecture]
    ) -> list[Architecture]:
        """Different architectures within the filters and the limits; fewer where there are no more."""
        if not count:
            return []
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, 12))
        found: list[Architecture] = []
        for architecture in self._proposals(count, limits, generator):
            if architecture not in found and architecture not in excluded:
                found.append(architecture)
            if len(found) == count:
                break
        return found

    def _proposals(
        self, count: int, limits: Sequence[RangeProfilerFilter], generator: torch.Generator
    ) -> Iterator[Architecture]:
        """The policy's draws that keep to the limits; if they are too rare, uniform ones that do."""
        for _ in range(_TRIES):
            for architecture in self.sample_many(count, generator):
                if all(limit.filter(architecture) for limit in limits):
                    yield architecture
        within = Sampler(self.space, [*self.filters, *limits]) if limits else self.sampler
        yield from within.draw_many(_TRIES * count, generator)

    # ---- what validation finds

    def judge(self, found: Judged) -> None:
        if not found:
            return
        name = self.reward_name(found[0][1])
        sign = -1.0 if self._is_minimised(name) else 1.0
        scores = [(a, metrics[name]) for a, metrics in found]
        # What is no number is worst, whichever end is best.
        self._judged = sorted(scores, key=lambda p: math.inf if math.isnan(p[1]) else -sign * p[1])

    def misses(self, logged: Mapping[str, float]) -> bool:
        return not any(name in logged for name in self._wanted(logged))

    def _wanted(self, logged: Mapping[str, float]) -> tuple[str, ...]:
        """The names of metrics that compare architectures, the first that is there."""
        if self.reward_metric_name is not None:
            return (self.reward_metric_name,)
        return tuple(name for word in ("acc", "loss") for name in logged if word in name.lower())

    def reward_name(self, logged: Mapping[str, float]) -> str:
        """The metric that compares architectures. Raises ``ValueError`` where it is not logged."""
        wanted = self._wanted(logged)
        name = next((name for name in wanted if name in logged), None)
        if name is None:
            raise ValueError(
                f"{type(self).__name__} compares architectures by {wanted or 'an accuracy or a loss'}, which "
                f"the validation_step does not log; it logs {sorted(logged) or 'nothing'}. Log it, or name "
                f"one of them: {type(self).__name__}(reward_metric_name=…)"
            )
        return name

    def _is_minimised(self, name: str) -> bool:
        if self.reward_mode is not None:
            return self.reward_mode == "min"
        words = re.split("[^a-z]+", name.lower())
        return any(part in name.lower() for part in ("loss", "err", "perplexity", "ppl")) or any(
            word in _ERRORS for word in words
        )

    # ---- checkpoints

    def policy_state(self) -> dict[str, Any]:
        return {"judged": [(dict(architecture), score) for architecture, score in self._judged]}

    def load_policy_state(self, state: Mapping[str, Any]) -> None:
        self._judged = [(dict(architecture), float(score)) for architecture, score in state["judged"]]


class UniformStrategy(SampledStrategy):
    """Draws uniformly within the filters, and compares a fixed set of candidates.

    Args:
        options: as in `SampledStrategy` and `Strategy`.
    """

    def __init__(self, **options: Unpack[SampledOptions]) -> None:
        super().__init__(**options)
        self._candidates: list[Architecture] = []

    def prepare(self, space: ModelSpace) -> None:
        super().prepare(space)
        self._candidates = self._drawn(self.n_candidates, (), ())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.enable_validation:
            warnings.warn(
                f"{type(self).__name__} compares architectures in validation, and there is none: its answer "
                "will be a random architecture within the filters. Give Trainer.fit validation batches, or "
                "compare architectures on the trained supernet with hwnas.trials.search",
                stacklevel=2,
            )

    def sample_many(self, count: int, generator: torch.Generator) -> list[Architecture]:
        return self.sampler.draw_many(count, generator)

    def candidates(self) -> list[Architecture]:
        return self._candidates
