"""From a space's sites and a meter to the cost of every architecture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from profilers.cost import Cost, CostTable
from profilers.space import Architecture, Option, Part, Site, Space

# Combinations of one site's options. Each is frozen and looked at.
_LARGEST = 100_000


class Meter(Protocol):
    """What a module costs when it is called with the inputs: a number in the profiler's unit.

    The module and its tensors are on the ``meta`` device.
    """

    def __call__(self, module: nn.Module, inputs: Sequence[Tensor]) -> float: ...


class Profiler:
    """What each architecture of a space costs, in one unit.

    A kind of profiler differs in how it comes by its cost, and in what else it can tell.

    Attributes:
        cost: every architecture's cost, as a sum of small tables.
    """

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

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
    known = {
        key: float(meter(part.module, part.inputs)) for key, part in distinct_parts(space, sites).items()
    }
    return tabulated(space, sites, known, unit, constant)


def tabulated(
    space: Space, sites: Sequence[Site], known: Mapping[str, float], unit: str, constant: float = 0.0
) -> Cost:
    """The cost of every architecture from what is known of each distinct part, by ``Part.key``."""
    tables, options = [], every_option(space)
    for site in sites:
        shape = [len(options[label]) for label in site.labels]
        values = [0.0 if p is None or p.is_free else known[p.key] for p in parts_of(space, site)]
        if not any(values):
            continue  # nothing there costs anything: the choices that decide about it need not meet
        tables.append(CostTable(tuple(site.labels), np.array(values).reshape(shape)))
    return Cost(space.options, constant, tables, unit, space.implied)


def distinct_parts(space: Space, sites: Sequence[Site]) -> dict[str, Part]:
    """Every part that some architecture runs and that executes something, by its key."""
    parts = (part for site in sites for part in parts_of(space, site))
    return {part.key: part for part in parts if part is not None and not part.is_free}


def parts_of(space: Space, site: Site) -> Sequence[Part | None]:
    """The site under every combination of its labels' options, as in `combinations_of`.

    Raises:
        ValueError: there are over 100,000 combinations.
    """
    _check_count(space, site)
    return site.parts(every_option(space))


def combinations_of(space: Space, site: Site) -> Iterator[Architecture]:
    """Every combination of the options of a site's labels, the last label's options fastest.

    Raises:
        ValueError: there are over 100,000 combinations.
    """
    _check_count(space, site)
    options = every_option(space)
    for combination in itertools.product(*(options[label] for label in site.labels)):
        yield dict(zip(site.labels, combination, strict=True))


def every_option(space: Space) -> dict[str, tuple[Option, ...]]:
    """The options of each label that a site can depend on: the choices, and what they imply."""
    return {**space.options, **{implied.label: implied.options for implied in space.implied}}


def _check_count(space: Space, site: Site) -> None:
    options = every_option(space)
    count = math.prod(len(options[label]) for label in site.labels)
    if count > _LARGEST:
        raise ValueError(
            f"site {site.name!r} depends on {tuple(site.labels)}: {count} combinations, at most "
            f"{_LARGEST} are looked at. Let fewer choices meet in one module"
        )
