"""Regression forests as plain arrays: they predict what scikit-learn does, and no file of them runs code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int32]
Rows = Sequence[Sequence[float]] | NDArray[np.float64]

_ROWS = 256  # of features at a time


@final
@dataclass(frozen=True, eq=False)
class Forest:
    """Binary trees whose mean is the prediction; all nodes of all trees in one row, parents before children.

    Attributes:
        features: how many numbers a row of features has.
        roots: the first node of each tree.
        feature: which number a node compares; -1: the node is a leaf.
        threshold: a row goes left where its number, as float32, is at most this.
        left, right: children.
        value: what a leaf predicts.

    Raises:
        ValueError: the arrays are no forest.
    """

    features: int
    roots: Integers
    feature: Integers
    threshold: Floats
    left: Integers
    right: Integers
    value: Floats

    def __post_init__(self) -> None:
        nodes = np.arange(len(self.feature))
        inner = self.feature >= 0
        parts = (self.threshold, self.left, self.right, self.value)
        if not (
            self.features > 0
            and len(self.roots) > 0
            and all(part.shape == self.feature.shape == (len(nodes),) for part in parts)
            and bool(((self.roots >= 0) & (self.roots < len(nodes))).all())
            and bool((self.feature < self.features).all())
            # A child comes after its parent: every walk ends at a leaf.
            and all(bool((nodes < child)[inner].all()) for child in (self.left, self.right))
            and all(bool((child < len(nodes))[inner].all()) for child in (self.left, self.right))
            and bool(np.isfinite(self.value[~inner]).all())
        ):
            raise ValueError(
                "a forest has trees of nodes that compare one of its features or hold a finite value, "
                "parents before children; these arrays do not"
            )

    def predict(self, rows: Rows) -> Floats:
        """The mean over trees, equal to ``RandomForestRegressor.predict`` to the last bit.

        Args:
            rows: of ``features`` numbers each.

        Raises:
            ValueError: rows of another length.
        """
        given = np.asarray(rows, dtype=np.float32)
        if given.ndim != 2 or given.shape[1] != self.features:
            raise ValueError(f"this forest takes rows of {self.features} numbers; got shape {given.shape}")
        return np.concatenate(
            [self._predict(part) for part in np.split(given, range(_ROWS, len(given), _ROWS))]
        )

    def _predict(self, given: NDArray[np.float32]) -> Floats:
        at = np.repeat(self.roots[:, None], len(given), axis=1)  # trees by rows
        rows = np.arange(len(given))
        while True:
            feature = self.feature[at]
            inner = feature >= 0
            if not inner.any():
                break
            is_left = given[rows, np.where(inner, feature, 0)] <= self.threshold[at]
            at = np.where(inner, np.where(is_left, self.left[at], self.right[at]), at)
        # One tree after the other, as scikit-learn adds them: a pairwise sum differs in the last bit.
        total: Floats = np.add.accumulate(self.value[at], axis=0)[-1]
        return total / len(self.roots)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` takes, to be kept in an npz file."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Forest:
        """Raises ``ValueError`` where the arrays are no forest."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"a forest has the arrays {', '.join(names)}; these lack {', '.join(missing)}")
        return cls(
            features=int(arrays["features"]),
            roots=np.asarray(arrays["roots"], np.int32),
            feature=np.asarray(arrays["feature"], np.int32),
            threshold=np.asarray(arrays["threshold"], np.float64),
            left=np.asarray(arrays["left"], np.int32),
            right=np.asarray(arrays["right"], np.int32),
            value=np.asarray(arrays["value"], np.float64),
        )

    @classmethod
    def from_trees(cls, features: int, trees: Sequence[tuple[NDArray[Any], Floats]]) -> Forest:
        """From the node arrays of scikit-learn's trees, of any version.

        Args:
            features: numbers in a row.
            trees: of each tree its structured ``nodes`` (``left_child``, ``right_child``, ``feature``,
                ``threshold``; -1 marks a leaf's children) and its ``values``, one a node.

        Raises:
            ValueError: no tree, or arrays that are no tree.
        """
        if not trees:
            raise ValueError("a forest has at least one tree; this one has none")
        sizes = [len(nodes) for nodes, _ in trees]
        roots = np.cumsum([0, *sizes[:-1]])
        nodes = np.concatenate(
            [nodes[["left_child", "right_child", "feature", "threshold"]] for nodes, _ in trees]
        )
        offset = np.repeat(roots, sizes)
        is_leaf = nodes["left_child"] == -1
        return cls(
            features=features,
            roots=roots.astype(np.int32),
            feature=np.where(is_leaf, -1, nodes["feature"]).astype(np.int32),
            threshold=np.where(is_leaf, 0.0, nodes["threshold"]),
            left=np.where(is_leaf, 0, nodes["left_child"] + offset).astype(np.int32),
            right=np.where(is_leaf, 0, nodes["right_child"] + offset).astype(np.int32),
            value=np.concatenate([np.asarray(values, np.float64).reshape(-1) for _, values in trees]),
        )

    @classmethod
    def from_sklearn(cls, fitted: Any) -> Forest:
        """From a fitted ``RandomForestRegressor`` of one output."""
        states = [tree.tree_.__getstate__() for tree in fitted.estimators_]
        return cls.from_trees(fitted.n_features_in_, [(state["nodes"], state["values"]) for state in states])
