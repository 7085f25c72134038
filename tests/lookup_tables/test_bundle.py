"""A table that was measured elsewhere: bundle, stand-alone runner, results that come back."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lookup_tables import bundle, runner, sources
from lookup_tables.assembly import PartCall, Wiring
from lookup_tables.build import build_table
from lookup_tables.bundle import import_bundle, runner_script, write_bundle
from lookup_tables.device import DeviceFingerprint, fingerprint
from lookup_tables.measure import Measurement
from lookup_tables.runner import Heat, Results, hottest_celsius, item_name, manifest_text, pin
from lookup_tables.session import SessionSettings
from lookup_tables.sources import Method, Networks
from tests.lookup_tables.test_build import nets, parts
from tests.lookup_tables.test_measure import model

ITEMS = 1 + 3 + 2 * 3  # overhead, parts, networks in two turns


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting has tests of its own: here a model is a chain as long as its name's digest says."""

    def exported(modules: Any, progress: Any) -> dict[str, bytes]:
        return {key: model(1 + hashlib.sha256(key.encode()).digest()[0] % 40) for key in modules}

    monkeypatch.setattr(sources, "to_onnx", exported)


def networks() -> Networks:
    """Chains in two orders, and one that cannot be put together; ``relu`` is in none that can."""
    wirings = [
        Wiring((0,), tuple(PartCall(key, (n,), (n + 1,)) for n, key in enumerate(keys)), (len(keys),))
        for keys in (("conv", "linear"), ("linear", "conv", "conv"))
    ]
    torn = Wiring((0,), (PartCall("relu", (0, 0), (1,)),), (1,))
    return Networks((*wirings, torn), parts())


def bundled(folder: Path, **given: Any) -> Path:
    usual: dict[str, Any] = {
        "space": "tiny",
        "settings": SessionSettings(),
        "entries": parts(),
        "subnets": nets(3),
    }
    write_bundle(**{**usual, **given}, folder=folder)
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def measured(folder: Path, leave: int = 0, device: DeviceFingerprint | None = None) -> Results:
    """Results by formula, of all but the last few."""
    results = Results(folder / "results.jsonl")
    names = [item_name(item) for item in manifest_of(folder)["measure"]]
    with results.recording(manifest_of(folder), device or fingerprint(), {"clock": "wall"}):
        for n, name in enumerate(names[: len(names) - leave], start=10):
            results.add(name, Measurement(float(n), n - 1.0, n + 1.0, 56), {"celsius": None})
        for n, (key, item) in enumerate(results.unprofiled().items()):
            times = {place: (5.0 + n + place, 6.0, 7.0) for place in range(len(item["calls"]))}
            results.add_profile(key, times, {"celsius": None})
    return results


# ---- the folder


def test_manifest_names_every_file_with_its_digest_and_every_measurement(tmp_path: Path) -> None:
    manifest = manifest_of(bundled(tmp_path / "b"))
    on_disk = {str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "b" / name).read_bytes()).hexdigest() == digest
    assert len(manifest["measure"]) == ITEMS
    kinds = [item["kind"] for item in manifest["measure"]]
    assert kinds != sorted(kinds)  # mixed


def test_bundle_is_left_as_it_is_or_completed_but_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundled(tmp_path / "b")
    measured(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "export_models", lambda *_: pytest.fail("exported again"))
        bundled(folder)
    assert {path: path.read_bytes() for path in before} == before
    for other in ({"settings": SessionSettings(2)}, {"space": "other"}, {"subnets": nets(2)}, {"seed": 1}):
        with pytest.raises(ValueError, match="holds another bundle; write into another folder"):
            bundled(folder, **other)
    (folder / "results.jsonl").unlink()
    (folder / "manifest.json").unlink()  # as if it had been cut off
    bundled(folder)
    assert (folder / "manifest.json").read_bytes() == before[folder / "manifest.json"]
    with pytest.raises(ValueError, match="holds other files"):
        bundled(tmp_path)


def test_bundle_needs_networks_and_a_runtime_with_a_profiler(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one subnet"):
        bundled(tmp_path / "b", subnets=[])
    with pytest.raises(ValueError, match="profiled entries are measured in networks: give some"):
        bundled(tmp_path / "b", method="profiled")
    with pytest.raises(ValueError, match="openvino has no profiler"):
        bundled(
            tmp_path / "b",
            method="profiled",
            networks=networks(),
            settings=SessionSettings(runtime="openvino"),
        )


# ---- the script


def test_runner_needs_nothing_but_old_python_numpy_and_onnxruntime() -> None:
    tree = ast.parse(runner_script(), feature_version=(3, 8))
    imported = {
        (node.names[0].name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= sys.stdlib_module_names | {"numpy", "onnxruntime"}
    # What is evaluated at import: Python 3.8 knows neither `list[int]` nor `int | None` there.
    generic = {"list", "dict", "tuple", "type", "Callable", "Mapping", "Sequence", "Iterator"}
    for statement in tree.body:
        values = [statement.value] if isinstance(statement, ast.Assign) else []
        values += [*statement.bases] if isinstance(statement, ast.ClassDef) else []
        for node in (node for value in values for node in ast.walk(value)):
            assert not (isinstance(node, ast.Subscript) and ast.unparse(node.value) in generic)


def run(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The runner as on a device, where this project is not."""
    return subprocess.Popen(
        [sys.executable, "-I", str(folder / "measure.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
    )


def test_runner_killed_half_way_goes_on_and_its_results_make_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runner_script()
    assert script.count("_CHUNK = 24") == script.count("rounds: int = 8,\n    seed") == 1
    quick = script.replace("_CHUNK = 24", "_CHUNK = 4").replace(
        "rounds: int = 8,\n    seed", "rounds: int = 2,\n    seed"
    )
    monkeypatch.setattr(bundle, "runner_script", lambda: quick)
    folder = bundled(tmp_path / "b")
    process, results = run(folder), folder / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    done = results.read_bytes()
    whole = done[: done.rfind(b"\n") + 1]
    results.write_bytes(whole + b'{"kind": "entry", "ke')  # the power went in the middle of a line
    with pytest.raises(ValueError, match=r"\d+ of 10 measurements are missing .*measure.py.*goes on"):
        import_bundle(folder)
    out, errors = run(folder, "--json").communicate(timeout=240)
    assert errors == ""
    assert results.read_bytes().startswith(whole)
    header, *records = (json.loads(line) for line in results.read_text().splitlines())
    assert len(header["cpus"] or [0]) == 1  # as many as threads, where they can be chosen
    assert len({(r["kind"], r["key"]) for r in records}) == len(records) == ITEMS
    told = [json.loads(line) for line in out.splitlines()]
    assert (told[-1]["done"], told[-1]["total"]) == (ITEMS, ITEMS)
    assert [line["done"] for line in told] == sorted(line["done"] for line in told)
    table = import_bundle(folder)
    assert (set(table.entries), len(table.subnets), table.device) == (set(parts()), 3, fingerprint())
    assert import_bundle(results).entries == table.entries
    assert run(folder).communicate(timeout=60)[0].startswith("all is measured")


def test_runner_profiles_networks_and_goes_on_with_those_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runner_script()
    assert script.count("_NETWORKS = 24") == script.count("rounds: int = 8,\n    seed") == 1
    quick = script.replace("_NETWORKS = 24", "_NETWORKS = 1").replace(
        "rounds: int = 8,\n    seed", "rounds: int = 1,\n    seed"
    )
    monkeypatch.setattr(bundle, "runner_script", lambda: quick)
    folder = bundled(tmp_path / "b", method="profiled", networks=networks())
    manifest, results = manifest_of(folder), folder / "results.jsonl"
    process = run(folder)
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n") > 1):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    whole = b"".join(results.read_bytes().splitlines(keepends=True)[:2])
    results.write_bytes(whole + b'{"kind": "profile", "key": "')  # what followed had not reached the disk
    with pytest.raises(ValueError, match="measurements are missing"):
        import_bundle(folder)
    out, errors = run(folder, "--json").communicate(timeout=240)
    assert errors == ""
    assert results.read_bytes().startswith(whole)
    records = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    profiles = [record["key"] for record in records if record["kind"] == "profile"]
    assert profiles == [item["key"] for item in manifest["profile"]]
    assert len(profiles) == 2
    total = len(manifest["measure"]) + 2
    assert len({(r["kind"], r["key"]) for r in records}) == len(records) == total
    told = [json.loads(line) for line in out.splitlines()]
    assert (told[-1]["done"], told[-1]["total"]) == (total, total)
    assert [line["done"] for line in told] == sorted(line["done"] for line in told)
    table = import_bundle(results)
    assert table.protocol["method"] == "profiled"
    methods = {key: entry.method for key, entry in table.entries.items()}
    assert methods == {"conv": "profiled", "linear": "profiled", "relu": "isolated"}


def test_runner_says_in_a_line_what_is_wrong_with_its_folder(tmp_path: Path) -> None:
    folder = bundled(tmp_path / "b")
    next((folder / "models").iterdir()).write_bytes(b"half")
    process = run(folder)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "1 of " in errors
    assert "not what the manifest says (models/" in errors
    assert "copy the bundle again" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("facts", "runtime", "says"),
    [
        ({"onnxruntime": "1.9.0"}, "onnxruntime", r"onnxruntime is 1.9.0; the models need 1.18 .*--upgrade"),
        ({"openvino": "none"}, "openvino", "openvino is missing: .* -m pip install openvino"),
    ],
)
def test_runtime_that_cannot_measure_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], runtime: Any, says: str
) -> None:
    folder = bundled(tmp_path / "b", settings=SessionSettings(runtime=runtime))
    monkeypatch.setattr(runner, "fingerprint", lambda _: replace(fingerprint(), **facts))
    with pytest.raises(ValueError, match=says):
        runner.measure_bundle(folder, runner._arguments(["--no-pin"]))
    assert not (folder / "results.jsonl").exists()


# ---- the results


@pytest.mark.parametrize("method", ["isolated", "slope", "profiled"])
def test_import_equals_a_build_with_the_same_measurements(tmp_path: Path, method: Method) -> None:
    folder = bundled(tmp_path / "b", method=method, networks=networks())
    results = measured(folder)

    def replay(models: Any, settings: Any, *, on_result: Any, **_: Any) -> dict[str, Measurement]:
        for name in models:
            on_result(name, results.found[name])
        return results.found

    def profiles(models: Any, settings: Any, *, on_result: Any, **_: Any) -> dict[str, Any]:
        for name in models:
            on_result(name, results.profiles[name])
        return results.profiles

    here = build_table(
        parts(),
        nets(3),
        path=tmp_path / "t.json",
        space="tiny",
        settings=SessionSettings(),
        method=method,
        networks=networks(),
        measurer=replay,
        profiler=profiles,
    )
    there = import_bundle(folder)
    assert replace(there, date="", protocol={}) == replace(here, date="", protocol={})
    assert there.protocol == {**here.protocol, "clock": "wall"}  # which the header says
    methods = {key: entry.method for key, entry in there.entries.items()}
    alone = {"relu": "isolated"} if method == "profiled" else {}
    assert methods == {**dict.fromkeys(parts(), method), **alone}


def test_table_is_of_the_device_that_measured(tmp_path: Path) -> None:
    folder = bundled(tmp_path / "b")
    phone = replace(fingerprint(), cpu="Cortex-A76", cores=8)
    measured(folder, device=phone)
    assert import_bundle(folder).device == phone


@pytest.mark.parametrize("tail", [b'{"kind": "entry", "key": "conv", "medi', b"\0" * 300])
def test_line_cut_off_by_a_power_cut_is_dropped_and_written_over(tmp_path: Path, tail: bytes) -> None:
    folder = bundled(tmp_path / "b")
    measured(folder, leave=2)
    path = folder / "results.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert len(Results(path).missing()) == 2
    measured(folder)
    assert import_bundle(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"median_us": 0}, "was measured as"),
        ({"p90_us": float("nan")}, "was measured as"),
        ({"samples": True}, "was measured as"),
        ({"p10_us": "3"}, "was measured as"),
        ({"key": "another"}, "'entry another' is not in the manifest"),
    ],
)
def test_line_that_no_measurement_gives_is_refused_with_its_number(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = bundled(tmp_path / "b")
    measured(folder)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    number = next(n for n, line in enumerate(lines) if line.get("kind") == "entry")
    lines[number].update(change)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"line {number + 1} of .* is damaged: .*{says}.*delete that line"):
        import_bundle(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"us": [[0, [1.0]], [9, [1.0]]]}, "was not timed at places of its [23] parts"),
        ({"us": [[0, [1.0]], [1, [1.0, 2.0]]]}, "was not timed at places"),
        ({"us": []}, "was not timed at places"),
        ({"us": [[0, [-1.0]]]}, "was measured as"),
        ({"key": "another"}, "'profile another' is not in the manifest"),
    ],
)
def test_profile_that_nothing_gives_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = bundled(tmp_path / "b", method="profiled", networks=networks())
    measured(folder)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    lines[-1].update(change)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"line {len(lines)} of .* is damaged: .*{says}"):
        import_bundle(folder)


def test_results_of_another_bundle_or_device_are_not_mixed(tmp_path: Path) -> None:
    one, other = bundled(tmp_path / "one"), bundled(tmp_path / "other", seed=1)
    measured(one, leave=3)
    (other / "results.jsonl").write_bytes((one / "results.jsonl").read_bytes())
    with pytest.raises(ValueError, match="results of another bundle"):
        import_bundle(other)
    with pytest.raises(ValueError, match=r"something else \(another bundle\); move it away"):
        measured(other)
    with pytest.raises(ValueError, match=r"something else \(CPU: .* against Other\)"):
        measured(one, device=replace(fingerprint(), cpu="Other"))


def test_two_runners_do_not_measure_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LOCK_SECONDS", 0.0)
    folder = bundled(tmp_path / "b")
    first = Results(folder / "results.jsonl")
    with (
        first.recording(manifest_of(folder), fingerprint(), {"clock": "wall"}),
        pytest.raises(ValueError, match="another process is measuring into"),
    ):
        measured(folder)
    measured(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / "results.jsonl").unlink(),
            "nothing is measured .*run `python3 measure.py`",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "no bundle at .*hwnas table bundle"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "damaged or no manifest"),
        (lambda folder: (folder / "measure.py").write_text(""), r"1 of \d+ files .*\(measure.py\)"),
    ],
)
def test_what_is_wrong_with_a_bundle_is_said_at_import(tmp_path: Path, damage: Any, says: str) -> None:
    folder = bundled(tmp_path / "b")
    measured(folder)
    damage(folder)
    with pytest.raises(ValueError, match=says):
        import_bundle(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "hwnas table bundle, version 9"}, "its schema must be 'hwnas table bundle, version 1'"),
        ({"reference": "models/none.onnx"}, "files that a bundle does not hold: models/none.onnx"),
        ({"profile": [{"file": "models/none.onnx", "key": "a", "calls": []}]}, "does not hold: models/none"),
        ({"files": {"../../etc/passwd": "0"}}, "files that a bundle does not hold"),
        ({"settings": {"threads": 0, "optimisation": "all"}}, "threads must be a positive integer"),
    ],
)
def test_manifest_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = bundled(tmp_path / "b")
    manifest = manifest_of(folder)
    manifest.update(change)
    (folder / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(ValueError, match=says):
        runner.read_manifest(folder)


# ---- the device


def test_fastest_cpus_are_taken_one_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: taken.append(sorted(cpus)))
    for cpu in range(6):  # 0-1 small, 2-5 two large cores of two threads each
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "cpu_capacity").write_text("446\n" if cpu < 2 else "1024\n")
        core = str(cpu) if cpu < 2 else {2: "2-3", 3: "2-3", 4: "4,5", 5: "4,5"}[cpu]
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(core + "\n")
    assert [pin(threads, tmp_path) for threads in (1, 2, 3, 99)] == [
        [4],
        [2, 4],
        [1, 2, 4],
        [0, 1, 2, 3, 4, 5],
    ]
    assert taken[0] == [4]
    monkeypatch.delattr(os, "sched_setaffinity")
    assert pin(1, tmp_path) is None


def test_sensors_of_the_cpu_are_read_before_others(tmp_path: Path) -> None:
    assert hottest_celsius(tmp_path) is None
    for n, (kind, text) in enumerate(
        [
            ("battery", "91000"),
            ("cpu0-thermal", "52000"),
            ("soc", "61500"),
            ("cpu-off", "-274000"),
            ("cpu", "?"),
        ]
    ):
        (tmp_path / f"thermal_zone{n}").mkdir()
        (tmp_path / f"thermal_zone{n}" / "type").write_text(kind)
        (tmp_path / f"thermal_zone{n}" / "temp").write_text(text + "\n")
    assert hottest_celsius(tmp_path) == 61.5
    (tmp_path / "thermal_zone2" / "temp").unlink()
    assert hottest_celsius(tmp_path) == 52.0


def test_heat_is_waited_out_but_not_for_ever() -> None:
    cooling = iter([75.0, 72.0, 69.0])
    slept: list[float] = []
    said: list[str] = []
    heat = Heat(70, 60, lambda: next(cooling), slept.append, said.append)
    heat.wait()
    assert said == ["waiting for 70 °C; the CPU is at 75 °C"]
    assert (sum(slept), heat.left_seconds) == (4, 56)
    Heat(70, 60, lambda: 90.0, slept.append).wait()
    assert sum(slept) == 4 + 60
    Heat(70, 60, lambda: None, slept.append).wait()
    assert sum(slept) == 4 + 60
