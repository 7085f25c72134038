"""Random search: uniform draws without repetition, the method to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.results import Trial
from profilers.space import Architecture


@final
@dataclass(frozen=True)
class RandomSearch(Method):
    """Uniform draws of the architectures within the filters, each at most once.

    Li and Talwalkar (arXiv 1902.07638) found it hard to beat; it is what every other method is held to.
    """

    def start(self, problem: Problem) -> Proposals:
        return _Draws(problem)


@final
class _Draws(Proposals):
    def __init__(self, problem: Problem) -> None:
        self._candidates = problem.candidates

    def ask(self) -> Architecture | None:
        return self._candidates.draw()

    def tell(self, trial: Trial) -> None:
        pass  # a draw learns nothing
