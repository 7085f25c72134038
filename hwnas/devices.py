"""One space on several devices: the winner for each, and what it loses on the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from hwnas.derive import Budget
from profilers.profile import Profiler
from profilers.space import Architecture


@final
@dataclass(frozen=True)
class DeviceComparison:
    """What `compare_devices` found.

    Attributes:
        unit: of the costs and budgets.
        budgets: the most that a network may cost, by device.
        winners: the best architecture that keeps to it, by device.
        scores: how good each device's winner is; more is better.
        costs: ``costs[a][b]`` is what the winner of device ``a`` costs on device ``b``.
    """

    unit: str
    budgets: Mapping[str, float]
    winners: Mapping[str, Architecture]
    scores: Mapping[str, float]
    costs: Mapping[str, Mapping[str, float]]

    def excess(self, winner_of: str, on: str) -> float:
        """By how much the winner of one device is over another's budget: ``cost / budget - 1``, or 0."""
        return max(0.0, self.costs[winner_of][on] / self.budgets[on] - 1)

    def regret(self, winner_of: str, on: str) -> float:
        """What a device loses in score if it runs another one's winner in place of its own.

        Infinite where that winner is over its budget: it cannot be run at all. It may be negative: where
        ``find`` is no exact search, another device's winner can be better than one's own.
        """
        if self.costs[winner_of][on] > self.budgets[on]:
            return math.inf
        return self.scores[on] - self.scores[winner_of]


def compare_devices(
    devices: Mapping[str, Profiler],
    budgets: Mapping[str, float] | float,
    find: Callable[[Budget], Architecture],
    score: Callable[[Architecture], float],
) -> DeviceComparison:
    """Finds the best network for every device, and what each would cost and lose on all others.

    Args:
        devices: by name, a profiler of one space each: a `LatencyProfiler` of each device's table.
        budgets: the most that a network may cost, by device; or one number from 0 to 1 for all of them: the
            place between the space's cheapest (0) and dearest (1) network on that device.
        find: the best architecture within a budget, such as a strategy's ``architecture``.
        score: how good an architecture is, more is better; it is asked once for each distinct winner.

    Raises:
        ValueError: no device, budgets that do not name the same devices, costs of different units, or a
            budget that nothing keeps to.

    >>> import numpy as np
    >>> from profilers import Cost, CostTable, minimise
    >>> options = {"op": ("small", "wide", "deep")}
    >>> phone, laptop = (
    ...     Profiler(Cost(options, 0.0, [CostTable(("op",), np.array(ms))], unit="ms"))
    ...     for ms in ([1.0, 2.0, 4.0], [1.0, 4.0, 2.0])
    ... )
    >>> worth = Cost(options, 0.0, [CostTable(("op",), np.array([0.0, 2.0, 1.0]))], unit="nat")
    >>> found = compare_devices(
    ...     {"phone": phone, "laptop": laptop},
    ...     {"phone": 2.0, "laptop": 2.0},
    ...     find=lambda budget: minimise(-worth, [(p.cost, most) for p, most in budget.items()]),
    ...     score=worth.of,
    ... )
    >>> found.winners["phone"], found.winners["laptop"], found.excess("phone", on="laptop")
    ({'op': 'wide'}, {'op': 'deep'}, 1.0)
    >>> found.regret("phone", on="laptop"), found.regret("laptop", on="laptop")
    (inf, 0.0)
    """
    if not devices:
        raise ValueError("devices are compared by their profilers: give at least one")
    units = {profiler.unit for profiler in devices.values()}
    if len(units) > 1:
        raise ValueError(f"devices are compared in one unit; got {sorted(units)}")
    limits = _limits(devices, budgets)
    winners = {name: find({profiler: limits[name]}) for name, profiler in devices.items()}
    scores: dict[str, float] = {}
    for name, winner in winners.items():
        same = next((other for other in scores if winners[other] == winner), None)
        scores[name] = score(winner) if same is None else scores[same]
    costs = {
        name: {on: profiler.profile(winner) for on, profiler in devices.items()}
        for name, winner in winners.items()
    }
    return DeviceComparison(units.pop(), limits, winners, scores, costs)


def _limits(devices: Mapping[str, Profiler], budgets: Mapping[str, float] | float) -> dict[str, float]:
    if isinstance(budgets, Mapping):
        if budgets.keys() != devices.keys():
            raise ValueError(
                f"each device needs a budget: got devices {list(devices)} and budgets for {list(budgets)}"
            )
        return dict(budgets)
    if not 0 <= budgets <= 1:
        raise ValueError(
            "one budget for all devices is a share of the span between each one's cheapest and dearest "
            f"network, from 0 to 1; got {budgets:g}. Give milliseconds by device"
        )
    spans = {name: profiler.cost.bounds() for name, profiler in devices.items()}
    return {name: low + budgets * (high - low) for name, (low, high) in spans.items()}
