"""Latency where the precision of each module is a choice beside its operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lookup_tables import LookupTable
from profilers.cost import Cost, CostTable
from profilers.latency import calibrated_ms, check_table
from profilers.profile import Profiler, distinct_parts, every_option, parts_of
from profilers.space import Site, Space

Bools = npt.NDArray[np.bool_]

_DEFAULT = "fp32"
_LARGEST = 1_000_000  # cells of a table


@final
class MixedPrecisionProfiler(Profiler):
    """What a network takes whose modules compute in different precisions, in milliseconds.

    Every site takes its calibrated entry from the table of its module's precision: the choice of a precision
    is one more axis of the site's cost. Where one module follows another of a different precision, numbers
    are quantised or dequantised in between: each such border adds ``border_us``. Within one precision there
    are none, so that a network in fp32 alone costs what the table in fp32 says, and one in INT8 alone what
    the other says; the tables' constants are mixed by the share of modules in each, of those that always run.

    A border costs the same everywhere, and modules follow one another in the order in which they run; across
    what is skipped others are neighbours. That is a simplification: tensors differ in size, and branches
    stand in a row. `hwnas.precision.measure_borders` finds ``border_us`` on whole mixed networks, and says
    how far off the predictions are.

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
            negative ``border_us``; or so many modules in a row that may be skipped that their borders have
            over a million combinations.
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
            _Stretch.of(space, None if module is None else precision[module], [site for _, site in found])
            for module, found in itertools.groupby(zip(modules, sites, strict=True), key=lambda pair: pair[0])
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


@final
@dataclass(frozen=True)
class _Stretch:
    """Sites that run one after the other in one precision.

    Attributes:
        precision: the label of the choice that decides it; None: fp32.
        labels: the choices that decide whether any of it runs.
        runs: whether it does, one axis a label.
    """

    precision: str | None
    labels: tuple[str, ...]
    runs: Bools

    @classmethod
    def of(cls, space: Space, precision: str | None, sites: Sequence[Site]) -> _Stretch:
        labels: tuple[str, ...] = ()
        runs: Bools = np.array(False)
        for site in sites:
            own, ran = _where_it_runs(space, site)
            both = tuple(dict.fromkeys((*labels, *own)))
            _check_size(space, both)
            runs = _spread(space, labels, runs, both) | _spread(space, own, ran, both)
            if runs.all():
                return cls(precision, (), np.array(True))
            labels = both
        return cls(precision, labels, runs)

    @property
    def always(self) -> bool:
        return not self.labels


def _where_it_runs(space: Space, site: Site) -> tuple[tuple[str, ...], Bools]:
    """The choices that decide whether a site executes something, and the truth."""
    options = every_option(space)
    shape = [len(options[label]) for label in site.labels]
    runs = np.array([p is not None and not p.is_free for p in parts_of(space, site)]).reshape(shape)
    labels = list(site.labels)
    for label in site.labels:
        axis = labels.index(label)
        first = runs.take([0], axis)
        if (runs == first).all():  # it does not matter
            runs = first.squeeze(axis)
            labels.remove(label)
    return tuple(labels), runs


def _constants(space: Space, row: Sequence[_Stretch], constants: Mapping[str, float]) -> list[CostTable]:
    """What the sessions of the precisions cost besides: each module its share, beyond that of fp32."""
    sharing = [stretch for stretch in row if stretch.always] or row
    return [
        CostTable(
            (label,),
            np.array([constants[o] - constants[_DEFAULT] for o in space.options[label]]) / len(sharing),
        )
        for label in (stretch.precision for stretch in sharing)
        if label is not None
    ]


def _borders(space: Space, row: Sequence[_Stretch], border_ms: float) -> list[CostTable]:
    """One table for each pair that can differ and be neighbours: where both run, and nothing between."""
    found = []
    for first, one in enumerate(row):
        between: list[_Stretch] = []
        for other in row[first + 1 :]:
            if one.precision != other.precision:
                found.append(_border(space, one, between, other, border_ms))
            if other.always:
                break
            between.append(other)
    return found


def _border(
    space: Space, one: _Stretch, between: Sequence[_Stretch], other: _Stretch, border_ms: float
) -> CostTable:
    chosen = [label for label in (one.precision, other.precision) if label is not None]
    ends = [space.options[label] if label else (_DEFAULT,) for label in (one.precision, other.precision)]
    differ = np.array([[left != right for right in ends[1]] for left in ends[0]])
    labels = tuple(dict.fromkeys(itertools.chain(chosen, *(s.labels for s in (one, *between, other)))))
    _check_size(space, labels)
    truth = _spread(space, chosen, differ.reshape([len(space.options[label]) for label in chosen]), labels)
    for stretch in (one, other):
        truth = truth & _spread(space, stretch.labels, stretch.runs, labels)
    for stretch in between:
        truth = truth & ~_spread(space, stretch.labels, stretch.runs, labels)
    options = every_option(space)
    shape = [len(options[label]) for label in labels]
    return CostTable(labels, np.where(np.broadcast_to(truth, shape), border_ms, 0.0))


def _spread(space: Space, own: Sequence[str], values: Bools, labels: Sequence[str]) -> Bools:
    """An array over some of the labels, as one that broadcasts over all."""
    ordered = values.transpose([own.index(label) for label in labels if label in own])
    options = every_option(space)
    return ordered.reshape([len(options[label]) if label in own else 1 for label in labels])


def _check_size(space: Space, labels: Sequence[str]) -> None:
    options = every_option(space)
    size = math.prod(len(options[label]) for label in labels)
    if size > _LARGEST:
        raise ValueError(
            f"what a border between precisions costs depends on {len(labels)} choices ({', '.join(labels)}): "
            f"{size} combinations, at most {_LARGEST} are enumerated. Give modules that stand in a row, and "
            "may all be skipped, one choice of the precision"
        )
