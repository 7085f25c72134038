"""What a build has measured so far, on disk: one that was killed goes on from there."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from lookup_tables.device import DeviceFingerprint, fingerprint
from lookup_tables.from_measurements import Profiles
from lookup_tables.measure import Measurement
from lookup_tables.session import SessionSettings
from lookup_tables.sources import Method, Which

_SCHEMA = "hwnas table being built, version 2"


@final
class Journal:
    """What a build has measured so far, on disk line by line."""

    def __init__(self, path: Path, space: str, settings: SessionSettings, method: Method) -> None:
        self._path = path.with_name(path.name + ".building.jsonl")
        self.device = fingerprint(settings.runtime)
        self.settings = settings
        self.method: Method = method
        self.found: dict[Which, Measurement] = {}
        self.profiles: Profiles = {}
        if self._path.exists():
            self._resume(space)
        if not self._path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"device": self.device.to_json(), "settings": settings.to_json()}
            self._append({"schema": _SCHEMA, "space": space, "method": method, **facts})

    def add(self, kind: str, key: str, measured: Measurement) -> None:
        self._append({"kind": kind, "key": key, **asdict(measured)})
        self.found[kind, key] = measured

    def add_profile(self, network: str, times: Sequence[tuple[str, tuple[float, ...]]]) -> None:
        self._append({"kind": "profile", "key": network, "us": times})
        self.profiles[network] = tuple(times)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _resume(self, space: str) -> None:
        """Takes in what a build that was cut off has measured, if it was this one; drops it otherwise."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        # The last line may have been cut off in the middle of a write.
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            header, *records = map(json.loads, whole)
            reasons = self._differences(header, space)
            for record in records if not reasons else ():
                which = record.pop("kind"), record.pop("key")
                if which[0] == "profile":
                    times = tuple((key, tuple(us)) for key, us in record["us"])
                    if not all(type(n) in (int, float) and n >= 0 for _, us in times for n in us):
                        raise ValueError(f"{which} was measured as {times}")
                    self.profiles[which[1]] = times
                    continue
                measured = Measurement(**record)
                if not all(type(number) in (int, float) and number > 0 for number in record.values()):
                    raise ValueError(f"{which} was measured as {measured}")
                self.found[which] = measured
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reasons = [f"damaged: {error}"]
        if not reasons:
            if len(whole) < len(lines):
                os.truncate(self._path, sum(map(len, whole)))
            return
        self.found, self.profiles = {}, {}
        self._path.unlink()
        warnings.warn(
            f"'{self._path}', left by a build that was cut off, cannot be gone on with "
            f"({'; '.join(reasons)}): measuring starts afresh",
            stacklevel=4,
        )

    def _differences(self, header: Mapping[str, Any], space: str) -> list[str]:
        then = DeviceFingerprint.from_json(header["device"])
        here = {"schema": _SCHEMA, "space": space, "method": self.method, "settings": self.settings.to_json()}
        return then.differences(self.device) + [
            f"{what}: {header[what]} against {ours}" for what, ours in here.items() if header[what] != ours
        ]

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
