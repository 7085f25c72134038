"""NSGA-II, Optuna's: evolution towards a front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.optuna_study import OptunaProposals, imported_optuna


@final
@dataclass(frozen=True)
class NSGA2(Method):
    """Selection by nondominated rank, and by distance to others within a rank (Deb et al., 2002).

    The algorithm is that of Optuna (``optuna.samplers.NSGAIISampler``): uniform crossover, and a mutation
    of one choice in a child on average. What it proposes outside of the filters, or a second time, is asked
    for again or moved (`hwnas.trials.optuna_study`): every architecture that is evaluated is feasible, so no
    constraint violations are compared.

    The default is Optuna's. A search of a few hundred trials wants more generations of fewer: with 200 on
    NAS-Bench-201, a population of 10 came nearer to the best than 20 (``benchmarks/nas_bench_201.py``).

    Args:
        population_size: of each generation; the first is uniform draws.
        crossover: the probability that a child has two parents.

    Raises:
        ValueError: a population of less than 2, or a probability outside of 0 to 1.
    """

    population_size: int = 50
    crossover: float = 0.9

    def __post_init__(self) -> None:
        if self.population_size < 2:
            raise ValueError(f"a population must be at least 2, got {self.population_size}")
        if not 0.0 <= self.crossover <= 1.0:
            raise ValueError(f"crossover is a probability from 0 to 1, got {self.crossover}")

    def start(self, problem: Problem) -> Proposals:
        """Raises ``ImportError`` where Optuna is not installed."""
        optuna = imported_optuna()
        return OptunaProposals(
            problem,
            lambda seed: optuna.samplers.NSGAIISampler(
                population_size=self.population_size, crossover_prob=self.crossover, seed=seed
            ),
            self.population_size,
        )
