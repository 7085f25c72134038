"""Latency by a table that others published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from lookup_tables.published import PublishedTable
from profilers.profile import Profiler, distinct_parts, tabulated
from profilers.space import Space

_SHOWN = 5


@final
class PublishedLatencyProfiler(Profiler):
    """What a network takes by somebody else's table, in milliseconds: the plain sum of its parts.

    Such a table has no calibration on whole networks and says nothing of its error: a sum of blocks measured
    alone is off by 3 to 50 % (``lookup_tables/calibrate.py``). It serves to compare networks on a device that
    one does not have; a budget in its milliseconds is not one that a measurement will confirm.

    Args:
        space: the space.
        example_input: of the shape that a deployed network gets, a batch of one.
        table: `lookup_tables.BlockTable` or `lookup_tables.OperatorTable`.
        extra_us: microseconds of parts that the table does not have, by their readable name; a part that is
            in neither is an error, never 0.

    Raises:
        ValueError: the table does not have parts of the space; they are counted and the first are named.
    """

    def __init__(
        self,
        space: Space,
        example_input: Tensor | Sequence[Tensor],
        table: PublishedTable,
        extra_us: Mapping[str, float] | None = None,
    ) -> None:
        inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        sites = space.sites(*inputs)
        parts = distinct_parts(space, sites)
        times, missing = {}, []
        for key, part in parts.items():
            if extra_us is not None and part.name in extra_us:
                times[key] = extra_us[part.name]
                continue
            try:
                times[key] = table.time_us(part.module, part.inputs)
            except ValueError as error:
                missing.append(f"{part.name}: {error}")
        if missing:
            shown = "; ".join(missing[:_SHOWN])
            more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise ValueError(
                f"'{table.name}' does not have {len(missing)} of {len(parts)} parts of the space: "
                f"{shown}{more}. Give their times as extra_us, or take a space and an "
                "input size that the table was made for"
            )
        super().__init__(tabulated(space, sites, {key: us / 1e3 for key, us in times.items()}, "ms"))
