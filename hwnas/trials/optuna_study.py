"""From Optuna's samplers to architectures: the one place that knows Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import torch

from hwnas.trials.method import Problem, Proposals
from hwnas.trials.results import Trial
from profilers.space import Architecture

if TYPE_CHECKING:
    import optuna

_PATIENCE = 3  # proposals in a row that are of no use; then the last is made useful


@final
class OptunaProposals(Proposals):
    """A study whose every proposal is canonical, within the filters, and new.

    Each choice is a categorical parameter over the numbers of its options. The study begins with uniform
    draws of what is within the filters. A proposal outside of them, or one that was tried before, is dropped,
    and another one is asked for. After three in a row the last is used: it is moved choice by choice towards
    a uniform draw, until it is within the filters, and mutated where it was tried before. The study is
    then told that this was what it proposed.

    Both are what makes NSGA-II better than random search on NAS-Bench-201 (`benchmarks/nas_bench_201.py`):
    moved at once, more than half of its children were; moved towards the nearest finished architecture, it
    stayed where it was when the limit was tight.

    Args:
        problem: what to search.
        make_sampler: makes Optuna's sampler from a seed.
        startup: how many uniform draws come first.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(
        self, problem: Problem, make_sampler: Callable[[int], optuna.samplers.BaseSampler], startup: int
    ) -> None:
        library = imported_optuna()
        self._problem = problem
        self._startup = startup
        seed = int(torch.randint(2**31, (), generator=problem.generator))
        with _quiet(library):
            self._study: optuna.Study = library.create_study(
                sampler=make_sampler(seed), directions=["minimize"] * len(problem.objectives.directions)
            )
        self._failed = library.trial.TrialState.FAIL
        self._options = problem.candidates.space.options
        self._distributions: dict[str, Any] = {
            label: library.distributions.CategoricalDistribution(range(len(options)))
            for label, options in self._options.items()
        }
        self._asked: dict[tuple[Any, ...], optuna.trial.Trial] = {}  # not told yet
        self._count = 0

    def ask(self) -> Architecture | None:
        candidates = self._problem.candidates
        self._count += 1
        if self._count <= self._startup:
            return self._instead(candidates.draw())
        proposed: Architecture = {}
        for _ in range(_PATIENCE):
            trial = self._study.ask(self._distributions)
            proposed = self._architecture(trial.params)
            if candidates.is_within(proposed) and candidates.is_new(proposed):
                self._asked[self._key(proposed)] = trial
                return proposed
            self._study.tell(trial, state=self._failed)
        return self._instead(candidates.repair(proposed))

    def tell(self, trial: Trial) -> None:
        key = self._key(trial.architecture)
        if key not in self._asked:  # from a journal, where another number of workers asked for it
            self._instead(trial.architecture)
        asked = self._asked.pop(key)
        if trial.is_failed:
            self._study.tell(asked, state=self._failed)
        else:
            self._study.tell(asked, list(self._problem.objectives.losses(trial.metrics)))

    def _instead(self, architecture: Architecture | None) -> Architecture | None:
        """Has the study believe that the architecture was its own proposal."""
        if architecture is not None:
            indices = {label: self._options[label].index(option) for label, option in architecture.items()}
            self._study.enqueue_trial(indices)
            self._asked[self._key(architecture)] = self._study.ask(self._distributions)
        return architecture

    def _architecture(self, indices: Mapping[str, int]) -> Architecture:
        named = {label: options[indices[label]] for label, options in self._options.items()}
        return self._problem.candidates.space.canonical(named)

    def _key(self, architecture: Architecture) -> tuple[Any, ...]:
        return tuple(architecture[label] for label in self._options)


def imported_optuna() -> Any:
    """Optuna, which takes half a second to import and is an extra.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "NSGA2 and TPE are Optuna's; install the extra: pip install 'hwnas[optuna]'"
        ) from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without the line that every new study prints, and without notices of experimental arguments."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
