"""Measures a bundle on an Android device, through ``adb`` and ONNX Runtime's own ``onnxruntime_perf_test``.

No Python is needed on the device. ``onnxruntime_perf_test`` comes out of an Android build of ONNX Runtime.
Its options and the rows of its result file are those of microsoft/onnxruntime, onnxruntime/test/perftest
(``command_args_parser.cc``, ``performance_runner.cc``). The protocol is that of `lookup_tables.measure`; but
the clock is the wall's, and each session is a process of its own.

Tested with a recorded adb only, a script that answers as adb, Android's shell and the tool do; with no phone.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lookup_tables.device import DeviceFingerprint, cpu_name
from lookup_tables.measure import SAMPLE_SECONDS, SAMPLES, WARMUPS, measure_by
from lookup_tables.progress import Progress
from lookup_tables.runner import (
    LONGEST_WAIT_SECONDS,
    MANIFEST,
    RESULTS,
    WARMEST_CELSIUS,
    Heat,
    Results,
    hottest,
    item_name,
    manifest_digest,
    read_manifest,
    to_profile,
)
from lookup_tables.session import SessionSettings

if TYPE_CHECKING:
    from lookup_tables.measure import Visit

_LEVELS = {"disabled": 0, "basic": 1, "extended": 2, "all": 99}
_TOOL = "onnxruntime_perf_test"
_FACTS = """
getprop ro.product.manufacturer; getprop ro.product.model; getprop ro.soc.model
getprop ro.build.version.release
uname -m; cat /sys/devices/system/cpu/possible; cat /proc/cpuinfo
"""
_SPEEDS = """
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
  echo ${cpu##*/cpu} $(cat $cpu/cpu_capacity || echo 0) $(cat $cpu/cpufreq/cpuinfo_max_freq || echo 0)
done 2>/dev/null
"""
_HEAT = """
for zone in /sys/class/thermal/thermal_zone*; do echo $(cat $zone/type) $(cat $zone/temp); done 2>/dev/null
"""


@final
@dataclass(frozen=True)
class AdbDevice:
    """An Android device that ``adb`` reaches.

    Attributes:
        perf_test: ``onnxruntime_perf_test`` of an Android build: a file here, which is pushed together with
            the ``libonnxruntime.so`` beside it, or a path on the device.
        serial: as ``adb devices`` lists it; None where only one is connected.
    """

    perf_test: str
    serial: str | None = None

    @property
    def profiles(self) -> bool:
        """Whether it can time parts inside networks."""
        return False

    def measure(self, folder: Path, progress: Progress) -> None:
        """Pushes a bundle's models, measures what is missing, and appends it to its ``results.jsonl``.

        Raises:
            ValueError: the folder holds no bundle; adb or the device is not there; the tool is not, or it
                cannot run a model, which is named.
        """
        manifest = read_manifest(folder)
        settings = SessionSettings.from_json(manifest["settings"])
        if settings.runtime != "onnxruntime":
            raise ValueError(f"by adb ONNX Runtime measures; the bundle is for {settings.runtime}")
        if to_profile(manifest):
            raise ValueError(
                "by adb every part is measured alone: build by method 'isolated' or 'slope'; what profiles "
                "networks needs Python on the device"
            )
        there = _folder_there(folder)
        tool = self._push(folder, manifest, there, progress)
        cpus = self._fastest(settings.threads)
        results = Results(folder / RESULTS)
        heat = Heat(WARMEST_CELSIUS, LONGEST_WAIT_SECONDS, self._celsius)
        files: dict[str | None, str] = {item_name(item): item["file"] for item in manifest["measure"]}
        files[None] = manifest["reference"]
        seconds: dict[str, float] = {}  # of a run, by file

        @contextmanager
        def visiting(names: Sequence[str]) -> Iterator[Visit]:
            heat.wait()
            yield lambda name: self._session(there, tool, files[name], settings, cpus, seconds)

        with results.recording(manifest, self._fingerprint(tool), {"clock": "wall", "cpus": cpus}):
            before, total = len(results.found), len(manifest["measure"])
            measure_by(
                visiting,
                list(results.missing()),
                seed=manifest["seed"],
                progress=lambda done, _: progress("measuring by adb", before + done, total),
                on_result=lambda name, found: results.add(name, found, {"celsius": heat.celsius()}),
            )

    def clean_up(self, folder: Path) -> None:
        """Removes the models from the device."""
        self._shell(f"rm -rf {_folder_there(folder)}")

    def _session(
        self,
        there: str,
        tool: str,
        file: str,
        settings: SessionSettings,
        cpus: Sequence[int],
        seconds: dict[str, float],
    ) -> list[float]:
        """Microseconds of a run, by sample: each the mean over as many runs as fill a millisecond."""
        repeats = max(1, round(SAMPLE_SECONDS / seconds[file])) if file in seconds else 1
        runs = WARMUPS + SAMPLES * repeats
        mask = sum(1 << cpu for cpu in cpus)
        spinning = " -D" if settings.threads > 1 else ""
        said = self._shell(
            f"cd {there} && rm -f times.csv && LD_LIBRARY_PATH=. taskset {mask:x} {tool} -e cpu -I -m times "
            f"-r {runs} -x {settings.threads} -y 1 -o {_LEVELS[settings.optimisation]}{spinning} "
            f"{file} times.csv > said.txt 2>&1; cat times.csv 2>/dev/null || cat said.txt"
        )
        # Model, seconds, memory, CPU usage and number of each run; statistics may follow.
        rows = [line.rsplit(",", 4) for line in said.splitlines() if line.count(",") >= 4]
        times = [float(row[1]) for row in rows if len(row) == 5][WARMUPS:]
        if len(times) != SAMPLES * repeats:
            heard = " ".join(said.split())[-500:] or "nothing"
            raise ValueError(
                f"{_TOOL} cannot run '{file}': it said: {heard}; is it of a recent ONNX Runtime?"
            )
        seconds[file] = statistics.median(times)
        groups = (times[first : first + repeats] for first in range(0, len(times), repeats))
        return [statistics.fmean(group) * 1e6 for group in groups]

    def _push(self, folder: Path, manifest: Mapping[str, Any], there: str, progress: Progress) -> str:
        """Makes the models and the tool ready; returns the tool's path on the device."""
        self._shell(f"mkdir -p {there}")
        digests = {name: digest for name, digest in manifest["files"].items() if name.endswith(".onnx")}
        if self._different(there, digests):
            progress("pushing models", 0, len(digests))
            self._adb("push", str(folder / "models"), there)
            if wrong := self._different(there, digests):
                raise ValueError(f"{len(wrong)} models did not arrive whole in {there}; is the device full?")
            progress("pushing models", len(digests), len(digests))
        here = Path(self.perf_test).expanduser()
        if here.is_file():
            for file in (here, here.with_name("libonnxruntime.so")):
                if file.exists():
                    self._adb("push", str(file), f"{there}/")
            self._shell(f"chmod 755 {there}/{shlex.quote(here.name)}")
            return f"{there}/{shlex.quote(here.name)}"
        tool = shlex.quote(self.perf_test)
        if "yes" not in self._shell(f"[ -x {tool} ] && echo yes; true"):
            raise ValueError(
                f"'{self.perf_test}' is neither a file here nor a program on the device; build ONNX Runtime "
                f"for Android (build.sh --android …) and name its {_TOOL} by --perf-test"
            )
        return tool

    def _different(self, there: str, digests: Mapping[str, str]) -> set[str]:
        """The files that are not on the device as they should be."""
        said = self._shell(f"cd {there} && sha256sum models/*.onnx 2>/dev/null; true")
        found = {name: digest for digest, name in map(str.split, said.splitlines())}
        return {name for name, digest in digests.items() if found.get(name) != digest}

    def _fingerprint(self, tool: str) -> DeviceFingerprint:
        maker, model, chip, release, machine, possible, *cpuinfo = self._shell(_FACTS).splitlines()
        digest = self._shell(f"sha256sum {tool}").split()[0]
        return DeviceFingerprint(
            cpu=cpu_name("\n".join(cpuinfo), f"{maker} {model}, {chip}".strip(" ,")),
            architecture=machine,
            cores=1 + int(possible.replace(",", "-").split("-")[-1]),
            system=f"Android {release}",
            python="none",
            onnxruntime=f"{_TOOL} {digest[:12]}",  # it does not tell its version
        )

    def _fastest(self, threads: int) -> list[int]:
        """As many CPUs as threads, the fastest first, of equal ones the last."""
        cpus = [tuple(map(int, line.split())) for line in self._shell(_SPEEDS).splitlines()]
        ordered = sorted(cpus, key=lambda cpu: (-cpu[1], -cpu[2], -cpu[0]))
        return sorted(cpu[0] for cpu in ordered[:threads])

    def _celsius(self) -> float | None:
        return hottest(line.rpartition(" ")[::2] for line in self._shell(_HEAT).splitlines())

    def _shell(self, script: str) -> str:
        return self._adb("shell", script)

    def _adb(self, *words: str) -> str:
        which = ["-s", self.serial] if self.serial else []
        if shutil.which("adb") is None:
            raise ValueError("there is no `adb` on this machine; install Android's platform tools")
        done = subprocess.run(["adb", *which, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-500:] or "nothing"
            raise ValueError(
                f"adb {words[0]} failed: {said}; `adb devices` must list the device as 'device' (of several, "
                "name one by --adb); the same command goes on from here"
            )
        return done.stdout


def _folder_there(folder: Path) -> str:
    digest = manifest_digest(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    return f"/data/local/tmp/hwnas-{digest[:16]}"
