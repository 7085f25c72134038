from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lookup_tables import (
    Accuracy,
    Calibration,
    Entry,
    LookupTable,
    MissingEntryError,
    SessionSettings,
    fingerprint,
)
from profilers.flops import count_macs
from profilers.latency import LatencyProfiler
from profilers.profile import distinct_parts, parts_of
from tests.contracts.meter import MeterContract

EXAMPLE = torch.zeros(1, 1, 6, 6)


@pytest.fixture
def table(space: Any) -> LookupTable:
    """Every part of the fake space, each with a time of its own."""
    generator = np.random.default_rng(0)
    parts = {
        p.key: p.name for site in space.sites(EXAMPLE) for p in parts_of(space, site) if p and not p.is_free
    }
    times = generator.uniform(5, 50, len(parts)).tolist()
    return a_table(
        {
            key: Entry(key, name, median_us=99.0, p10_us=us, p90_us=99.0, samples=20)
            for (key, name), us in zip(parts.items(), times, strict=True)
        }
    )


def a_table(entries: dict[str, Entry]) -> LookupTable:
    accuracy = Accuracy(1.5, 98.0, 100.0, 0.99, 1.0, 30, -0.02, 0.03, 0.9)
    return LookupTable(
        space="fake",
        date="2026-01-02T03:04:05",
        device=fingerprint(),
        settings=SessionSettings(),
        protocol={"method": "invented"},
        entries=entries,
        subnets=(),
        calibration=Calibration(scale=0.9, per_site_us=1.5, constant_us=7.0),
        accuracy=accuracy,
    )


def test_cost_is_what_the_table_predicts_for_the_keys(space: Any, table: LookupTable) -> None:
    profiler = LatencyProfiler(space, EXAMPLE, table)
    assert profiler.unit == "ms"
    for architecture in space.every_architecture():
        predicted = table.predict_us(profiler.keys(architecture)) / 1e3
        assert profiler.profile(architecture) == pytest.approx(predicted, rel=1e-12)


def test_what_does_not_run_and_what_is_free_has_no_key(space: Any, table: LookupTable) -> None:
    profiler = LatencyProfiler(space, EXAMPLE, table)
    base = {"width": 2, "out": 3, "idle": 0}
    assert len(profiler.keys({**base, "op": "conv3", "depth": 2})) == 4
    assert len(profiler.keys({**base, "op": "conv3", "depth": 1})) == 3
    assert len(profiler.keys({**base, "op": "skip", "depth": 2})) == 2


def test_the_interval_is_that_of_the_table(space: Any, table: LookupTable) -> None:
    profiler = LatencyProfiler(space, EXAMPLE, table)
    architecture = profiler.cost.maximum()
    predicted = profiler.profile(architecture)
    assert profiler.interval(architecture) == pytest.approx((0.98 * predicted, 1.03 * predicted))


def test_all_missing_entries_are_named_in_one_error(space: Any, table: LookupTable) -> None:
    missing = [key for key, entry in table.entries.items() if entry.name.startswith("conv(2->2")]
    kept = {key: entry for key, entry in table.entries.items() if key not in missing}
    match = r"2 of 10 parts.*conv\(2->2, k=3\); conv\(2->2, k=1\).*hwnas table build"
    with pytest.raises(MissingEntryError, match=match):
        LatencyProfiler(space, EXAMPLE, dataclasses.replace(table, entries=kept))


def test_another_device_is_refused_or_warned_of(space: Any, table: LookupTable) -> None:
    other = dataclasses.replace(table, device=dataclasses.replace(table.device, cpu="Cortex-A76"))
    with pytest.raises(ValueError, match=r"another device .*Cortex-A76.*--allow-other-device"):
        LatencyProfiler(space, EXAMPLE, other)
    with pytest.warns(UserWarning, match="another device .*Cortex-A76"):
        profiler = LatencyProfiler(space, EXAMPLE, other, allow_other_device=True)
    assert profiler.table is other


def test_table_that_predicts_badly_is_warned_of(space: Any, table: LookupTable) -> None:
    bad = dataclasses.replace(table, accuracy=dataclasses.replace(table.accuracy, within_10_percent=60.0))
    with pytest.warns(UserWarning, match="predicts only 60 % of 30 held-out networks within 10 %"):
        LatencyProfiler(space, EXAMPLE, bad)


class TestContract(MeterContract):
    unit = "ms"

    def profiler(self, space: Any, inputs: tuple[Tensor, ...]) -> LatencyProfiler:
        return LatencyProfiler(space, inputs, self._table(space, inputs))

    def truth(self, space: Any, inputs: tuple[Tensor, ...], architecture: dict[str, Any]) -> float:
        """Each convolution has one BatchNorm in its part; the mean and the head are parts, too."""
        subnet = space.freeze(architecture)
        parts = 2 + sum(isinstance(module, nn.BatchNorm2d) for module in subnet.modules())
        calibration = a_table({}).calibration
        isolated = parts + count_macs(subnet, inputs).headline / 7e2
        total = calibration.scale * isolated + calibration.per_site_us * parts
        return (total + calibration.constant_us) / 1e3

    def _table(self, space: Any, inputs: tuple[Tensor, ...]) -> LookupTable:
        """A time for each part by what it computes: nobody measured it."""
        parts = distinct_parts(space, space.sites(*inputs))
        entries = {
            key: Entry(
                key,
                part.name,
                median_us=99.0,
                p10_us=1.0 + count_macs(part.module, part.inputs).headline / 7e2,
                p90_us=99.0,
                samples=20,
            )
            for key, part in parts.items()
        }
        return a_table(entries)
