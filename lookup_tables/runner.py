"""Measures a bundle on the device that it lies on, by the protocol of `lookup_tables.measure`.

Each bundle holds a copy of this file and of the four that it needs as one script, ``measure.py``
(`lookup_tables.bundle.runner_script`), which runs on Python 3.8 or newer with numpy and onnxruntime:

    python3 measure.py

Each measurement is appended to ``results.jsonl`` and forced to the disk as soon as it is made: after a stop
or a power cut the same command goes on. The process is pinned to as many CPUs as the session has threads,
the fastest ones, one a core. Before each worker it waits while the hottest CPU sensor of /sys/class/thermal
is above 70 °C, ten degrees below where a Raspberry Pi begins to throttle (raspberrypi/documentation,
hardware/raspberrypi/frequency-management.md), for ten minutes a run at most.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, final

from lookup_tables.device import DeviceFingerprint, fingerprint
from lookup_tables.measure import Measurement, Worker, in_worker, measure_by
from lookup_tables.profiled import profile
from lookup_tables.session import SessionSettings
from lookup_tables.worker import serve

if TYPE_CHECKING:
    from lookup_tables.measure import Visit
    from lookup_tables.profiled import PartTimes

BUNDLE_SCHEMA = "hwnas table bundle, version 1"
RESULTS_SCHEMA = "hwnas bundle results, version 1"
MANIFEST = "manifest.json"
RESULTS = "results.jsonl"
RUNNER = "measure.py"

_LEAST_ONNXRUNTIME = [1, 18]  # the first that reads models of ONNX IR version 10
_AGAIN = f"run `python3 {RUNNER}` on the device again: it goes on where it stopped"
WARMEST_CELSIUS = 70.0
LONGEST_WAIT_SECONDS = 600.0
_LOCK_SECONDS = 30.0  # a runner whose reader is gone ends within a round


# ---- the bundle


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it stands in its file; equal manifests are equal texts."""
    return json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(manifest_text(manifest).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, whose files have been compared with it.

    Raises:
        ValueError: there is no bundle, it is of another schema, or a file is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = checked_manifest(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"no bundle at '{folder}': {error}; write one: hwnas table bundle") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged or no manifest: {error}; copy the bundle again") from error
    wrong = [
        name
        for name, digest in manifest["files"].items()
        if not (folder / name).is_file() or _digest(folder / name) != digest
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(manifest['files'])} files in '{folder}' are missing or are not what the "
            f"manifest says ({', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}); copy the bundle again"
        )
    return manifest


def checked_manifest(manifest: Any) -> dict[str, Any]:
    """A manifest whose parts refer to each other.

    Raises:
        ValueError: they do not, or the schema is another. ``KeyError`` and ``TypeError`` where it has another
            shape.
    """
    if manifest["schema"] != BUNDLE_SCHEMA:
        raise ValueError(f"its schema must be {BUNDLE_SCHEMA!r}; it is {manifest['schema']!r}")
    items = [*manifest["measure"], *to_profile(manifest)]
    files = [manifest["reference"], *(item["file"] for item in items)]
    unlisted = [name for name in files if name not in manifest["files"]]
    outside = [name for name in manifest["files"] if Path(name).is_absolute() or ".." in Path(name).parts]
    if unlisted or outside:
        raise ValueError(f"it names files that a bundle does not hold: {(unlisted + outside)[0]}")
    SessionSettings.from_json(manifest["settings"])
    return dict(manifest)


def to_profile(manifest: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The networks whose parts are timed inside them: ``file``, ``key``, and the keys of their ``calls``."""
    networks: Sequence[Mapping[str, Any]] = manifest.get("profile", [])
    if not all(isinstance(item["calls"], list) for item in networks):
        raise ValueError("a network to profile must list its calls")
    return networks


def item_name(item: Mapping[str, Any]) -> str:
    """What a measurement is called in messages; it is made of a kind and a key."""
    return f"{item['kind']} {item['key']}"


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


@final
class _Files(Mapping):  # type: ignore[type-arg]  # Python 3.8 has no Mapping[str, bytes] to inherit from
    """Models of a bundle, each read when it is asked for: a small device holds few of them at once."""

    def __init__(self, folder: Path, items: Mapping[str, Mapping[str, Any]]) -> None:
        self._paths: dict[str, Path] = {name: folder / item["file"] for name, item in items.items()}

    def __getitem__(self, name: str) -> bytes:
        return self._paths[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


# ---- the results


@final
class Results:
    """What has been measured of a bundle, on disk line by line; the first line says of what and where.

    Args:
        path: of the file.

    Raises:
        ValueError: the file cannot be read as results; the line is named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.found: dict[str, Measurement] = {}
        self.profiles: dict[str, PartTimes] = {}  # of networks, by key
        self._items: dict[str, Mapping[str, Any]] = {}  # the manifest's, by name
        self._networks: dict[str, Mapping[str, Any]] = {}  # those that are profiled, by key
        self._file: IO[bytes] | None = None
        self._read()

    def _read(self) -> int:
        """Takes in what is in the file, and says how many bytes of it are whole lines."""
        content = self.path.read_bytes() if self.path.exists() else b""
        # The last line may have been cut off in the middle of a write, or hold zeros after a power cut.
        whole = content.rfind(b"\n") + 1
        self.header = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"line {number} of '{self.path}' is damaged: {error}; delete that line (the whole "
                    f"file, if it is the first) and {_AGAIN}"
                ) from error
        return whole

    def _take(self, record: dict[str, Any]) -> None:
        if not self.header:
            if record["schema"] != RESULTS_SCHEMA:
                raise ValueError(f"its schema must be {RESULTS_SCHEMA!r}; it is {record['schema']!r}")
            checked_manifest(record["manifest"])
            DeviceFingerprint.from_json(record["device"])
            self._begin(record)
            return
        if record["kind"] == "profile":
            self._take_profile(record)
            return
        numbers = {name: record[name] for name in ("median_us", "p10_us", "p90_us", "samples")}
        measured = Measurement(**numbers)
        if not all(type(n) in (int, float) and math.isfinite(n) and n > 0 for n in numbers.values()):
            raise ValueError(f"'{item_name(record)}' was measured as {measured}")
        if item_name(record) not in self._items:
            raise ValueError(f"'{item_name(record)}' is not in the manifest")
        self.found.setdefault(item_name(record), measured)

    def _take_profile(self, record: Mapping[str, Any]) -> None:
        if record["key"] not in self._networks:
            raise ValueError(f"'{item_name(record)}' is not in the manifest")
        calls = len(self._networks[record["key"]]["calls"])
        times = {place: tuple(us) for place, us in record["us"]}
        fits = all(type(place) is int and 0 <= place < calls for place in times)
        sessions = {len(us) for us in times.values()}
        if not fits or len(sessions) != 1 or 0 in sessions:
            raise ValueError(f"'{item_name(record)}' was not timed at places of its {calls} parts")
        if not all(
            type(n) in (int, float) and math.isfinite(n) and n >= 0 for us in times.values() for n in us
        ):
            raise ValueError(f"'{item_name(record)}' was measured as {times}")
        self.profiles.setdefault(record["key"], times)

    def _begin(self, header: dict[str, Any]) -> None:
        self.header = header
        self._items = {item_name(item): item for item in header["manifest"]["measure"]}
        self._networks = {item["key"]: item for item in to_profile(header["manifest"])}

    @property
    def total(self) -> int:
        """How many measurements and profiles there will be."""
        return len(self._items) + len(self._networks)

    @property
    def done(self) -> int:
        return len(self.found) + len(self.profiles)

    def missing(self) -> dict[str, Mapping[str, Any]]:
        """What is still to be measured, in its order, by name."""
        return {name: item for name, item in self._items.items() if name not in self.found}

    def unprofiled(self) -> dict[str, Mapping[str, Any]]:
        """The networks that are still to be profiled, by key."""
        return {key: item for key, item in self._networks.items() if key not in self.profiles}

    @contextmanager
    def recording(
        self, manifest: Mapping[str, Any], device: DeviceFingerprint, facts: Mapping[str, Any]
    ) -> Iterator[None]:
        """Opens the file for `add`, which nobody else then does.

        Args:
            manifest: of the bundle.
            device: on which is measured.
            facts: ``clock``, ``cpus``: how it is measured, for the header.

        Raises:
            ValueError: another runner is at it, or the file is of another bundle or device.
        """
        with self.path.open("ab") as self._file:
            _lock(self._file, self.path)
            whole = self._read()  # again: somebody may have written until now
            if self.header:
                differences = DeviceFingerprint.from_json(self.header["device"]).differences(device)
                if self.header["manifest"] != manifest:
                    differences.insert(0, "another bundle")
                if differences:
                    raise ValueError(
                        f"'{self.path}' holds results of something else ({'; '.join(differences)}); move it "
                        "away to start afresh"
                    )
            self._file.truncate(whole)
            if not self.header:
                header = {
                    "schema": RESULTS_SCHEMA,
                    "manifest": dict(manifest),
                    "device": device.to_json(),
                    "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                }
                header.update(facts)
                self._begin(header)
                self._append(header)
            yield

    def add(self, name: str, measured: Measurement, facts: Mapping[str, Any]) -> None:
        """Appends one measurement."""
        record = {part: self._items[name][part] for part in ("kind", "key")}
        record.update(asdict(measured))
        record.update(facts)
        self._append(record)
        self.found[name] = measured

    def add_profile(self, key: str, times: PartTimes, facts: Mapping[str, Any]) -> None:
        """Appends the times of one network's parts."""
        self._append({"kind": "profile", "key": key, "us": sorted(times.items()), **facts})
        self.profiles[key] = times

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, "only while recording"
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _lock(file: IO[bytes], path: Path) -> None:
    """Waits until no other process writes into the file, where the system can tell."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise ValueError(f"another process is measuring into '{path}'; wait until it ends") from None
            time.sleep(0.2)


# ---- the device


def pin(threads: int, cpus: Path = Path("/sys/devices/system/cpu")) -> list[int] | None:
    """Keeps this process and its children on as many CPUs as there are threads; None where it cannot.

    The fastest ones are taken (of a phone's or a board's unequal cores), one a core before two of one, the
    last before the first, which usually serves interrupts.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))

    def order(cpu: int) -> tuple[int, int, int, int]:
        folder = cpus / f"cpu{cpu}"
        siblings = _text(folder / "topology" / "thread_siblings_list").replace("-", ",").split(",")
        capacity, frequency = _text(folder / "cpu_capacity"), _text(folder / "cpufreq" / "cpuinfo_max_freq")
        place = siblings.index(str(cpu)) if str(cpu) in siblings else 0
        return place, -int(capacity or 0), -int(frequency or 0), -cpu

    taken = sorted(sorted(allowed, key=order)[:threads])
    os.sched_setaffinity(0, taken)
    return taken


def hottest_celsius(zones: Path = Path("/sys/class/thermal")) -> float | None:
    """What `hottest` says of this machine's sensors."""
    return hottest((_text(zone / "type"), _text(zone / "temp")) for zone in zones.glob("thermal_zone*"))


def hottest(sensors: Iterable[tuple[str, str]]) -> float | None:
    """The hottest of the CPU's sensors, or of all where none is named so; None where none can be read.

    Args:
        sensors: type and thousandths of a degree, as the kernel writes them.
    """
    found = []
    for kind, text in sensors:
        celsius = int(text) / 1000 if text.isdigit() else 0.0
        if 0 < celsius < 150:  # sensors that are switched off say impossible things
            found.append((any(word in kind.lower() for word in ("cpu", "soc", "pkg", "core")), celsius))
    return max(found)[1] if found else None


def _text(path: Path) -> str:
    """The content of a small file of the system; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@final
class Heat:
    """Waits while the device is hot, for so many seconds in all."""

    def __init__(
        self,
        warmest_celsius: float,
        longest_seconds: float,
        celsius: Callable[[], float | None] = hottest_celsius,
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._warmest = warmest_celsius
        self.left_seconds = longest_seconds
        self.celsius = celsius
        self._sleep = sleep
        self._say = say

    def wait(self) -> None:
        waited = self.left_seconds
        while self.left_seconds > 0 and (now := self.celsius() or 0.0) > self._warmest:
            if self.left_seconds == waited:
                self._say(f"waiting for {self._warmest:.0f} °C; the CPU is at {now:.0f} °C")
            self._sleep(2.0)
            self.left_seconds -= 2.0


# ---- the command


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the models of this folder; run again, it goes on.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="progress as lines of JSON")
    parser.add_argument("--no-pin", action="store_true", help="leave the CPU to the operating system")
    parser.add_argument(
        "--max-celsius", type=float, default=WARMEST_CELSIUS, help="wait while it is hotter (%(default)s)"
    )
    parser.add_argument(
        "--max-wait", type=float, default=LONGEST_WAIT_SECONDS, help="seconds in all (%(default)s)"
    )
    return parser.parse_args(arguments)


def _progress(results: Results, as_json: bool) -> Callable[[int, int], None]:
    """Tells how much is done of the whole bundle, and how long the rest of this step will take."""
    before, total = results.done, results.total
    started, said, most = time.monotonic(), -math.inf, 0

    def tell(done: int, of: int) -> None:
        nonlocal said, most
        now = time.monotonic()
        done = most = max(most, done)  # rounds that are dropped take some of it back
        left = round((now - started) / done * (of - done)) if done else None
        if as_json:
            print(json.dumps({"done": before + done, "total": total, "seconds_left": left}), flush=True)
        elif done == of or now - said > 5:
            said = now
            rest = "" if left is None else f", about {left // 60} min {left % 60:02d} s left"
            print(f"measured {before + done} of {total}{rest}", flush=True)

    return tell


def _check_runtime(device: DeviceFingerprint, runtime: str) -> None:
    old = [int(part) for part in device.onnxruntime.split(".")[:2]] < _LEAST_ONNXRUNTIME
    if runtime == "onnxruntime" and old:
        raise ValueError(
            f"onnxruntime is {device.onnxruntime}; the models need 1.18 or newer: {sys.executable} -m pip "
            "install --upgrade onnxruntime"
        )
    if runtime == "openvino" and device.openvino == "none":
        raise ValueError(f"openvino is missing: {sys.executable} -m pip install openvino")


def measure_bundle(folder: Path, arguments: argparse.Namespace) -> None:
    """Measures what is missing."""
    manifest = read_manifest(folder)
    settings = SessionSettings.from_json(manifest["settings"])
    device = fingerprint(settings.runtime)
    _check_runtime(device, settings.runtime)
    cpus = None if arguments.no_pin else pin(settings.threads)
    results = Results(folder / RESULTS)
    heat = Heat(arguments.max_celsius, arguments.max_wait, say=lambda line: print(line, flush=True))
    reference, seed = (folder / manifest["reference"]).read_bytes(), manifest["seed"]
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]

    @contextmanager
    def opening() -> Iterator[Worker]:
        heat.wait()
        with Worker(settings, seed, command) as worker:
            yield worker

    with results.recording(manifest, device, {"clock": settings.clock, "cpus": cpus}):
        profile(
            _Files(folder, results.unprofiled()),
            settings,
            seed=seed,
            progress=_progress(results, arguments.json),
            on_result=lambda key, times: results.add_profile(key, times, {"celsius": heat.celsius()}),
            opening=opening,
        )
        files = _Files(folder, results.missing())

        @contextmanager
        def visiting(names: Sequence[str]) -> Iterator[Visit]:
            heat.wait()
            with in_worker(names, files, reference, settings, seed, command) as visit:
                yield visit

        measure_by(
            visiting,
            list(files),
            seed=seed,
            progress=_progress(results, arguments.json),
            on_result=lambda name, measured: results.add(name, measured, {"celsius": heat.celsius()}),
        )
    if not arguments.json:
        print(f"all is measured; take this folder, or {RESULTS}, to: hwnas table import")


def main() -> None:
    arguments = _arguments(sys.argv[1:])
    if arguments.worker:
        serve()
        return
    try:
        measure_bundle(Path(__file__).resolve().parent, arguments)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except BrokenPipeError:  # who read the progress is gone
        os._exit(1)  # a normal exit would try to write what is left
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
