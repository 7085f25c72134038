"""Regularized evolution: the oldest dies, not the worst."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import final

import torch

from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.results import Trial, nondominated
from profilers.space import Architecture


@final
@dataclass(frozen=True)
class RegularizedEvolution(Method):
    """Aging evolution (Real et al., arXiv 1802.01548, algorithm 1).

    The first ``population_size`` architectures are uniform draws. From then on a few of the population
    are drawn, the best of them is the parent, its mutation joins the population, and the oldest leaves.

    Departures from the paper:

    - a mutation changes one active choice, uniformly over all changes that stay within the filters and
      were not tried; where there is none, two choices; where there is none either, it is a new uniform
      draw. The paper mutates without such limits and keeps what it is with a probability of 0.05.
    - the sample is drawn without replacement.
    - with a probability of ``crossover`` the child of two parents takes each choice from either. Where it
      is outside of the filters, it is moved towards one of them, choice by choice, until it is inside.
    - with several objectives the parent is any of the sample's front.
    - an evaluation that failed joins no population.

    The defaults are the paper's, for tens of thousands of trials; for a few hundred, a population and a
    sample of 20 and 10 leave more of them to selection.

    Args:
        population_size: how many live at a time.
        sample_size: of how many a parent is the best.
        crossover: the probability that a child has two parents.

    Raises:
        ValueError: not ``1 <= sample_size <= population_size``, or a probability outside of 0 to 1.
    """

    population_size: int = 100
    sample_size: int = 25
    crossover: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.sample_size <= self.population_size:
            raise ValueError(
                "a parent is the best of a sample of the population: 1 <= sample_size <= population_size; "
                f"got a sample of {self.sample_size} of {self.population_size}"
            )
        if not 0.0 <= self.crossover <= 1.0:
            raise ValueError(f"crossover is a probability from 0 to 1, got {self.crossover}")

    def start(self, problem: Problem) -> Proposals:
        return _Evolution(self, problem)


@final
class _Evolution(Proposals):
    def __init__(self, method: RegularizedEvolution, problem: Problem) -> None:
        self._method = method
        self._problem = problem
        self._population = deque[tuple[Architecture, tuple[float, ...]]](maxlen=method.population_size)
        self._drawn = 0

    def ask(self) -> Architecture | None:
        candidates = self._problem.candidates
        self._drawn += 1
        if self._drawn <= self._method.population_size or not self._population:
            return candidates.draw()
        parent = self._parent()
        chance = float(torch.rand((), generator=self._problem.generator))
        if chance < self._method.crossover:
            return candidates.cross(parent, self._parent())
        return candidates.mutate(parent)

    def tell(self, trial: Trial) -> None:
        if not trial.is_failed:
            losses = self._problem.objectives.losses(trial.metrics)
            self._population.append((trial.architecture, losses))

    def _parent(self) -> Architecture:
        order = torch.randperm(len(self._population), generator=self._problem.generator)
        sample = [self._population[index] for index in order[: self._method.sample_size].tolist()]
        # The order is random, so the first of a front is any of it.
        return sample[nondominated([losses for _, losses in sample])[0]][0]
