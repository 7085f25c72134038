"""The tree-structured Parzen estimator, Optuna's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.optuna_study import OptunaProposals, imported_optuna


@final
@dataclass(frozen=True)
class TPE(Method):
    """Draws where good architectures were dense and bad ones were not (Bergstra et al., NIPS 2011).

    The estimator is that of Optuna (``optuna.samplers.TPESampler``), for one objective or several: one joint
    density over all choices (``multivariate``). What it proposes outside of the filters, or a second time,
    is asked for again or moved (`hwnas.trials.optuna_study`).

    Args:
        startup: uniform draws before the first estimate.
        candidates: of how many draws the most promising is tried.

    Raises:
        ValueError: a number is under 1.
    """

    startup: int = 20
    candidates: int = 24

    def __post_init__(self) -> None:
        if self.startup < 1 or self.candidates < 1:
            raise ValueError(
                f"startup and candidates must be at least 1, got {self.startup} and {self.candidates}"
            )

    def start(self, problem: Problem) -> Proposals:
        """Raises ``ImportError`` where Optuna is not installed."""
        optuna = imported_optuna()
        return OptunaProposals(
            problem,
            lambda seed: optuna.samplers.TPESampler(
                n_startup_trials=self.startup,
                n_ei_candidates=self.candidates,
                multivariate=True,
                seed=seed,
            ),
            self.startup,
        )
