import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookup_tables.device import DeviceFingerprint
from lookup_tables.session import SessionSettings
from lookup_tables.table import Accuracy, Calibration, Entry, LookupTable, MissingEntryError, Subnet

DEVICE = DeviceFingerprint("a CPU", "x86_64", 2, "Linux 6", "3.11.7", "1.31.1")
ACCURACY = Accuracy(1.2, 97.5, 100.0, 0.99, 0.8, 24, -0.04, 0.03, 0.95)


PLAIN_SUM = Calibration(1.0, 0.0, 0.0)


def table(*medians: float, calibration: Calibration = PLAIN_SUM) -> LookupTable:
    entries = [Entry(f"k{i}", f"block {i}", us, us, us, 100) for i, us in enumerate(medians)]
    return LookupTable(
        space="small",
        date="2025-01-02T03:04:05+00:00",
        device=DEVICE,
        settings=SessionSettings(),
        protocol={"method": "isolated", "rounds": 5},
        entries={entry.key: entry for entry in entries},
        subnets=(Subnet("n0", "net", ("k0", "k0"), 30.0, 29.0, 31.0, 100, 30.2),),
        calibration=calibration,
        accuracy=ACCURACY,
    )


@given(medians=st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=4), scale=st.floats(0.1, 10))
def test_saved_table_is_loaded_unchanged(tmp_path_factory: Any, medians: list[float], scale: float) -> None:
    path = tmp_path_factory.mktemp("round") / "table.json"
    saved = table(*medians, calibration=Calibration(scale, 0.5, 3.0))
    saved.save(path)
    assert LookupTable.load(path) == saved


def test_file_is_json_with_one_entry_a_line_in_an_order_of_its_own(tmp_path: Path) -> None:
    saved = table(3.0, 2.0, 1.0)
    saved.save(tmp_path / "a.json")
    replace(saved, entries=dict(reversed(saved.entries.items()))).save(tmp_path / "b.json")
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text()
    assert sum('"median_us"' in line and "block" in line for line in text.splitlines()) == 3
    json.loads(text)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "table.json"
    table(1.0).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="disk full"):
        table(2.0).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["table.json"]


def test_prediction_is_the_calibrated_sum_and_counts_repetitions() -> None:
    read = table(10.0, 20.0, calibration=Calibration(1.1, 2.0, 5.0))
    assert read.predict_us(["k0", "k1", "k1"]) == pytest.approx(1.1 * 50 + 2 * 3 + 5)
    assert read.interval_us(100.0) == pytest.approx((96.0, 103.0))


def test_new_calibration_changes_what_is_predicted_and_nothing_else() -> None:
    old = table(10.0)
    new = old.with_calibration(Calibration(2.0, 0.0, 0.0))
    assert (old.predict_us(["k0"]), new.predict_us(["k0"])) == (10.0, 20.0)
    assert replace(new, calibration=old.calibration) == old


def test_missing_entries_are_named_with_their_count_and_the_command() -> None:
    parts = {f"k{i}": f"block {i}" for i in range(15)}
    with pytest.raises(
        MissingEntryError, match=r"13 of 15 .*block 2; .*and 3 more.*hwnas table build"
    ) as error:
        table(1.0, 2.0).require(parts)
    assert "block 11;" in str(error.value)
    assert "block 12" not in str(error.value)


def test_sum_never_takes_a_missing_entry_for_nothing() -> None:
    with pytest.raises(MissingEntryError, match="unknown"):
        table(1.0).predict_us(["k0", "unknown"])


def first_entry(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["entries"][0].update(changes)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw.update(schema="hwnas latency table, version 99"), "version 99"),
        (lambda raw: raw.pop("device"), "missing or unknown: .'device'"),
        (lambda raw: raw["device"].pop("cpu"), "device: .*lacks cpu"),
        (lambda raw: raw["settings"].update(threads=0), "settings: threads"),
        (lambda raw: raw["calibration"].update(scale=0), "scale must be above 0"),
        (lambda raw: raw["accuracy"].update(interval_low=1), "interval must be ordered"),
        (lambda raw: raw["entries"].append(raw["entries"][0]), "two entries have one key"),
        (lambda raw: raw["subnets"][0]["parts"].append("lost"), "without an entry: .'lost'"),
        (lambda raw: raw.update(entries={}), "entries must be a list"),
        (lambda raw: raw.update(protocol={}), "an object with a method"),
        (first_entry(median_us=float("nan")), "entry 1: median_us must be a finite number"),
        (first_entry(median_us=float("inf")), "finite"),
        (first_entry(median_us=-1.0), "at least 0"),
        (first_entry(median_us=0), "above 0"),
        (first_entry(median_us="12"), "finite number; it is '12'"),
        (first_entry(median_us=True), "finite number"),
        (first_entry(samples=1.5), "a count"),
        (first_entry(extra=1), "missing or unknown: .'extra'"),
    ],
)
def test_damaged_table_is_refused_with_what_is_wrong(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = tmp_path / "table.json"
    table(1.0, 2.0).save(path)
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"table.json.*{says}.*hwnas table build"):
        LookupTable.load(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not whole JSON"),
        (b"[1, 2]", "schema"),
        (b'{"a": 1}', "schema"),
        (b"\x08\x07ONNX\xff", "cannot read .*foreign"),
        (b'{"schema": 1, "schema": 2}', "stands twice"),
        (b"[" * 100_000, "not whole JSON"),
    ],
)
def test_foreign_file_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{says}"):
        LookupTable.load(path)


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table(1.0, 2.0).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or no latency table"):
            LookupTable.load(path)


def test_absent_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no latency table at .*hwnas table build"):
        LookupTable.load(tmp_path / "none.json")


def test_first_version_is_read_and_its_entries_have_the_method_of_their_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table(1.0, 2.0).save(path)
    raw = json.loads(path.read_text())
    raw["schema"] = raw["schema"].replace("version 3", "version 1")
    for entry in raw["entries"]:
        del entry["method"]
    path.write_text(json.dumps(raw))
    assert {entry.method for entry in LookupTable.load(path).entries.values()} == {raw["protocol"]["method"]}


@pytest.mark.parametrize("version", [1, 2])
def test_latencies_of_older_versions_are_their_medians(tmp_path: Path, version: int) -> None:
    path = tmp_path / "table.json"
    table(1.0, 2.0, calibration=Calibration(1.5, 0.0, 0.0)).save(path)
    raw = json.loads(path.read_text())
    raw["schema"] = raw["schema"].replace("version 3", f"version {version}")
    for measured in (*raw["entries"], *raw["subnets"]):
        measured["p10_us"] = 0.9 * measured["median_us"]
    path.write_text(json.dumps(raw))
    old = LookupTable.load(path)
    assert old.predict_us(["k0", "k1"]) == pytest.approx(4.5)
    assert all(net.p10_us == net.median_us for net in old.subnets)
    assert old.protocol["latency"] == "median"
    assert "predicts medians" in str(old.doubt())
    old.save(path)
    assert LookupTable.load(path) == old


@pytest.mark.parametrize(("within", "is_doubted"), [(100.0, False), (90.0, False), (89.9, True)])
def test_table_that_predicts_badly_says_so(within: float, is_doubted: bool) -> None:
    found = replace(table(1.0), accuracy=replace(ACCURACY, within_10_percent=within)).doubt()
    assert (found is not None) is is_doubted
    if found is not None:
        assert "only 90 % of 24 held-out networks within 10 %" in found
