"""How long steps tell of their progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is in all."""


def step(report: Progress, what: str) -> Callable[[int, int], None]:
    """The progress of one step."""
    return lambda done, total: report(what, done, total)
