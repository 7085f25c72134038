"""Latency by a device's lookup table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from lookup_tables import LookupTable, fingerprint
from profilers.profile import Profiler, distinct_parts, tabulated
from profilers.space import Option, Part, Space


@final
class LatencyProfiler(Profiler):
    """What a network takes on a device, in milliseconds: calibrated entries of its table, summed.

    ``cost.of(a)`` equals ``table.predict_us(keys(a)) / 1000``: each site that runs adds ``scale * entry +
    per_site_us``, the network adds ``constant_us``, and what executes nothing (a skip) adds 0 by definition.

    Args:
        space: the space.
        example_input: of the shape that a deployed network gets, usually a batch of one.
        table: of the device.
        allow_other_device: whether the table may be of another machine than this one; then there is a
            warning in place of the error.

    Raises:
        MissingEntryError: the table lacks parts of the space; all are counted and the first are named.
        ValueError: the table is of another device.

    Warns:
        UserWarning: the table's own held-out error is large, or it is of another device that was allowed.
    """

    def __init__(
        self,
        space: Space,
        example_input: Tensor | Sequence[Tensor],
        table: LookupTable,
        allow_other_device: bool = False,
    ) -> None:
        check_table(table, allow_other_device)
        self.table = table
        inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        self._sites = list(space.sites(*inputs))
        parts = distinct_parts(space, self._sites)
        known = calibrated_ms(table, parts)
        super().__init__(tabulated(space, self._sites, known, "ms", table.calibration.constant_us / 1e3))

    def keys(self, architecture: Mapping[str, Option]) -> list[str]:
        """The table's entries that the network executes, each as often as it does."""
        parts = (site.part(architecture) for site in self._sites)
        return [part.key for part in parts if part is not None and not part.is_free]

    def interval(self, architecture: Mapping[str, Option]) -> tuple[float, float]:
        """Between which two times, in milliseconds, the table expects a measurement of the network."""
        low, high = self.table.interval_us(self.profile(architecture) * 1e3)
        return low / 1e3, high / 1e3


def check_table(table: LookupTable, allow_other_device: bool) -> None:
    """Raises ``ValueError`` for a table of another machine; warns where that may be, and of a bad table."""
    if differences := table.device.differences(fingerprint(table.settings.runtime)):
        text = (
            f"the latency table is of another device ({'; '.join(differences)}): what it predicts does "
            "not hold on this machine"
        )
        if not allow_other_device:
            raise ValueError(f"{text}. Use --allow-other-device to search for that device all the same")
        warnings.warn(text, stacklevel=3)
    if doubt := table.doubt():
        warnings.warn(doubt, stacklevel=3)


def calibrated_ms(table: LookupTable, parts: Mapping[str, Part]) -> dict[str, float]:
    """What each part adds to a network, in milliseconds, by key.

    Raises:
        MissingEntryError: the table lacks parts.
    """
    table.require({key: part.name for key, part in parts.items()})
    scale, per_site_us = table.calibration.scale, table.calibration.per_site_us
    return {key: (scale * table.entries[key].p10_us + per_site_us) / 1e3 for key in parts}
