"""Whether a table still predicts, and by how much two tables differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from scipy.stats import binom

from lookup_tables.build import Measure
from lookup_tables.calibrate import accuracy_of, held_out_us
from lookup_tables.measure import LARGEST_FLOOR_PERCENT, measure
from lookup_tables.progress import Progress, step
from lookup_tables.sources import TURNS, SubnetSource, by_key, export_models, to_measure
from lookup_tables.table import Accuracy, LookupTable

_CHANCE = 0.05  # an interval is doubted where what was seen would be rarer than this


@final
@dataclass(frozen=True)
class Validation:
    """A table's predictions against networks that were measured anew, in microseconds.

    Attributes:
        predicted_us, measured_us: of each network.
        accuracy: of these networks; its interval is the one that they would have had.
        inside: how many lie in the interval that the table claims for them.
        coverage: the probability with which it claims that.
        clock: what was read.
    """

    predicted_us: tuple[float, ...]
    measured_us: tuple[float, ...]
    accuracy: Accuracy
    inside: int
    coverage: float
    clock: str

    @property
    def is_quiet(self) -> bool:
        """The noise floor is low enough for the numbers to mean something: 3 %, or 5 % on the wall clock."""
        return self.accuracy.noise_floor_percent <= LARGEST_FLOOR_PERCENT[self.clock]

    @property
    def covers(self) -> bool:
        """The interval holds what it claims: as few inside, or fewer, would be seen in over 5 % of cases."""
        return bool(binom.cdf(self.inside, len(self.measured_us), self.coverage) >= _CHANCE)


def validate_table(
    table: LookupTable,
    subnets: Sequence[SubnetSource],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    measurer: Measure = measure,
) -> Validation:
    """The error of a table on networks that are measured here and now, twice.

    Raises:
        ValueError: no network.
        MissingEntryError: a network has a part that the table lacks.
    """
    if not subnets:
        raise ValueError("a table is validated on whole networks: give at least one subnet")
    report = progress or (lambda what, done, total: None)
    nets = by_key(subnets)
    predicted = [table.predict_us(net.keys) for net in nets.values()]
    wanted = to_measure((), nets, seed)
    models, reference = export_models(wanted, {}, nets, table.settings, report)
    found = measurer(
        {f"{kind} {key}": models[kind, key] for kind, key in wanted},
        table.settings,
        reference=reference,
        seed=seed,
        progress=step(report, "measuring networks"),
    )
    once, again = ([found[f"{turn} {key}"].p10_us for key in nets] for turn in TURNS)
    intervals = [table.interval_us(us) for us in predicted]
    return Validation(
        predicted_us=tuple(predicted),
        measured_us=tuple(once),
        accuracy=accuracy_of(predicted, once, again),
        inside=sum(low <= us <= high for us, (low, high) in zip(once, intervals, strict=True)),
        coverage=table.accuracy.coverage,
        clock=table.settings.clock,
    )


def held_out(table: LookupTable) -> tuple[list[float], list[float]]:
    """What the table's own networks are predicted by a calibration on the others, and what they took."""
    entries = table.entries
    sums = [table.sum_us(net.parts) for net in table.subnets]
    means = [(net.p10_us + net.repeat_us) / 2 for net in table.subnets]
    least = min(entry.p10_us for entry in entries.values())
    predicted = held_out_us(sums, [len(net.parts) for net in table.subnets], means, least)
    return predicted, [net.p10_us for net in table.subnets]


@final
@dataclass(frozen=True)
class Difference:
    """How a second table differs from a first.

    Attributes:
        facts: device, settings, method and space where they differ, one line each.
        ratios: of the second's times to the first's, by the key of each entry that both have, smallest first.
        only_first, only_second: how many entries one of them has alone.
    """

    facts: tuple[str, ...]
    ratios: dict[str, float]
    only_first: int
    only_second: int


def difference(first: LookupTable, second: LookupTable) -> Difference:
    """Compares two tables: two devices, or one device at two dates.

    >>> difference(table, table).facts  # doctest: +SKIP
    ()
    """
    facts = first.device.differences(second.device)
    for what, one, other in (
        ("space", first.space, second.space),
        ("settings", first.settings, second.settings),
        ("method", first.protocol["method"], second.protocol["method"]),
        ("latency", first.protocol.get("latency"), second.protocol.get("latency")),
    ):
        if one != other:
            facts.append(f"{what}: {one} against {other}")
    common = first.entries.keys() & second.entries.keys()
    ratios = {key: second.entries[key].p10_us / first.entries[key].p10_us for key in common}
    return Difference(
        facts=tuple(facts),
        ratios=dict(sorted(ratios.items(), key=lambda item: (item[1], item[0]))),
        only_first=len(first.entries.keys() - common),
        only_second=len(second.entries.keys() - common),
    )
