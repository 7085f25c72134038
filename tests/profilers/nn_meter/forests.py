"""Small forests of scikit-learn, and pickles of them as scikit-learn 0.23 wrote them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestRegressor
from sklearn.tree._tree import Tree

_OLD_FIELDS = [
    "left_child",
    "right_child",
    "feature",
    "threshold",
    "impurity",
    "n_node_samples",
    "weighted_n_node_samples",
]


def fitted(features: int = 7, trees: int = 9, seed: int = 0, scale: float = 1.0) -> RandomForestRegressor:
    """A forest over rows like nn-Meter's features."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(1, 300, (200, features)).astype(float)
    times = scale * (0.01 + rows[:, 0] * rows[:, 1] / 1e5 + generator.uniform(0, 0.01, 200))
    return RandomForestRegressor(n_estimators=trees, oob_score=False, random_state=seed).fit(rows, times)


class _OldTrees(pickle._Pickler):  # the one in Python: the other asks after it has written a class
    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, Tree):
            return NotImplemented
        make, arguments, state = thing.__reduce__()
        nodes = state["nodes"]
        old = np.empty(len(nodes), [(name, nodes.dtype[name]) for name in _OLD_FIELDS])
        for name in _OLD_FIELDS:
            old[name] = nodes[name]
        return make, arguments, {**state, "nodes": old}


def old_pickle(forest: RandomForestRegressor) -> bytes:
    """Protocol 3, nodes of seven fields, numpy's earlier module: as scikit-learn 0.23 wrote it."""
    file = io.BytesIO()
    _OldTrees(file, protocol=3).dump(forest)
    # A name ends with its line in this protocol: exchanging it leaves the rest as it is.
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
