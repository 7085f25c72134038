"""The table that measurements make."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lookup_tables.calibrate import calibrate, cross_validated
from lookup_tables.device import DeviceFingerprint
from lookup_tables.measure import Measurement
from lookup_tables.session import SessionSettings
from lookup_tables.slope import COPIES
from lookup_tables.sources import CHAINS, OVERHEAD, TURNS, Method, Which
from lookup_tables.table import Entry, LookupTable, Subnet

if TYPE_CHECKING:
    import numpy.typing as npt

    from lookup_tables.profiled import PartTimes

# By network, the times of each of its entries at each place where it runs: a number a session.
Profiles = dict[str, tuple[tuple[str, tuple[float, ...]], ...]]

LATENCY = "p10"  # which number of a measurement is the latency
_LEAST_US = 0.05  # an entry that is no dearer than the session's overhead still is an entry


def times_by_key(calls: Sequence[str], found: PartTimes) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """What was profiled of a network, by the keys of its calls.

    A part without a node of its own was fused into another's, whose time holds it.
    """
    sessions = len(next(iter(found.values())))
    return tuple((key, found.get(place, (0.0,) * sessions)) for place, key in enumerate(calls))


def assemble_table(
    found: Mapping[Which, Measurement],
    names: Mapping[str, str],
    nets: Mapping[str, tuple[str, tuple[str, ...]]],
    *,
    device: DeviceFingerprint,
    space: str,
    settings: SessionSettings,
    clock: str | None = None,
    method: Method = "isolated",
    profiles: Profiles | None = None,
    finished: LookupTable | None = None,
) -> LookupTable:
    """The table that measurements make, with its calibration and its held-out error.

    Args:
        found: the measurements.
        names: of the entries, by key.
        nets: name and parts of the networks, by key.
        device: which measured.
        space, settings: as for `build_table`.
        clock: what was read; by default what the settings say.
        method: as for `build_table`.
        profiles: of networks, where entries were profiled.
        finished: a table that is completed.
    """
    entries = dict(finished.entries) if finished else {}
    subnets = {net.key: net for net in finished.subnets} if finished else {}
    overhead = finished.protocol["overhead_us"] if finished else found[OVERHEAD].p10_us
    for key, name in names.items():
        if key not in entries:
            entries[key] = _entry(found, profiles or {}, key, name, overhead)
    for key, (name, parts) in nets.items():
        if key not in subnets:
            once, again = (found[turn, key] for turn in TURNS)
            spread = {"median_us": once.median_us, "p10_us": once.p10_us, "p90_us": once.p90_us}
            subnets[key] = Subnet(key, name, parts, **spread, samples=once.samples, repeat_us=again.p10_us)
    sums = [sum(entries[key].p10_us for key in net.parts) for net in subnets.values()]
    counts = [len(net.parts) for net in subnets.values()]
    firsts = [net.p10_us for net in subnets.values()]
    seconds = [net.repeat_us for net in subnets.values()]
    means = [(first + second) / 2 for first, second in zip(firsts, seconds, strict=True)]
    least = min(entry.p10_us for entry in entries.values())
    return LookupTable(
        space=space,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        device=device,
        settings=settings,
        protocol={
            "method": method,
            "latency": LATENCY,
            "clock": clock or settings.clock,
            "overhead_us": overhead,
        },
        entries=entries,
        subnets=tuple(subnets.values()),
        calibration=calibrate(sums, counts, means, least),
        accuracy=cross_validated(sums, counts, firsts, seconds, least),
    )


def _entry(
    found: Mapping[Which, Measurement], profiles: Profiles, key: str, name: str, overhead_us: float
) -> Entry:
    if all((kind, key) in found for kind in CHAINS):
        one, several = (found[kind, key] for kind in CHAINS)
        longer = np.subtract(_times(several), _times(one)) / (COPIES - 1)
        return _made(key, name, longer, several.samples, "slope")
    seen = [us for times in profiles.values() for other, us in times if other == key]
    if seen:
        # What disturbs a session only adds to it. A part that is fused into its neighbour in one network
        # and not in another has two times: their mean is right for a sum.
        undisturbed = float(np.mean([min(us) for us in seen]))
        every = [number for us in seen for number in us]
        return _made(key, name, [undisturbed, *np.percentile(every, [50, 90])], len(every), "profiled")
    alone = found["entry", key]
    # Its own, without the session's.
    return _made(key, name, np.subtract(_times(alone), overhead_us), alone.samples, "isolated")


def _times(measured: Measurement) -> tuple[float, float, float]:
    return measured.p10_us, measured.median_us, measured.p90_us


def _made(key: str, name: str, times: npt.ArrayLike, samples: int, method: str) -> Entry:
    """An entry of an undisturbed, a usual and a long run, in this order, whatever noise makes of them."""
    low, middle, high = np.maximum.accumulate(np.maximum(times, _LEAST_US)).tolist()
    return Entry(key, name, median_us=middle, p10_us=low, p90_us=high, samples=samples, method=method)
