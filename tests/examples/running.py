"""Runs an example's script in this process: importing torch anew takes longer than it."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from lookup_tables import LatencyReading, Measurement, SessionSettings
from lookup_tables.build import build_table

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_script(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> dict[str, Any]:
    """The script's variables at its end. Modules beside it are found, and forgotten afterwards."""
    path = EXAMPLES / script
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    monkeypatch.syspath_prepend(str(path.parent))
    beside = {module.stem for module in path.parent.glob("*.py")}
    try:
        return runpy.run_path(str(path), run_name="__main__")
    finally:
        for name in beside & sys.modules.keys():
            del sys.modules[name]


def measure_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are built as ever, but of a machine that needs 5 us and one more for each 100 bytes.

    The lower level of optimisation is slower, and the less so the larger the model; two threads are faster.
    """

    def measurer(
        models: Mapping[str, bytes],
        settings: SessionSettings,
        *,
        on_result: Callable[[str, Measurement], None],
        **_: Any,
    ) -> dict[str, Measurement]:
        found = {}
        for name, model in models.items():
            us = 5 + len(model) / 100 / settings.threads**0.5
            us += 40 * len(model) ** 0.25 if settings.optimisation == "extended" else 0
            found[name] = Measurement(us, us, us, 10)
            on_result(name, found[name])
        return found

    def profiler(
        networks: Mapping[str, bytes],
        settings: SessionSettings,
        *,
        on_result: Callable[[str, dict[int, tuple[float, ...]]], None],
        **_: Any,
    ) -> dict[str, dict[int, tuple[float, ...]]]:
        found: dict[str, dict[int, tuple[float, ...]]] = {}
        for name, model in networks.items():
            sizes: Counter[int] = Counter()
            graph = onnx.load_from_string(model).graph
            for thing in (*graph.node, *graph.initializer):
                place = thing.name.split(".")[0]
                if place.removeprefix("p").isdigit():  # else it is a constant, of no part
                    sizes[int(place.removeprefix("p"))] += thing.ByteSize()
            found[name] = {}
            for part, size in sizes.items():
                us = size / 100 / settings.threads**0.5
                us += 40 * size**0.25 if settings.optimisation == "extended" else 0
                found[name][part] = (us,)
            on_result(name, found[name])
        return found

    assert build_table.__kwdefaults__ is not None
    monkeypatch.setitem(build_table.__kwdefaults__, "measurer", measurer)
    monkeypatch.setitem(build_table.__kwdefaults__, "profiler", profiler)


def read_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate's measurement by the same rule."""

    def measure_latency(path: Path, settings: SessionSettings) -> LatencyReading:
        ms = (5 + path.stat().st_size / 100) / 1e3
        return LatencyReading(ms, ms, ms, 0.5, settings.clock, True, "")

    monkeypatch.setattr("hwnas.certificate.measure_latency", measure_latency)
