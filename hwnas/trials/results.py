"""What a search found: every trial, the best of them, and the front of those that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

import numpy as np
import numpy.typing as npt

from hwnas.values import as_option
from profilers.space import Architecture

Direction = Literal["max", "min"]


@final
@dataclass(frozen=True)
class Trial:
    """One architecture with what was found out about it.

    Attributes:
        number: from 0, in the order in which architectures were chosen.
        architecture: canonical.
        metrics: by name; empty where the evaluation failed.
        error: why the evaluation failed; None where it did not.
        seconds: how long the evaluation took, on the clock of who ran it. Two trials that differ in
            this alone are equal.
    """

    number: int
    architecture: Architecture
    metrics: Mapping[str, float]
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def is_failed(self) -> bool:
        return self.error is not None

    def to_json(self) -> dict[str, Any]:
        """Plain data. `from_json` takes it back."""
        return {
            "number": self.number,
            "architecture": self.architecture,
            "metrics": dict(self.metrics),
            "error": self.error,
            "seconds": self.seconds,
        }

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Trial:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the record is none of `to_json`."""
        return Trial(
            number=int(record["number"]),
            architecture={label: as_option(option) for label, option in record["architecture"].items()},
            metrics={name: float(value) for name, value in record["metrics"].items()},
            error=None if record["error"] is None else str(record["error"]),
            seconds=float(record["seconds"]),
        )


@final
class Objectives:
    """Metrics by name, and whether more or less of each is better.

    >>> Objectives({"accuracy": "max", "latency": "min"}).losses({"accuracy": 0.9, "latency": 2.0})
    (-0.9, 2.0)

    Raises:
        TypeError: it is no mapping.
        ValueError: there is none, or a direction is neither ``"max"`` nor ``"min"``.
    """

    def __init__(self, directions: Mapping[str, Direction]) -> None:
        if not isinstance(directions, Mapping):
            raise TypeError(
                "objectives name metrics with their directions, such as {'accuracy': 'max'}; got "
                f"{directions!r}"
            )
        wrong = {name: found for name, found in directions.items() if found not in get_args(Direction)}
        if not directions or wrong:
            raise ValueError(
                "a search needs at least one metric with the direction 'max' or 'min', such as "
                f"{{'accuracy': 'max'}}; got {dict(directions)}"
            )
        self.directions = dict(directions)
        self._signs = [(name, -1.0 if found == "max" else 1.0) for name, found in self.directions.items()]

    def losses(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """One number an objective, less being better.

        Raises:
            ValueError: a metric is missing, or is no finite number.
        """
        values = [metrics.get(name, math.nan) for name in self.directions]
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"an evaluation must return a finite number for each of {list(self.directions)}; "
                f"got {dict(metrics)}"
            )
        return tuple(sign * value for (_, sign), value in zip(self._signs, values, strict=True))


@final
@dataclass(frozen=True)
class Trials:
    """What a search found.

    Attributes:
        trials: in the order of their numbers, failed ones among them.
        objectives: what was searched for.
        is_exhausted: no architecture is left that was not tried.
    """

    trials: tuple[Trial, ...]
    objectives: Objectives
    is_exhausted: bool

    @property
    def finished(self) -> tuple[Trial, ...]:
        """Those that did not fail."""
        return tuple(trial for trial in self.trials if not trial.is_failed)

    @property
    def best(self) -> Trial:
        """The best by the one objective; of equals, the first.

        Raises:
            ValueError: there are several objectives, or no trial that did not fail.
        """
        return self.top_k(1)[0]

    def top_k(self, k: int, by: str | None = None) -> list[Trial]:
        """The ``k`` best, best first; fewer, where fewer did not fail.

        Args:
            k: how many.
            by: the objective that counts; None: the only one.

        Raises:
            ValueError: ``k`` is not positive, there are several objectives and none is named, an unknown
                one is named, or no trial did not fail.
        """
        names = list(self.objectives.directions)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if by is None and len(names) > 1:
            raise ValueError(
                f"with the objectives {names} there is no one order: name one, such as by={names[0]!r}, or "
                "take pareto_front()"
            )
        if by is not None and by not in names:
            raise ValueError(f"by must be one of the objectives {names}, got {by!r}")
        at = 0 if by is None else names.index(by)
        ranked = sorted(self._some_finished(), key=lambda trial: self.objectives.losses(trial.metrics)[at])
        return ranked[:k]

    def pareto_front(self) -> list[Trial]:
        """Trials that no other trial beats, ordered by the first objective, best first.

        One trial beats another that is as good in every objective and better in one. Of trials that are
        equal in all, every one is there.

        Raises:
            ValueError: no trial did not fail.
        """
        found = self._some_finished()
        losses = [self.objectives.losses(trial.metrics) for trial in found]
        order = sorted(nondominated(losses), key=lambda index: losses[index])
        return [found[index] for index in order]

    def _some_finished(self) -> tuple[Trial, ...]:
        if not self.finished:
            errors = [trial.error for trial in self.trials]
            raise ValueError(
                f"none of the {len(errors)} trials came to an end; the first failed with: {errors[0]}"
                if errors
                else "nothing was tried"
            )
        return self.finished


def nondominated(losses: Sequence[tuple[float, ...]]) -> list[int]:
    """Which of some points no other one beats: as low in all numbers, and lower in one.

    >>> nondominated([(1.0, 3.0), (2.0, 2.0), (3.0, 3.0)])
    [0, 1]
    """
    points: npt.NDArray[np.float64] = np.array(losses, dtype=np.float64)
    return [
        index
        for index, point in enumerate(points)
        if not ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
    ]
