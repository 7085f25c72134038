"""From a space's sites and a meter to the cost of every architecture."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from profilers.cost import Cost, CostTable
from profilers.space import Option, Part, Site, Space

# Combinations of one site's options. Each is frozen and looked at.
_LARGEST = 100_000


class Meter(Protocol):
    """What a module costs when it is called with the inputs: a number in the profiler's unit.

    The module and its tensors are on the ``meta`` device.
    """

    def __call__(self, module: nn.Module, inputs: Sequence[Tensor]) -> float: ...


class Profiler(ABC):
    """What each architecture of a space costs, in one unit."""

    @property
    @abstractmethod
    def space(self) -> Space: ...

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """Every architecture's cost, as a sum of small tables."""

    @property
    def unit(self) -> str:
        """``"ms"``, ``"MAC"``, ``"parameter"``."""
        return self.cost.unit

    def profile(self, architecture: Mapping[str, Option]) -> float:
        """The cost of one architecture, in ``unit``.

        Raises:
            ValueError: a choice that the cost depends on is missing, or has an option that does not exist.
        """
        return self.cost.of(architecture)


def build_cost(space: Space, sites: Sequence[Site], meter: Meter, unit: str, constant: float = 0.0) -> Cost:
    """The cost of every architecture: each distinct part of each site is measured once.

    A site that does not run costs 0, and so does one that executes nothing.

    Args:
        space: whose choices the sites depend on.
        sites: places whose costs add up.
        meter: called once for each distinct ``Part.key``.
        unit: of the meter and the constant.
        constant: what every architecture costs besides.

    Raises:
        ValueError: a site depends on so many choices that it has over 100,000 combinations.
    """
    known: dict[str, float] = {}

    def measured(part: Part | None) -> float:
        if part is None or part.is_free:
            return 0.0
        if part.key not in known:
            known[part.key] = float(meter(part.module, part.inputs))
        return known[part.key]

    tables = []
    for site in sites:
        shape = [len(space.options[label]) for label in site.labels]
        values = np.array([measured(part) for part in parts_of(space, site)]).reshape(shape)
        tables.append(CostTable(tuple(site.labels), values))
    return Cost(space.options, constant, tables, unit)


def parts_of(space: Space, site: Site) -> Iterator[Part | None]:
    """The site under every combination of its labels' options, the last label's options fastest.

    Raises:
        ValueError: there are over 100,000 combinations.
    """
    choices = [space.options[label] for label in site.labels]
    count = math.prod(map(len, choices))
    if count > _LARGEST:
        raise ValueError(
            f"site {site.name!r} depends on {tuple(site.labels)}: {count} combinations, at most "
            f"{_LARGEST} are looked at. Let fewer choices meet in one module"
        )
    for combination in itertools.product(*choices):
        yield site.part(dict(zip(site.labels, combination, strict=True)))
