"""What a method of multi-trial search is: it chooses what to try, and learns from what was found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

import torch

from hwnas.trials.candidates import Candidates
from hwnas.trials.results import Objectives, Trial
from profilers.space import Architecture


@final
@dataclass(frozen=True)
class Problem:
    """What a method works on in one search.

    Attributes:
        candidates: the architectures within the filters, less those that were tried.
        objectives: what is searched for.
        generator: the only source of randomness that a method may use.
    """

    candidates: Candidates
    objectives: Objectives
    generator: torch.Generator


class Proposals(ABC):
    """A method at work on one problem. Its state begins and ends with the search.

    It is asked and told in turn; with several workers it is asked some times before it is told. What it
    answers may depend on nothing but the problem and what it was told: then a search that was killed goes
    on as if it had not been.
    """

    @abstractmethod
    def ask(self) -> Architecture | None:
        """An architecture of ``candidates`` that is new; None: there is none left."""

    @abstractmethod
    def tell(self, trial: Trial) -> None:
        """Learns from a finished trial, a failed one too, in the order in which they finish.

        The architecture may be another one than was asked for: a journal written with another number of
        workers has its own order.
        """


@dataclass(frozen=True)
class Method(ABC):
    """How a search chooses what to try next: a frozen dataclass whose fields are its settings."""

    @abstractmethod
    def start(self, problem: Problem) -> Proposals:
        """The method at work on a problem.

        Raises:
            ValueError: the method does not suit the problem.
        """

    def settings(self) -> Mapping[str, Any]:
        """What makes another search of it: its name and its fields."""
        return {"method": type(self).__name__} | {
            field.name: getattr(self, field.name) for field in fields(self)
        }
