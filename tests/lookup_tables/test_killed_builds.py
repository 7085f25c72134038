"""A build that is killed five times by a signal ends with the table of one that ran through."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lookup_tables import sources
from lookup_tables.assembly import PartCall, Wiring
from lookup_tables.build import build_table
from lookup_tables.measure import Measurement
from lookup_tables.session import SessionSettings
from lookup_tables.sources import EntrySource, Method, Networks, SubnetSource
from lookup_tables.table import LookupTable

COST = {f"conv{size}": 10.0 * size for size in (1, 3, 5, 7)}
OVERHEAD = 6.0
IMAGE = torch.empty(1, 2, 8, 8, device="meta")
CHUNK = 3  # results are told by so many at once


def entries() -> dict[str, EntrySource]:
    with torch.device("meta"):
        convs = {f"conv{size}": nn.Conv2d(2, 2, size, padding=size // 2) for size in (1, 3, 5, 7)}
    return {key: EntrySource(f"the {key}", module.eval(), (IMAGE,)) for key, module in convs.items()}


def subnets() -> list[SubnetSource]:
    parts = entries()
    pairs = [(first, second) for first in parts for second in parts if first <= second]
    return [
        SubnetSource(str(keys), nn.Sequential(*(parts[key].module for key in keys)), (IMAGE,), keys)
        for keys in pairs
    ]


def networks() -> Networks:
    """Chains of three; ``conv7`` is in none, and is measured alone."""
    generator = random.Random(0)
    wirings = []
    for _ in range(12):
        keys = generator.sample(["conv1", "conv3", "conv5"], 3)
        wirings.append(Wiring((0,), tuple(PartCall(k, (n,), (n + 1,)) for n, k in enumerate(keys)), (3,)))
    return Networks(tuple(dict.fromkeys(wirings)), entries())


class SlowMachine:
    """Measures by formula, each in 5 ms; what is measured is written down in a file first."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def _take(self, names: list[str], tell: Any) -> None:
        for start in range(0, len(names), CHUNK):
            for name in names[start : start + CHUNK]:
                time.sleep(0.005)
                with self._log.open("a") as file:
                    file.write(name + "\n")
            for name in names[start : start + CHUNK]:
                tell(name)

    def measure(self, models: Mapping[str, bytes], settings: Any, *, on_result: Any, **_: Any) -> None:
        def tell(name: str) -> None:
            us = OVERHEAD + sum(COST[key] for key in models[name].decode().split())
            on_result(name, Measurement(us * 1.1, us, us * 1.2, 24))

        self._take(list(models), tell)

    def profile(self, models: Mapping[str, bytes], settings: Any, *, on_result: Any, **_: Any) -> None:
        def tell(name: str) -> None:
            times: dict[int, tuple[float, ...]] = {
                n: (COST[k],) * 3 for n, k in enumerate(models[name].decode().split())
            }
            on_result(name, times)

        self._take(list(models), tell)


def build_once(path: Path, log: Path, method: Method) -> None:
    machine = SlowMachine(log)
    build_table(
        entries(),
        subnets(),
        path=path,
        space="chains",
        settings=SessionSettings(),
        method=method,
        networks=networks(),
        measurer=machine.measure,  # type: ignore[arg-type]  # returns nothing
        profiler=machine.profile,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def named_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is the names of what it executes."""
    sizes = {(size, size): f"conv{size}" for size in (1, 3, 5, 7)}

    def names(module: nn.Module) -> bytes:
        convs = module if isinstance(module, nn.Sequential) else [module]
        return " ".join(sizes[conv.kernel_size] for conv in convs).encode()

    monkeypatch.setattr(
        sources,
        "to_onnx",
        lambda modules, progress: {key: names(module) for key, (module, _) in modules.items()},
    )
    monkeypatch.setattr(sources, "_empty_model", lambda: b"")
    monkeypatch.setattr(sources, "chains", lambda model: (model, b" ".join([model] * sources.COPIES)))
    monkeypatch.setattr(
        sources, "assembled", lambda wiring, models: b" ".join(models[c.key] for c in wiring.live())
    )


def finished_entries(path: Path) -> list[str]:
    """What the journal holds, by the names under which it is measured."""
    journal = path.with_name(path.name + ".building.jsonl")
    if not journal.exists():
        return []
    lines = [line for line in journal.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
    records = [json.loads(line) for line in lines]
    return [r["key"] if r["kind"] == "profile" else f"{r['kind']} {r['key']}" for r in records]


@pytest.mark.parametrize("method", ["isolated", "slope", "profiled"])
def test_build_killed_five_times_ends_with_the_same_table(method: Method, tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "table.json"
    generator = random.Random(method)
    build_once(tmp_path / "through.json", tmp_path / "other log", method)
    for _ in range(5):
        before = finished_entries(path)
        log.write_text("")
        process = multiprocessing.get_context("fork").Process(target=build_once, args=(path, log, method))
        process.start()
        stop_after = generator.randint(2, 6)
        while len(log.read_text().splitlines()) < stop_after and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9, "it ended before it could be killed"
        assert not path.exists()
        assert not set(before) & set(log.read_text().splitlines())
    before = finished_entries(path)
    assert len(before) > 3
    log.write_text("")
    build_once(path, log, method)
    assert not set(before) & set(log.read_text().splitlines())
    assert max(Counter(log.read_text().splitlines()).values()) == 1
    resumed, through = (
        replace(LookupTable.load(tmp_path / f"{name}.json"), date="") for name in ("table", "through")
    )
    assert resumed == through
    assert {key: entry.p10_us for key, entry in resumed.entries.items()} == pytest.approx(COST)
    methods = {key: entry.method for key, entry in resumed.entries.items()}
    alone = {"conv7": "isolated"} if method == "profiled" else {}
    assert methods == {**dict.fromkeys(COST, method), **alone}
    assert resumed.accuracy.mape_percent < 0.01
