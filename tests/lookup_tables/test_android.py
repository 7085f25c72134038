"""An Android device as it is recorded: a script in adb's place answers as adb, the shell and the tool do."""

import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lookup_tables import AdbDevice, SessionSettings, android, import_bundle
from lookup_tables.measure import measure_by
from tests.lookup_tables.test_bundle import bundled, networks, small_models  # noqa: F401  # a fixture

ROUNDS = 2

# Its shell is this machine's, with the device's folders below ROOT and the device's properties.
ADB = r"""#!/bin/sh
ROOT="@ROOT@"
echo "$*" | head -1 >> "$ROOT/calls"
if [ "$1" = -s ]; then
  [ "$2" = 0A1B2C ] || { echo "adb: device '$2' not found" >&2; exit 1; }
  shift 2
fi
here() { printf '%s' "$1" | sed -e "s#/data/local#$ROOT/data/local#g" -e "s#/sys/#$ROOT/sys/#g" \
  -e "s#/proc/cpuinfo#$ROOT/cpuinfo#g"; }
case "$1" in
  push) cp -r "$2" "$(here "$3")" ;;
  shell)
    getprop() { case "$1" in *manufacturer) echo Google ;; *product.model) echo "Pixel 8" ;;
      *soc.model) echo "Tensor G3" ;; *release) echo 15 ;; esac; }
    uname() { echo aarch64; }
    taskset() { echo "taskset $1" >> "$ROOT/calls"; shift; "$@"; }
    eval "$(here "$2")" ;;
esac
"""
# Rows and statistics as performance_runner.cc writes them; a model takes a microsecond for each of its bytes.
PERF_TEST = r"""#!/bin/sh
echo "perf_test $*" >> "@ROOT@/calls"
[ -z "$FAILS" ] || { echo "Load model from $FAILS failed:Unsupported model IR version: 10"; exit 255; }
while [ "$1" != -r ]; do shift; done
runs=$2
while [ $# -gt 2 ]; do shift; done
awk -v n="$runs" -v us="$(wc -c < "$1")" 'BEGIN {
  for (i = 0; i < n; i++) printf "models,%g,98123776,99,%d\n", (i < 4 ? 9 : 1) * us / 1e6, i }' >> "$2"
printf '\nMin Latency: 0.0001 s\nP50 Latency: 0.0002 s\n' >> "$2"
printf 'Setting intra_op_num_threads to 1\nSession creation time cost: 0.0102016 s\n'
printf 'Total inference requests: %d\n' "$runs"
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is the device, with an adb on the path that reaches it."""
    root = tmp_path / "phone"
    (root / "data/local/tmp").mkdir(parents=True)
    (root / "cpuinfo").write_text("processor\t: 0\nCPU part\t: 0xd80\nprocessor\t: 8\nCPU part\t: 0xd81\n")
    for cpu, capacity in enumerate([182, 182, 182, 182, 596, 596, 596, 596, 1024]):
        (root / f"sys/devices/system/cpu/cpu{cpu}").mkdir(parents=True)
        (root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity").write_text(f"{capacity}\n")
    (root / "sys/devices/system/cpu/possible").write_text("0-8\n")
    for zone, (kind, temperature) in enumerate([("battery", 81000), ("BIG", 40000), ("cpu-0", 43500)]):
        (root / f"sys/class/thermal/thermal_zone{zone}").mkdir(parents=True)
        (root / f"sys/class/thermal/thermal_zone{zone}/type").write_text(f"{kind}\n")
        (root / f"sys/class/thermal/thermal_zone{zone}/temp").write_text(f"{temperature}\n")
    (tmp_path / "bin").mkdir()
    for name, script in (("bin/adb", ADB), ("onnxruntime_perf_test", PERF_TEST)):
        (tmp_path / name).write_text(script.replace("@ROOT@", str(root)))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(android, "measure_by", partial(measure_by, rounds=ROUNDS))
    return root


def calls(phone: Path) -> list[str]:
    return (phone / "calls").read_text().splitlines()


def silent(what: str, done: int, total: int) -> None: ...


def test_phone_gives_a_table_by_adb(phone: Path, tmp_path: Path) -> None:
    folder = bundled(tmp_path / "b")
    told: list[tuple[str, int, int]] = []
    AdbDevice(str(tmp_path / "onnxruntime_perf_test")).measure(folder, lambda *step: told.append(step))
    table = import_bundle(folder)
    items = json.loads((folder / "manifest.json").read_text())["measure"]
    us = {(item["kind"], item["key"]): (folder / item["file"]).stat().st_size for item in items}
    assert table.protocol["overhead_us"] == pytest.approx(us["overhead", "empty model"], rel=1e-4)
    for net in table.subnets:
        assert net.p10_us == pytest.approx(us["subnet 1", net.key], rel=1e-4)  # the warm-ups are left out
    assert table.protocol["clock"] == "wall"
    assert table.device.cpu == "Google Pixel 8, Tensor G3 (part 0xd80, part 0xd81)"
    assert (table.device.architecture, table.device.cores, table.device.system) == (
        "aarch64",
        9,
        "Android 15",
    )
    assert told[-1][1:] == (len(items), len(items))
    assert json.loads((folder / "results.jsonl").read_text().splitlines()[-1])["celsius"] == 43.5


def test_tool_gets_the_settings_and_the_fastest_cpus(phone: Path, tmp_path: Path) -> None:
    folder = bundled(tmp_path / "b", settings=SessionSettings(threads=2, optimisation="extended"))
    AdbDevice(str(tmp_path / "onnxruntime_perf_test"), "0A1B2C").measure(folder, silent)
    assert {line for line in calls(phone) if line.startswith("taskset")} == {"taskset 180"}  # CPUs 7 and 8
    runs = [line for line in calls(phone) if line.startswith("perf_test")]
    assert all("-e cpu -I -m times -r" in line and "-x 2 -y 1 -o 2 -D models/" in line for line in runs)
    first, later = (int(line.split("-r ")[1].split()[0]) for line in (runs[0], runs[-1]))
    assert first == 4 + 7  # warm-ups and samples of one run, until it is known how many make a millisecond
    assert later > first
    assert all(line.startswith("-s 0A1B2C ") for line in calls(phone) if "shell" in line or "push" in line)


def test_measuring_by_adb_goes_on_where_it_was_and_pushes_once(phone: Path, tmp_path: Path) -> None:
    folder, device = bundled(tmp_path / "b"), AdbDevice(str(tmp_path / "onnxruntime_perf_test"))
    device.measure(folder, silent)
    results = folder / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # the cable was pulled
    before = len(calls(phone))
    device.measure(folder, silent)
    assert results.read_bytes().startswith(b"".join(lines[:4]))
    assert len(results.read_bytes().splitlines()) == len(lines)
    again = calls(phone)[before:]
    assert not any("push" in line and "models" in line for line in again)
    manifest = json.loads((folder / "manifest.json").read_text())
    left = {item["file"] for item in manifest["measure"][3:]} | {manifest["reference"]}
    runs = [line.split()[-2] for line in again if line.startswith("perf_test")]
    assert set(runs) == left
    assert len(runs) == ROUNDS * (len(manifest["measure"]) - 3 + 2)  # with two looks at the reference
    device.clean_up(folder)
    assert list((phone / "data/local/tmp").iterdir()) == []


def test_model_that_was_damaged_on_the_device_is_pushed_again(phone: Path, tmp_path: Path) -> None:
    folder, device = bundled(tmp_path / "b"), AdbDevice(str(tmp_path / "onnxruntime_perf_test"))
    device.measure(folder, silent)
    next((phone / "data/local/tmp").glob("*/models/*")).write_bytes(b"half")
    (folder / "results.jsonl").unlink()
    device.measure(folder, silent)
    assert sum("push" in line and "models" in line for line in calls(phone)) == 2
    assert import_bundle(folder)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        (AdbDevice("perf", "other"), "adb shell failed: .*device 'other' not found; `adb devices` must list"),
        (AdbDevice("/data/local/tmp/none"), "'/data/local/tmp/none' is neither a file here nor a program on"),
    ],
)
def test_what_is_not_there_is_named(phone: Path, tmp_path: Path, device: AdbDevice, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        device.measure(bundled(tmp_path / "b"), silent)


def test_model_that_the_tool_cannot_run_is_named_with_what_it_said(
    phone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "x.onnx")
    tool = phone / "data/local/tmp/tool"
    tool.write_bytes((tmp_path / "onnxruntime_perf_test").read_bytes())
    tool.chmod(0o755)
    with pytest.raises(
        ValueError, match=r"cannot run 'models/.*onnx': it said: Load model from x.onnx failed"
    ):
        AdbDevice("/data/local/tmp/tool").measure(bundled(tmp_path / "b"), silent)


def test_networks_are_not_profiled_by_adb(phone: Path, tmp_path: Path) -> None:
    folder = bundled(tmp_path / "b", method="profiled", networks=networks())
    with pytest.raises(ValueError, match="by method 'isolated' or 'slope'"):
        AdbDevice("perf").measure(folder, silent)


def test_absent_adb_is_told(phone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no `adb` on this machine; install Android's platform tools"):
        AdbDevice("perf").measure(bundled(tmp_path / "b"), silent)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adb", "auto"], "name it by --perf-test"),
        (["--adb", "auto", "--remote", "pi"], "a table is of one device: give --remote or --adb"),
    ],
)
def test_command_says_what_adb_needs(options: list[str], says: str) -> None:
    from hwnas.cli import app

    result = CliRunner().invoke(app, ["table", "build", *options])
    assert result.exit_code == 2
    assert says in result.output.replace("\n", " ")
