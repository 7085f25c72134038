"""Which choices take part in a network: those on a path that runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from hwnas.choices import Condition
from profilers.space import Option

_LARGEST_TABLE = 1_000_000


@final
@dataclass(frozen=True)
class Activity:
    """When a choice takes part: on any of its paths, where all conditions of the path hold.

    Attributes:
        paths: the conditions on the way to each place of the choice; an empty path always runs.
    """

    paths: tuple[tuple[Condition, ...], ...]

    def is_always(self) -> bool:
        return any(not path for path in self.paths)

    def labels(self) -> tuple[str, ...]:
        """The choices that it depends on."""
        if self.is_always():
            return ()
        conditions = itertools.chain.from_iterable(self.paths)
        return tuple(dict.fromkeys(label for condition in conditions for label in condition.labels))

    def holds(self, architecture: Mapping[str, Option]) -> bool:
        return any(all(condition.holds(architecture) for condition in path) for path in self.paths)

    def table(self, options: Mapping[str, Sequence[Option]]) -> NDArray[np.bool_]:
        """The truth for each combination of options at `labels`, one axis a label.

        Raises:
            ValueError: over a million combinations.
        """
        labels = self.labels()
        shape = tuple(len(options[label]) for label in labels)
        if math.prod(shape) > _LARGEST_TABLE:
            raise ValueError(
                f"a choice is shared by branches of {len(labels)} other choices ({', '.join(labels)}): "
                f"{math.prod(shape)} combinations, at most {_LARGEST_TABLE} are enumerated. Give the "
                "places labels of their own, or use the choice once outside the branches"
            )
        truth = np.empty(shape, dtype=np.bool_)
        for index in np.ndindex(*shape):
            here = {label: options[label][i] for label, i in zip(labels, index, strict=True)}
            truth[index] = self.holds(here)
        return truth

    def canonical(
        self, label: str, options: Mapping[str, Sequence[Option]]
    ) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
        """Which joint options a canonical architecture has: where the choice takes no part, its default.

        Args:
            label: the choice.
            options: each label with its options.

        Returns:
            The labels that decide, ``label`` last, and the truth with one axis a label.
        """
        is_default = np.arange(len(options[label])) == 0
        return (*self.labels(), label), self.table(options)[..., None] | is_default
