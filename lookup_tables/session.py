"""How ONNX Runtime is set up: a time holds for these settings only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import onnxruntime

from lookup_tables.worker import LEVELS, session_options

Optimisation = Literal["all", "extended", "basic", "disabled"]


@final
@dataclass(frozen=True)
class SessionSettings:
    """The deployed settings of an ONNX Runtime session, CPU provider.

    The optimisation level must be the deployed one: "all" is 2.2 times as fast as "extended" on some CPUs,
    and not by the same factor for every block.

    Args:
        threads: threads inside an operator.
        optimisation: level of graph optimisation.

    Raises:
        ValueError: ``threads`` is not a positive integer, or the level is unknown.

    >>> SessionSettings(threads=1).clock, SessionSettings(threads=2).clock
    ('thread_cpu', 'wall')
    """

    threads: int = 1
    optimisation: Optimisation = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 1:
            raise ValueError(f"threads must be a positive integer, got {self.threads!r}")
        if self.optimisation not in LEVELS:
            raise ValueError(f"optimisation must be one of {', '.join(LEVELS)}; got {self.optimisation!r}")

    @property
    def clock(self) -> Literal["thread_cpu", "wall"]:
        """CPU time of the calling thread at one thread, which a busy machine hardly moves; else wall time."""
        return "thread_cpu" if self.threads == 1 else "wall"

    def options(self) -> onnxruntime.SessionOptions:
        """Fresh options: one operator after another, waiting threads asleep, only errors logged."""
        return session_options(self.threads, self.optimisation)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> SessionSettings:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: a setting is missing, unknown or invalid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if facts.keys() != names:
            raise ValueError(
                f"session settings must hold exactly {', '.join(sorted(names))}; "
                f"got {', '.join(sorted(facts)) or 'nothing'}"
            )
        return cls(**facts)
