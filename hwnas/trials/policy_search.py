"""ENAS's controller on trials: what is drawn is what has been good so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from hwnas.strategies.controller import Controller, Reinforce, controller_adam
from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.results import Trial
from profilers.space import Architecture

_PATIENCE = 50  # draws in a row that are no new architecture; then a uniform one is tried


@final
@dataclass(frozen=True)
class PolicySearch(Method):
    """A recurrent controller that learns by REINFORCE from finished trials (arXiv 1611.01578, section 3).

    The controller and its learning are those of `hwnas.strategies.ENAS`. A draw outside of the filters is
    drawn again. A draw that was tried before is an episode of its known metric and costs no trial, so that a
    policy that has settled keeps learning. A reward is the objective less its mean, over its standard
    deviation, of all that has been tried: learning rate and entropy weight then mean the same for any metric.
    Several objectives count equally: their mean, so that one point of the front is approached, not all of it.
    A failed trial is rewarded as the worst so far.

    Args:
        arc_learning_rate: of the controller.
        episodes_per_update: architectures that one update learns from.
        entropy_weight: what a nat of the policy's entropy is worth, in standard deviations of the objective.
        hidden_size: of the controller.

    Raises:
        ValueError: ``episodes_per_update`` below 1.
    """

    arc_learning_rate: float = 0.01
    episodes_per_update: int = 10
    entropy_weight: float = 0.01
    hidden_size: int = 64

    def __post_init__(self) -> None:
        if self.episodes_per_update < 1:
            raise ValueError(f"episodes_per_update must be at least 1; got {self.episodes_per_update}")

    def start(self, problem: Problem) -> Proposals:
        return _Policy(self, problem)


@final
class _Policy(Proposals):
    def __init__(self, method: PolicySearch, problem: Problem) -> None:
        self._method = method
        self._problem = problem
        seed = int(torch.randint(2**31, (), generator=problem.generator))
        controller = Controller(problem.candidates.space, hidden_size=method.hidden_size, seed=seed)
        optimizer = controller_adam(controller.parameters(), method.arc_learning_rate)
        self._learner = Reinforce(controller, optimizer, entropy_weight=method.entropy_weight)
        # By the architecture's options; None: it failed.
        self._known: dict[tuple[object, ...], tuple[float, ...] | None] = {}
        self._episodes: list[Architecture] = []
        self._drawn: list[Architecture] = []  # by the controller as it is now

    def ask(self) -> Architecture | None:
        candidates = self._problem.candidates
        for _ in range(_PATIENCE):
            if not self._drawn:
                count = self._method.episodes_per_update
                self._drawn = self._learner.controller.sample(count, self._problem.generator).architectures
            drawn = self._drawn.pop()
            if tuple(drawn.values()) in self._known:
                self._learn(drawn)
            elif candidates.is_within(drawn) and candidates.is_new(drawn):
                return drawn
        return candidates.draw()

    def tell(self, trial: Trial) -> None:
        losses = None if trial.is_failed else self._problem.objectives.losses(trial.metrics)
        self._known[tuple(trial.architecture.values())] = losses
        self._learn(trial.architecture)

    def _learn(self, architecture: Architecture) -> None:
        self._episodes.append(architecture)
        if len(self._episodes) < self._method.episodes_per_update:
            return
        episodes, self._episodes = self._episodes, []
        finished = [losses for losses in self._known.values() if losses is not None]
        if len(finished) < 2:
            return
        table = torch.tensor(finished, dtype=torch.float64)
        spread = table.std(dim=0)
        worth = -((table - table.mean(dim=0)) / torch.where(spread > 0, spread, 1.0)).mean(dim=1)
        worths = dict(zip(finished, worth.tolist(), strict=True))
        found = [self._known[tuple(episode.values())] for episode in episodes]
        rewards = [min(worths.values()) if losses is None else worths[losses] for losses in found]
        self._learner.update(episodes, rewards)
        self._drawn = []
