"""Costs fitted to whole networks: NAS-Bench-201's cells on five devices, from a few hundred measurements.

For each device a sum of one table for each edge is fitted to the latency of some cells and predicts all
others. Prints the error on these, medians over draws of the cells. The FPGA's latency is an exact sum over
operations; the others were measured. With live edges, an edge that nothing flows through, or from which
nothing reaches the output, counts as "none": graph runtimes drop it, a network run eagerly does not.

    python benchmarks/fitted_costs.py [--data ../shared/data/nas_bench_201_latency.parquet] [--cells 500]
        [--draws 10]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet
from scipy.stats import spearmanr

from profilers import fit_cost

DEVICES = ("gold_6226", "pixel2", "raspi4", "1080ti_1", "fpga")


def alive(cell: list[str]) -> list[str]:
    """The cell with "none" on every edge that no path of operations from the input to the output has."""
    ends = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    real = {end for end, operation in zip(ends, cell, strict=True) if operation != "none"}
    paths = [[(0, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]]
    used = {end for path in paths if real.issuperset(path) for end in path}
    return [operation if end in used else "none" for end, operation in zip(ends, cell, strict=True)]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path("../shared/data/nas_bench_201_latency.parquet"))
parser.add_argument("--cells", type=int, default=500)
parser.add_argument("--draws", type=int, default=10)
arguments = parser.parse_args()

rows = pyarrow.parquet.read_table(arguments.data).to_pydict()
# |op~0|+|op~0|op~1|+|op~0|op~1|op~2|: the operations on the edges into nodes 1, 2 and 3.
cells = [
    [edge.split("~")[0] for node in cell.split("+") for edge in node.strip("|").split("|")]
    for cell in rows["cellstr"]
]
operations = tuple(sorted({operation for cell in cells for operation in cell}))
options = dict.fromkeys(("0-1", "0-2", "1-2", "0-3", "1-3", "2-3"), operations)
indices = np.array([[operations.index(operation) for operation in cell] for cell in cells])
live = np.array([[operations.index(operation) for operation in alive(cell)] for cell in cells])
kinds = {"all edges": indices, "live edges": live}

print(f"python benchmarks/fitted_costs.py --cells {arguments.cells} --draws {arguments.draws}\n")
others = f"{len(cells) - arguments.cells:,}"
print(f"| device | sum over | MAPE on the other {others} | median | within 5 % | within 10 % | Spearman |")
print("|---|---|---|---|---|---|---|")
for device in DEVICES:
    latency = np.array(rows[f"latency_ms_{device}"])
    for kind, described in kinds.items():
        found = []
        for draw in range(arguments.draws):
            order = np.random.default_rng(draw).permutation(len(cells))
            seen, other = order[: arguments.cells], order[arguments.cells :]
            cost = fit_cost(options, described[seen], latency[seen], "ms")
            predicted = cost.of_many(described[other])
            errors = 100 * np.abs(predicted / latency[other] - 1)
            rank = spearmanr(predicted, latency[other]).statistic
            found.append(
                (
                    errors.mean(),
                    np.median(errors),
                    100 * (errors <= 5).mean(),
                    100 * (errors <= 10).mean(),
                    rank,
                )
            )
        mape, middle, five, ten, rank = np.median(found, axis=0)
        print(
            f"| {device} | {kind} | {mape:.3g} % | {middle:.3g} % | {five:.1f} % | {ten:.1f} % | {rank:.3f} |"
        )
