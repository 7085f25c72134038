"""Grid search: every architecture once, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.results import Trial
from profilers.space import Architecture


@final
@dataclass(frozen=True)
class GridSearch(Method):
    """Every architecture within the filters once, the last choice's options changing fastest."""

    def start(self, problem: Problem) -> Proposals:
        return _Grid(problem)


@final
class _Grid(Proposals):
    def __init__(self, problem: Problem) -> None:
        self._candidates = problem.candidates
        self._grid = problem.candidates.grid()

    def ask(self) -> Architecture | None:
        return next((found for found in self._grid if self._candidates.is_new(found)), None)

    def tell(self, trial: Trial) -> None:
        pass  # the order is fixed
