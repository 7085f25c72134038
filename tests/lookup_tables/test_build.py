import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lookup_tables import journal, sources
from lookup_tables.build import build_table
from lookup_tables.device import fingerprint
from lookup_tables.graph import executed_graph
from lookup_tables.measure import Measurement
from lookup_tables.session import SessionSettings
from lookup_tables.sources import EntrySource, SubnetSource
from lookup_tables.table import LookupTable

COST = {"conv": 40.0, "linear": 20.0, "relu": 8.0}
OVERHEAD = 6.0


def parts() -> dict[str, EntrySource]:
    image = torch.empty(1, 3, 8, 8, device="meta")
    with torch.device("meta"):
        made = {"conv": nn.Conv2d(3, 3, 3, padding=1), "linear": nn.Linear(8, 8), "relu": nn.ReLU()}
    return {key: EntrySource(f"the {key}", module.eval(), (image,)) for key, module in made.items()}


def nets(count: int = 8) -> list[SubnetSource]:
    known = parts()
    made = []
    for n in range(count):
        keys = ("conv", *["linear"] * (n % 4), *["relu"] * (n // 4), "conv")
        network = nn.Sequential(*(known[key].module for key in keys)).eval()
        made.append(SubnetSource(f"net {n}", network, known["conv"].inputs, keys))
    return made


class Killed(BaseException):
    """As a signal would, it passes every ``except Exception``."""


@dataclass
class Machine:
    """Measures by formula; remembers what it measured; is killed before the ``dies_at``-th."""

    dies_at: int | None = None
    bias: float = 1.0
    measured: list[str] = field(default_factory=list)

    def __call__(
        self,
        models: Mapping[str, bytes],
        settings: SessionSettings,
        *,
        reference: bytes | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_result: Callable[[str, Measurement], None] | None = None,
    ) -> dict[str, Measurement]:
        assert reference is not None
        found = {}
        for name, model in models.items():
            if len(self.measured) == self.dies_at:
                raise Killed
            self.measured.append(name)
            us = self.bias * (OVERHEAD + sum(COST[key] for key in model.decode().split()))
            found[name] = Measurement(us * 1.1, us, us * 1.2, 24)
            if on_result is not None:
                on_result(name, found[name])
            if progress is not None:
                progress(len(found), len(models))
        return found


@pytest.fixture(autouse=True)
def named_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is the names of what it executes: exporting has tests of its own."""
    kinds = {nn.Conv2d: "conv", nn.Linear: "linear", nn.ReLU: "relu"}

    def names(module: nn.Module) -> bytes:
        if isinstance(module, nn.Sequential):
            return b" ".join(map(names, module))
        return kinds[type(module)].encode()

    monkeypatch.setattr(
        sources,
        "to_onnx",
        lambda modules, progress: {key: names(module) for key, (module, _) in modules.items()},
    )
    monkeypatch.setattr(sources, "_empty_model", lambda: b"")


def built(path: Path, machine: Machine, **given: Any) -> LookupTable:
    usual: dict[str, Any] = {
        "entries": parts(),
        "subnets": nets(),
        "space": "tiny",
        "settings": SessionSettings(),
    }
    return build_table(**{**usual, **given}, path=path, measurer=machine)


def without_date(table: LookupTable) -> LookupTable:
    return replace(table, date="")


def test_table_predicts_networks_exactly_where_costs_add_up(tmp_path: Path) -> None:
    table = built(tmp_path / "table.json", Machine())
    assert {key: entry.p10_us for key, entry in table.entries.items()} == pytest.approx(COST)
    assert table.accuracy.mape_percent < 0.01
    assert table.predict_us(["conv", "relu"]) == pytest.approx(OVERHEAD + 48, rel=1e-4)
    assert LookupTable.load(tmp_path / "table.json") == table
    assert os.listdir(tmp_path) == ["table.json"]


def test_every_network_is_measured_twice_mixed_with_the_parts(tmp_path: Path) -> None:
    machine = Machine()
    built(tmp_path / "table.json", machine)
    kinds = [name.rsplit(" ", 1)[0] for name in machine.measured]
    assert Counter(kinds) == {"overhead empty": 1, "entry": 3, "subnet 1": 8, "subnet 2": 8}
    where = {kind: [n for n, other in enumerate(kinds) if other == kind] for kind in set(kinds)}
    assert max(where["entry"]) > 7
    assert max(min(places) for places in where.values()) < 15


@pytest.mark.parametrize("dies_at", range(0, 20, 3))
def test_killed_build_goes_on_and_measures_nothing_twice(tmp_path: Path, dies_at: int) -> None:
    path = tmp_path / "table.json"
    machine = Machine(dies_at)
    with pytest.raises(Killed):
        built(path, machine)
    assert not path.exists()
    machine.dies_at = None
    resumed = built(path, machine)
    assert max(Counter(machine.measured).values()) == 1
    assert without_date(resumed) == without_date(built(tmp_path / "other.json", Machine()))
    assert not list(tmp_path.glob("*.jsonl"))


def cut_off(path: Path, dies_at: int = 9) -> Path:
    with pytest.raises(Killed):
        built(path, Machine(dies_at))
    return path.with_name(path.name + ".building.jsonl")


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_line_that_was_cut_off_in_the_middle_is_measured_again(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "table.json"
    left = cut_off(path)
    left.write_bytes(left.read_bytes()[:-lost])
    machine = Machine(dies_at=1)
    with pytest.raises(Killed):  # killed once more, on the repaired file
        built(path, machine)
    machine.dies_at = None
    built(path, machine)
    assert len(machine.measured) == 20 - 8
    assert max(Counter(machine.measured).values()) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"settings": SessionSettings(optimisation="extended")}, "settings: .*'all'.* against .*'extended'"),
        ({"space": "another"}, "space: tiny against another"),
    ],
)
def test_build_of_something_else_is_dropped_with_a_reason(
    tmp_path: Path, given: dict[str, Any], says: str
) -> None:
    cut_off(tmp_path / "table.json")
    machine = Machine()
    with pytest.warns(UserWarning, match=f"{says}.*starts afresh"):
        built(tmp_path / "table.json", machine, **given)
    assert len(machine.measured) == 20


def test_build_of_another_device_is_dropped_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(tmp_path / "table.json")
    monkeypatch.setattr(
        journal, "fingerprint", lambda runtime: replace(fingerprint(runtime), cpu="another CPU")
    )
    with pytest.warns(UserWarning, match=r"CPU: .* against another CPU.*starts afresh"):
        built(tmp_path / "table.json", Machine())


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b"\xff\xfe\n", b"null\nnull\n"])
def test_damaged_journal_is_dropped_with_a_reason(tmp_path: Path, content: bytes) -> None:
    cut_off(tmp_path / "table.json").write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        built(tmp_path / "table.json", Machine())


@pytest.mark.parametrize("change", [{"median_us": "12"}, {"median_us": -1}, {"median_us": float("nan")}])
def test_impossible_number_in_a_journal_is_not_believed(tmp_path: Path, change: dict[str, Any]) -> None:
    left = cut_off(tmp_path / "table.json")
    lines = [json.loads(line) for line in left.read_text().splitlines()]
    lines[3].update(change)
    left.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="damaged"):
        built(tmp_path / "table.json", Machine())


def test_finished_table_is_completed_by_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    some = {key: source for key, source in parts().items() if key != "relu"}
    first = built(path, Machine(), entries=some, subnets=nets(4))
    machine = Machine()
    both = built(path, machine)
    assert sum(name.startswith("entry") for name in machine.measured) == 1
    assert len(machine.measured) == 1 + 2 * 4
    assert both.entries.items() > first.entries.items()
    assert {net.name for net in both.subnets} == {f"net {n}" for n in range(8)}


def test_what_a_finished_table_has_beyond_the_request_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    whole = built(path, Machine())
    machine = Machine()
    again = built(path, machine, entries={"conv": parts()["conv"]}, subnets=nets(1))
    assert machine.measured == []
    assert without_date(again) == without_date(whole)


def test_table_that_was_measured_otherwise_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    built(path, Machine())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"measured otherwise \(settings: .*into another file"):
        built(path, Machine(), settings=SessionSettings(threads=2))
    with pytest.raises(ValueError, match=r"measured otherwise \(space: tiny against other"):
        built(path, Machine(), space="other")
    path.write_bytes(before.replace(b"version 3", b"version 2"))
    with pytest.raises(ValueError, match=r"measured otherwise \(latency: median against p10\)"):
        built(path, Machine())
    path.write_bytes(before[:-100])
    with pytest.raises(ValueError, match="damaged"):
        built(path, Machine())
    assert path.read_bytes() == before[:-100]


def test_table_needs_networks_made_of_its_entries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one subnet"):
        built(tmp_path / "table.json", Machine(), subnets=[])
    with pytest.raises(ValueError, match="'net 0' executes what is not among the entries: conv"):
        built(tmp_path / "table.json", Machine(), entries={"relu": parts()["relu"]})


def test_part_as_cheap_as_an_empty_session_still_costs_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COST, "relu", -1.0)
    path = tmp_path / "table.json"
    assert built(path, Machine()).entries["relu"].p10_us > 0
    LookupTable.load(path)


def test_progress_names_what_is_done_and_reaches_the_total(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    built(tmp_path / "table.json", Machine(), progress=lambda *step: told.append(step))
    assert told[-1] == ("measuring", 20, 20)


# ---- without stand-ins

REAL = """
import sys, torch
from pathlib import Path
from torch import nn
from lookup_tables import EntrySource, SessionSettings, SubnetSource, build_table, executed_graph

image = torch.empty(1, 8, 8, 8, device="meta")
with torch.device("meta"):
    modules = [nn.Conv2d(8, 8, size, padding=size // 2).eval() for size in (1, 3, 5, 7)]
entries = {executed_graph(m, [image]).key: EntrySource(str(m), m, (image,)) for m in modules}
keys = list(entries)
nets = [
    SubnetSource(f"{a} {b}", nn.Sequential(modules[a], modules[b]), (image,), (keys[a], keys[b]))
    for a in range(3)
    for b in range(4)
]
table = build_table(entries, nets, path=Path(sys.argv[1]), space="real", settings=SessionSettings())
"""


def running(path: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", REAL, str(path)], cwd=Path(__file__).parents[2]
    )


@pytest.mark.slow
def test_build_killed_by_a_signal_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    left = path.with_name("table.json.building.jsonl")
    process = running(path)
    try:
        deadline = time.monotonic() + 120
        while not (left.exists() and left.read_bytes().count(b"\n") > 1) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not path.exists()
    done = [
        json.loads(line) for line in left.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")
    ]
    assert 0 < len(done) < 4 + 2 * 12 + 1
    assert running(path).wait(timeout=240) == 0
    assert not left.exists()
    table = LookupTable.load(path)
    assert (len(table.entries), len(table.subnets)) == (4, 12)
    kept = {net.key: net.median_us for net in table.subnets}
    assert all(kept[line["key"]] == line["median_us"] for line in done if line["kind"] == "subnet 1")


def test_networks_of_one_graph_are_one(tmp_path: Path) -> None:
    twice = [*nets(4), *nets(4)]
    assert len({executed_graph(net.module, net.inputs).key for net in twice}) == 4
    assert len(built(tmp_path / "table.json", Machine(), subnets=twice).subnets) == 4
