from __future__ import annotations

import math

import numpy as np
import pytest

from hwnas.devices import compare_devices
from profilers import Cost, CostTable, minimise
from profilers.profile import Profiler
from profilers.space import Architecture

OPTIONS = {"a": (0, 1, 2), "b": (0, 1, 2)}
WORTH = Cost(
    OPTIONS,
    0.0,
    [CostTable(("a",), np.array([0.0, 2.0, 3.0])), CostTable(("b",), np.array([0.0, 1.5, 2.5]))],
    unit="nat",
)


def device(*table: list[float], unit: str = "ms") -> Profiler:
    tables = [CostTable((label,), np.array(row)) for label, row in zip(OPTIONS, table, strict=True)]
    return Profiler(Cost(OPTIONS, 1.0, tables, unit=unit))


def find(budget: dict[Profiler, float]) -> Architecture:
    found = minimise(-WORTH, [(profiler.cost, most) for profiler, most in budget.items()])
    assert found is not None
    return found


DEVICES = {"left": device([0, 1, 2], [0, 3, 6]), "right": device([0, 3, 6], [0, 1, 2])}


def test_each_device_has_the_best_network_within_its_own_budget() -> None:
    asked: list[Architecture] = []

    def score(architecture: Architecture) -> float:
        asked.append(architecture)
        return WORTH.of(architecture)

    found = compare_devices({**DEVICES, "left again": DEVICES["left"]}, 0.5, find, score)
    assert found.budgets == {"left": 5.0, "right": 5.0, "left again": 5.0}
    assert found.winners == {name: {"a": 1, "b": 1} for name in found.budgets}  # 1 + 1 + 3 is 5 on both
    assert asked == [{"a": 1, "b": 1}]  # one network is judged once
    for name, winner in found.winners.items():
        assert found.costs[name] == {on: p.profile(winner) for on, p in DEVICES.items()} | {
            "left again": DEVICES["left"].profile(winner)
        }
        assert found.costs[name][name] <= found.budgets[name]
        assert found.regret(name, on=name) == 0.0


def test_what_does_not_fit_costs_everything_and_what_fits_costs_the_difference() -> None:
    found = compare_devices(DEVICES, {"left": 3.0, "right": 7.0}, find, WORTH.of)
    assert found.winners == {"left": {"a": 2, "b": 0}, "right": {"a": 1, "b": 2}}
    assert found.regret("left", on="right") == pytest.approx(4.5 - 3.0)
    assert found.excess("left", on="right") == 0.0
    assert found.regret("right", on="left") == math.inf
    assert found.excess("right", on="left") == pytest.approx((1 + 1 + 6) / 3 - 1)


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="at least one"):
        compare_devices({}, 0.5, find, WORTH.of)
    with pytest.raises(ValueError, match=r"budgets for \['left'\]"):
        compare_devices(DEVICES, {"left": 3.0}, find, WORTH.of)
    with pytest.raises(ValueError, match=r"from 0 to 1; got 3"):
        compare_devices(DEVICES, 3.0, find, WORTH.of)
    with pytest.raises(ValueError, match="one unit"):
        compare_devices(
            {"a": DEVICES["left"], "b": device([0, 1, 2], [0, 1, 2], unit="MAC")}, 0.5, find, WORTH.of
        )
