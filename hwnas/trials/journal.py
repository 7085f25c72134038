"""The finished trials of a search on disk, line by line, so that a search that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from hwnas.space import ModelSpace
from hwnas.trials.results import Trial
from profilers.cost import Cost
from profilers.penalty import RangeProfilerFilter

_SCHEMA = "hwnas trials, version 1"


@final
class Journal:
    """One JSON line that says which search it is, then one for each finished trial.

    A line is written, flushed and forced to disk when its trial finishes. A last line that was cut off in the
    middle of a write is dropped.

    Args:
        path: of the file; made, with its folders, where there is none.
        search: plain data that must be the same for the search to go on.

    Attributes:
        trials: those of an earlier run, in the order in which they finished.

    Raises:
        ValueError: the file belongs to another search, or is no journal, or the path is a folder.
    """

    def __init__(self, path: str | Path, search: Mapping[str, Any]) -> None:
        self._path = Path(path)
        if self._path.is_dir():
            raise ValueError(
                f"a journal is a file; '{path}' is a folder: name a file in it, such as "
                f"'{self._path / 'trials.jsonl'}'"
            )
        self.trials: list[Trial] = []
        header = {"schema": _SCHEMA, **search}
        if not self._resume(json.loads(json.dumps(header))):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append(header)

    def add(self, trial: Trial) -> None:
        self._append(trial.to_json())

    def _resume(self, header: Mapping[str, Any]) -> bool:
        """Takes in what is there; False: there is nothing, or not even the first line is whole."""
        if not self._path.exists():
            return False
        lines = self._path.read_bytes().splitlines(keepends=True)
        if not lines:
            return False
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            records = [json.loads(line) for line in whole]
            is_journal = records[0].keys() >= {"schema"} if records else _line(header).startswith(lines[0])
            if not is_journal:
                raise ValueError("it does not begin like one")
            trials = [Trial.from_json(record) for record in records[1:]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{self._path}' is no journal of trials, or is damaged ({error!r}); name another file"
            ) from error
        if whole:
            self._check(records[0], header)
        self.trials = trials
        if len(whole) < len(lines):
            os.truncate(self._path, sum(map(len, whole)))
        return bool(whole)

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        keys = dict.fromkeys([*header, *found])
        differences = [
            f"{key}: {_short(found.get(key))} there, {_short(header.get(key))} here"
            for key in keys
            if found.get(key) != header.get(key)
        ]
        if differences:
            raise ValueError(
                f"'{self._path}' is the journal of another search ({'; '.join(differences)}); go on with "
                "that search's settings, or name another file"
            )

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def described_space(space: ModelSpace) -> dict[str, Any]:
    """What tells a space from another: its choices with their options, and how many networks there are."""
    return {"options": dict(space.options), "size": space.size}


def described_filters(filters: Sequence[RangeProfilerFilter]) -> list[dict[str, Any]]:
    """What tells ranges from others; costs enter by a digest of their tables."""
    return [
        # JSON has no infinity.
        {"min": str(found.min), "max": str(found.max), "cost": digest_of(found.profiler.cost)}
        for found in filters
    ]


def digest_of(cost: Cost) -> str:
    """A cost's unit with a digest of its numbers."""
    digest = hashlib.sha256(repr(cost.constant).encode())
    for table in cost.tables:
        digest.update(repr(table.labels).encode() + table.values.tobytes())
    for follows in cost.implied:
        digest.update(repr((follows.label, follows.parents)).encode() + follows.numbers.tobytes())
    return f"{cost.unit} {digest.hexdigest()[:16]}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
