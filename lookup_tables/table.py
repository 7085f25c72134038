"""A device's latency table: what was measured, how, and how far its predictions can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, final

from lookup_tables.device import DeviceFingerprint
from lookup_tables.session import SessionSettings
from lookup_tables.whole_file import write_whole

SCHEMA = "hwnas latency table, version 3"
_FIRST_SCHEMA = "hwnas latency table, version 1"  # entries did not say by which method
_SECOND_SCHEMA = "hwnas latency table, version 2"  # latencies were medians
_BUILD = "hwnas table build"
_TRUSTED_PERCENT = 90.0  # of held-out networks within 10 %
_SHOWN = 10  # missing entries that an error names
_T = TypeVar("_T")


@final
class MissingEntryError(ValueError):
    """A table holds no measurement of something that a network executes."""


@final
@dataclass(frozen=True)
class Entry:
    """How long one part of networks takes, in microseconds.

    Attributes:
        key: digest of what is executed (`lookup_tables.executed_graph`).
        name: readable.
        p10_us: what a run takes that nothing disturbs, of which predictions are made: the 10th percentile of
            ``samples``, or, profiled, the mean over networks of each one's least disturbed session.
        median_us, p90_us: the median and the 90th percentile.
        method: how it was measured (`lookup_tables.build_table`); in a profiled table, what could not be
            profiled is ``isolated``.
    """

    key: str
    name: str
    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    method: str = "isolated"


@final
@dataclass(frozen=True)
class Subnet:
    """A whole network that was measured to calibrate the table, in microseconds.

    Attributes:
        key: digest of what is executed.
        name: readable.
        parts: keys of its entries, one for each time that it is executed.
        p10_us: the latency in the first measurement; ``repeat_us`` is that in a second one.
        median_us, p90_us: the median and the 90th percentile of the first.
    """

    key: str
    name: str
    parts: tuple[str, ...]
    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    repeat_us: float


@final
@dataclass(frozen=True)
class Calibration:
    """What turns a sum of entries into a latency: ``scale * sum + per_site_us * n + constant_us``.

    An entry measured alone holds the overhead of a session and of bringing data into the layout that its
    kernels want, and finds its data in the cache: a plain sum is off by 3 to 50 %.
    """

    scale: float
    per_site_us: float
    constant_us: float

    def predict_us(self, sum_us: float, sites: int) -> float:
        return self.scale * sum_us + self.per_site_us * sites + self.constant_us


@final
@dataclass(frozen=True)
class Accuracy:
    """How well a table predicts networks that its calibration has not seen.

    Attributes:
        mape_percent: mean absolute error, relative to what was measured.
        within_5_percent: share of the subnets, in percent, whose error is at most 5 %; likewise 10 %.
        spearman: rank correlation of predicted and measured.
        noise_floor_percent: median absolute difference of two measurements of one subnet.
        subnets: how many were held out, each once.
        interval_low: ``measured / predicted - 1`` lies between this and ``interval_high`` for a new subnet,
            with a probability of ``coverage``.
    """

    mape_percent: float
    within_5_percent: float
    within_10_percent: float
    spearman: float
    noise_floor_percent: float
    subnets: int
    interval_low: float
    interval_high: float
    coverage: float


@final
@dataclass(frozen=True)
class LookupTable:
    """What the parts of a space cost on one device, with the facts that make the numbers mean something.

    Attributes:
        space: name of the space whose parts these are.
        date: when it was built, ISO 8601.
        device: where it was measured.
        settings: the runtime's settings; other settings make other numbers.
        protocol: how it was measured: ``method`` and what that needs; ``latency`` is ``p10``, or ``median``
            in tables of before, whose numbers are then medians in ``p10_us`` too.
        entries: by key.
        subnets: whole networks; calibration and accuracy follow from them.

    >>> table = LookupTable.load("latency_table.json")  # doctest: +SKIP
    >>> table.predict_us(["06b1…", "9f30…"])  # doctest: +SKIP
    412.7
    """

    space: str
    date: str
    device: DeviceFingerprint
    settings: SessionSettings
    protocol: Mapping[str, Any]  # plain JSON
    entries: Mapping[str, Entry]
    subnets: tuple[Subnet, ...]
    calibration: Calibration
    accuracy: Accuracy

    def sum_us(self, keys: Iterable[str]) -> float:
        """The plain sum of entries. A key counts as often as it comes.

        Raises:
            MissingEntryError: an entry is missing.
        """
        keys = list(keys)
        self.require({key: key for key in keys})
        return math.fsum(self.entries[key].p10_us for key in keys)

    def predict_us(self, keys: Iterable[str]) -> float:
        """The latency of a network that executes these entries (each as often as it comes; none is free).

        Raises:
            MissingEntryError: an entry is missing.
        """
        keys = list(keys)
        return self.calibration.predict_us(self.sum_us(keys), len(keys))

    def interval_us(self, predicted_us: float) -> tuple[float, float]:
        """Where the measured latency of a network lies with a probability of ``accuracy.coverage``."""
        return (
            predicted_us * (1.0 + self.accuracy.interval_low),
            predicted_us * (1.0 + self.accuracy.interval_high),
        )

    def doubt(self) -> str | None:
        """Why its predictions should not be relied on; None where they may be."""
        if self.protocol.get("latency") == "median":
            return (
                f"the latency table of '{self.space}' of {self.date} predicts medians; what is measured now "
                "is the 10th percentile, which is less, by 1 % on a quiet machine and by a fifth on a busy "
                "one: build it again"
            )
        accuracy = self.accuracy
        if accuracy.within_10_percent >= _TRUSTED_PERCENT:
            return None
        return (
            f"the latency table of '{self.space}' predicts only {accuracy.within_10_percent:.0f} % of "
            f"{accuracy.subnets} held-out networks within 10 % (at a noise floor of "
            f"{accuracy.noise_floor_percent:.1f} %): build it again on a quiet machine, or by another method"
        )

    def require(self, parts: Mapping[str, str]) -> None:
        """Checks that every part has an entry.

        Args:
            parts: key to readable name.

        Raises:
            MissingEntryError: naming what is missing and the command that measures it.
        """
        missing = [name for key, name in parts.items() if key not in self.entries]
        if not missing:
            return
        shown = "; ".join(missing[:_SHOWN])
        more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise MissingEntryError(
            f"no latency of {len(missing)} of {len(parts)} parts in the table of '{self.space}' from "
            f"{self.date}: {shown}{more}. Measure what is missing: {_BUILD}"
        )

    def with_calibration(self, calibration: Calibration, accuracy: Accuracy | None = None) -> LookupTable:
        """The same measurements read differently; the accuracy stays unless a new one is given."""
        return replace(self, calibration=calibration, accuracy=accuracy or self.accuracy)

    def save(self, path: str | Path) -> None:
        """Writes JSON, one line an entry, in a fixed order. The file appears whole or not at all."""
        sections: dict[str, Any] = {
            "schema": SCHEMA,
            "space": self.space,
            "date": self.date,
            "device": self.device.to_json(),
            "settings": self.settings.to_json(),
            "protocol": dict(self.protocol),
            "calibration": asdict(self.calibration),
            "accuracy": asdict(self.accuracy),
        }
        lines = [f"{_text(name)}: {_text(section)}" for name, section in sections.items()]
        ordered = sorted(self.entries.values(), key=lambda entry: (entry.name, entry.key))
        lines.append('"entries": [\n' + ",\n".join(_text(asdict(entry)) for entry in ordered) + "\n]")
        lines.append('"subnets": [\n' + ",\n".join(_text(asdict(net)) for net in self.subnets) + "\n]")
        write_whole(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | Path) -> LookupTable:
        """Reads a table and checks it.

        Raises:
            ValueError: the file is absent, truncated, no latency table, of another schema, or holds a
                number that no measurement gives.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"no latency table at '{path}'; measure one: {_BUILD}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read '{path}' as a latency table: {error}") from error
        try:
            return _table(_parsed(text))
        except _WrongError as error:
            raise ValueError(
                f"'{path}' is damaged or no latency table: {error}. Restore the file, or move it away and "
                f"measure again: {_BUILD}"
            ) from error


class _WrongError(Exception):
    """What is wrong in a file, without its name."""


def _parsed(text: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(named := dict(pairs)) < len(pairs):
            raise _WrongError(f"a name stands twice among {sorted(name for name, _ in pairs)}")
        return named

    try:
        raw = json.loads(text, object_pairs_hook=no_duplicates)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _WrongError(f"it is not whole JSON ({error})") from error
    if not isinstance(raw, dict) or "schema" not in raw:
        raise _WrongError("it does not begin with a schema")
    if raw["schema"] in (_FIRST_SCHEMA, _SECOND_SCHEMA):
        _upgrade(raw)
    if raw["schema"] != SCHEMA:
        raise _WrongError(f"its schema must be {SCHEMA!r}; it is {raw['schema']!r}")
    expected = {"schema", *(field.name for field in fields(LookupTable))}
    if wrong := expected ^ raw.keys():
        raise _WrongError(f"missing or unknown: {sorted(wrong)}")
    return raw


def _upgrade(raw: dict[str, Any]) -> None:
    """Makes the third version of an older one; what is not as it must be is left for `_table` to refuse."""
    first, raw["schema"] = raw["schema"] == _FIRST_SCHEMA, SCHEMA
    entries, subnets, protocol = (raw.get(name) for name in ("entries", "subnets", "protocol"))
    if not (isinstance(entries, list) and isinstance(subnets, list) and isinstance(protocol, dict)):
        return
    protocol["latency"] = "median"
    for entry in entries:
        if first and isinstance(entry, dict):
            entry.setdefault("method", protocol.get("method"))
    for measured in (*entries, *subnets):
        if isinstance(measured, dict) and "median_us" in measured and "p10_us" in measured:
            measured["p10_us"] = measured["median_us"]


def _table(raw: Mapping[str, Any]) -> LookupTable:
    for name in ("space", "date"):
        _check(isinstance(raw[name], str), name, "text", raw[name])
    for name in ("entries", "subnets"):
        _check(isinstance(raw[name], list), name, "a list", raw[name])
    _check(
        isinstance(raw["protocol"], dict) and isinstance(raw["protocol"].get("method"), str),
        "protocol",
        "an object with a method",
        raw["protocol"],
    )
    entries = [_record(Entry, f"entry {index + 1}", line) for index, line in enumerate(raw["entries"])]
    by_key = {entry.key: entry for entry in entries}
    if len(by_key) < len(entries):
        raise _WrongError("two entries have one key")
    subnets = [_record(Subnet, f"subnet {index + 1}", line) for index, line in enumerate(raw["subnets"])]
    for subnet in subnets:
        if unknown := set(subnet.parts) - by_key.keys():
            raise _WrongError(f"subnet '{subnet.name}' has parts without an entry: {sorted(unknown)}")
    calibration = _record(Calibration, "calibration", raw["calibration"])
    for entry in entries:
        _check(
            calibration.scale * entry.p10_us + calibration.per_site_us >= 0,
            "calibration: per_site_us",
            f"such that '{entry.name}' does not make a network faster",
            calibration.per_site_us,
        )
    accuracy = _record(Accuracy, "accuracy", raw["accuracy"])
    _check(
        -1 < accuracy.interval_low <= accuracy.interval_high,
        "accuracy: interval",
        "ordered, above -1",
        (accuracy.interval_low, accuracy.interval_high),
    )
    return LookupTable(
        space=raw["space"],
        date=raw["date"],
        device=_made("device", DeviceFingerprint.from_json, raw["device"]),
        settings=_made("settings", SessionSettings.from_json, raw["settings"]),
        protocol=raw["protocol"],
        entries=by_key,
        subnets=tuple(subnets),
        calibration=calibration,
        accuracy=accuracy,
    )


_SIGNED = {"spearman", "per_site_us", "interval_low", "interval_high"}
_POSITIVE = {"median_us", "p10_us", "p90_us", "repeat_us", "scale", "coverage"}  # nothing measured is 0


def _record(kind: Callable[..., _T], where: str, raw: Any) -> _T:
    """A flat dataclass from its JSON object, every field checked by its declared type."""
    _check(isinstance(raw, dict), where, "an object", raw)
    types = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    if wrong := types.keys() ^ raw.keys():
        raise _WrongError(f"{where}: missing or unknown: {sorted(wrong)}")
    values = {}
    for name, declared in types.items():
        value, at = raw[name], f"{where}: {name}"
        if declared == "str":
            _check(isinstance(value, str), at, "text", value)
        elif declared == "tuple[str, ...]":
            _check(isinstance(value, list) and all(isinstance(key, str) for key in value), at, "keys", value)
            value = tuple(value)
        elif declared == "int":
            _check(type(value) is int and value > 0, at, "a count", value)
        else:
            _check(type(value) in (int, float) and math.isfinite(value), at, "a finite number", value)
            _check(value >= 0 or name in _SIGNED, at, "at least 0", value)
            _check(value > 0 or name not in _POSITIVE, at, "above 0", value)
            value = float(value)
        values[name] = value
    return kind(**values)


def _made(where: str, make: Callable[[Any], _T], raw: Any) -> _T:
    try:
        return make(raw)
    except (ValueError, TypeError, KeyError) as error:
        raise _WrongError(f"{where}: {error}") from error


def _check(holds: bool, where: str, must_be: str, given: Any) -> None:
    if not holds:
        raise _WrongError(f"{where} must be {must_be}; it is {given!r}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)
