"""Latency where the precision of each module is a choice beside its operator."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
from torch import Tensor

from lookup_tables import LookupTable
from profilers.cost import Cost, CostTable
from profilers.latency import calibrated_ms, check_table
from profilers.profile import Profiler, distinct_parts, every_option, parts_of
from profilers.space import Site, Space

_DEFAULT = "fp32"


@final
class MixedPrecisionProfiler(Profiler):
    """What a network takes whose modules compute in different precisions, in milliseconds.

    Every site takes its calibrated entry from the table of its module's precision: the choice of a precision
    is one more axis of the site's cost. Where one module follows another of a different precision, numbers
    are quantised or dequantised in between: each such border adds ``border_us``. Within one precision there
    are none, so that a network in fp32 alone costs what the table in fp32 says, and one in INT8 alone what
    the other says; the tables' constants are mixed by the share of modules in each.

    A border costs the same everywhere, and modules follow one another in the order in which they run. Both
    are simplifications: tensors differ in size, a module that is skipped still stands between its neighbours
    (in the precision that is chosen for it, which then costs nothing but borders: the cheapest network has it
    agree with a neighbour), and branches stand in a row. `hwnas.precision.measure_borders` finds
    ``border_us`` on whole mixed networks, and says how far off the predictions are.

    Args:
        space: the space.
        example_input: of the shape that a deployed network gets, usually a batch of one.
        tables: of one device and with equal settings but for the precision, by precision; one is ``fp32``.
        precision: the label of the choice that decides it, by the name of a module; '' is the whole network.
            Of several that hold a site the innermost counts; a site in none computes in fp32.
        border_us: of a change between ``fp32`` and another precision, in microseconds.
        allow_other_device: as for `LatencyProfiler`.

    Raises:
        MissingEntryError: a table lacks parts of the space.
        ValueError: tables that do not go together, or lack a precision; a module in which nothing runs; a
            negative ``border_us``.
    """

    def __init__(
        self,
        space: Space,
        example_input: Tensor | Sequence[Tensor],
        tables: Mapping[str, LookupTable],
        precision: Mapping[str, str],
        border_us: float,
        allow_other_device: bool = False,
    ) -> None:
        if border_us < 0:
            raise ValueError(f"border_us must be at least 0, got {border_us}")
        _check_tables(tables, [option for label in precision.values() for option in space.options[label]])
        for table in tables.values():
            check_table(table, allow_other_device)
        inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        sites = list(space.sites(*inputs))
        modules = [_module_of(site, precision) for site in sites]
        if idle := precision.keys() - set(modules):
            raise ValueError(f"a precision is chosen for modules in which nothing runs: {', '.join(idle)}")
        parts = distinct_parts(space, sites)
        known = {name: calibrated_ms(table, parts) for name, table in tables.items()}
        # In the order in which they run, each as often as it takes over.
        row = [
            precision.get(module) if module is not None else None for module, _ in itertools.groupby(modules)
        ]
        costs = [
            _site_cost(space, site, None if module is None else precision[module], known)
            for site, module in zip(sites, modules, strict=True)
        ]
        constants = {name: table.calibration.constant_us / 1e3 for name, table in tables.items()}
        costs += _constants(space, row, constants)
        costs += _borders(space, row, border_us / 1e3)
        super().__init__(Cost(space.options, constants[_DEFAULT], costs, "ms", space.implied))


def _check_tables(tables: Mapping[str, LookupTable], options: Sequence[str]) -> None:
    if missing := sorted({_DEFAULT, *options} - tables.keys()):
        raise ValueError(f"a table is needed for each precision; missing: {', '.join(missing)}")
    for name, table in tables.items():
        if table.settings.precision != name:
            raise ValueError(f"the table given as '{name}' was measured in {table.settings.precision}")
    alike = {(t.settings.threads, t.settings.optimisation, t.settings.runtime) for t in tables.values()}
    if len(alike) > 1:
        raise ValueError(
            "the tables must be measured alike but for the precision, got "
            f"{'; '.join(str(table.settings) for table in tables.values())}"
        )


def _module_of(site: Site, precision: Mapping[str, str]) -> str | None:
    """The innermost module with a precision of its own that holds a site."""
    holding = [
        name
        for name in precision
        if not name or f"{site.name}.".startswith((f"{name}.", f"{name}:", f"{name}#"))
    ]
    return max(holding, key=len, default=None)


def _site_cost(
    space: Space, site: Site, label: str | None, known: Mapping[str, Mapping[str, float]]
) -> CostTable:
    """A site under every combination of its labels, and of its precision where that is chosen."""
    parts = list(parts_of(space, site))
    every = every_option(space)
    shape = [len(every[other]) for other in site.labels]

    def values(precision: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        ms = known[precision]
        return np.array([0.0 if p is None or p.is_free else ms[p.key] for p in parts]).reshape(shape)

    if label is None:
        return CostTable(tuple(site.labels), values(_DEFAULT))
    options = space.options[label]
    return CostTable((*site.labels, label), np.stack([values(option) for option in options], axis=-1))


def _constants(space: Space, row: Sequence[str | None], constants: Mapping[str, float]) -> list[CostTable]:
    """What the sessions of the precisions cost besides: each module its share, beyond that of fp32."""
    share = 1 / len(row)
    return [
        CostTable(
            (label,),
            np.array([(constants[o] - constants[_DEFAULT]) * share for o in space.options[label]]),
        )
        for label in row
        if label is not None
    ]


def _borders(space: Space, row: Sequence[str | None], border_ms: float) -> list[CostTable]:
    """One table for each pair of neighbours that can differ."""
    found = []
    for pair in itertools.pairwise(row):
        labels = tuple(dict.fromkeys(label for label in pair if label is not None))
        options = [space.options[label] for label in labels]
        if pair[0] == pair[1]:
            continue
        if len(labels) == 1:
            changes = np.array([option != _DEFAULT for option in options[0]])
        else:
            changes = np.array([[one != other for other in options[1]] for one in options[0]])
        found.append(CostTable(labels, changes * border_ms))
    return found
