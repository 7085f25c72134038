from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from profilers import Cost, CostTable, fit_cost

OPTIONS = {"a": (0, 1, 2), "b": ("x", "y"), "c": (1, 2, 3, 4)}
GRID = np.array(list(itertools.product(*(range(len(choice)) for choice in OPTIONS.values()))))
BENCHMARK = Path(__file__).parents[3] / "shared" / "data" / "nas_bench_201_latency.parquet"


def truth(seed: int) -> Cost:
    generator = np.random.default_rng(seed)
    tables = [CostTable((label,), generator.uniform(1, 5, len(choice))) for label, choice in OPTIONS.items()]
    return Cost(OPTIONS, 3.0, tables, unit="ms")


def test_sum_over_choices_is_found_exactly_from_a_few_networks() -> None:
    cost = truth(0)
    some = np.random.default_rng(1).permutation(len(GRID))[:12]
    fitted = fit_cost(OPTIONS, GRID[some], cost.of_many(GRID[some]), "ms")
    np.testing.assert_allclose(fitted.of_many(GRID), cost.of_many(GRID), rtol=1e-9)
    assert fitted.unit == "ms"


def test_a_disturbed_measurement_does_not_decide() -> None:
    cost = truth(2)
    times = cost.of_many(GRID)
    times[5] *= 20
    fitted = fit_cost(OPTIONS, GRID, times, "ms")
    np.testing.assert_allclose(fitted.of_many(GRID), cost.of_many(GRID), rtol=0.01)


def test_bad_input_is_told() -> None:
    times = truth(0).of_many(GRID)
    with pytest.raises(ValueError, match="24 networks needs a measurement above 0"):
        fit_cost(OPTIONS, GRID, times[:3], "ms")
    with pytest.raises(ValueError, match="above 0"):
        fit_cost(OPTIONS, GRID, times * 0, "ms")
    with pytest.raises(ValueError, match=r"no measured network has 'b' at \['y'\]"):
        fit_cost(OPTIONS, GRID[GRID[:, 1] == 0], times[GRID[:, 1] == 0], "ms")
    with pytest.raises(ValueError, match="must lie in 0 to 2"):
        fit_cost(OPTIONS, GRID + 1, times, "ms")


@pytest.mark.skipif(not BENCHMARK.exists(), reason=f"{BENCHMARK} is not there")
def test_an_exact_sum_of_operations_is_predicted_exactly_from_500_of_15625_cells() -> None:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(BENCHMARK, columns=["cellstr", "latency_ms_fpga"]).to_pydict()
    cells = [
        [edge.split("~")[0] for node in cell.split("+") for edge in node.strip("|").split("|")]
        for cell in rows["cellstr"]
    ]
    names = tuple(sorted({name for cell in cells for name in cell}))
    options = {f"edge{i}": names for i in range(6)}
    indices = np.array([[names.index(name) for name in cell] for cell in cells])
    times = np.array(rows["latency_ms_fpga"])
    some = np.random.default_rng(0).permutation(len(cells))[:500]
    fitted = fit_cost(options, indices[some], times[some], "ms")
    np.testing.assert_allclose(fitted.of_many(indices), times, rtol=1e-6)
