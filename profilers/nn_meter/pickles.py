"""Reads scikit-learn's pickled forests without running anything that a pickle names."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import IO, Any, NoReturn, final

import numpy as np
from numpy.typing import NDArray

from profilers.nn_meter.forest import Forest

_NODE_FIELDS = ("left_child", "right_child", "feature", "threshold")
# Kind and size of the numbers in a forest.
_NUMBERS = {"f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class RefusedPickleError(ValueError):
    """A pickle names something that a forest does not consist of, or holds no forest."""


def read_forest(file: IO[bytes]) -> Forest:
    """The forest of a pickled ``RandomForestRegressor`` of one output.

    A pickle is a program that imports and calls what it names. Here its names stand for five classes of this
    module, which keep what they are given and do nothing; any other name is refused, and neither
    scikit-learn nor numpy is called by the pickle. So the layout of a tree's nodes is ours to read: the one
    of scikit-learn 0.20 to 1.2 (seven fields), which later versions refuse to load, and the one since 1.3
    (eight).

    Args:
        file: opened for reading; nothing after the pickle is read.

    Raises:
        RefusedPickleError: anything else than such a forest.
    """
    try:
        found = _Unpickler(file).load()
        if not isinstance(found, _Estimator) or "estimators_" not in found.state:
            raise RefusedPickleError("it holds no fitted forest")
        trees = [tree.state["tree_"] for tree in found.state["estimators_"]]
        return Forest.from_trees(trees[0].features, [tree.arrays() for tree in trees])
    except RefusedPickleError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise RefusedPickleError(f"it is damaged or no forest ({type(error).__name__}: {error})") from error


class _Inert(type):
    """Classes that a pickle cannot change: its BUILD operation sets attributes of whatever it was given."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"it tries to set {cls.__name__}.{name}")


@final
class _Estimator(metaclass=_Inert):
    """Stands for a forest or a tree of scikit-learn."""

    state: Mapping[str, Any]

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = state


@final
class _Tree(metaclass=_Inert):
    """Stands for ``sklearn.tree._tree.Tree``."""

    def __init__(self, features: int, classes: object, outputs: int) -> None:
        if outputs != 1:
            raise RefusedPickleError(f"its trees have {outputs} outputs; a latency is one")
        self.features = features

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = state

    def arrays(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        nodes, values = self.state["nodes"].numbers(), self.state["values"].numbers()
        if missing := [name for name in _NODE_FIELDS if name not in (nodes.dtype.names or ())]:
            raise RefusedPickleError(f"its trees' nodes lack {', '.join(missing)}")
        return nodes, values


@final
class _Dtype(metaclass=_Inert):
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: str, *flags: object) -> None:
        self.code = code
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def numpy(self) -> np.dtype[Any]:
        order, names, members, size = self.state[1], *self.state[3:6]
        if names is None:
            if self.code not in _NUMBERS:
                raise RefusedPickleError(f"it holds an array of {self.code!r}, not of numbers")
            return np.dtype(self.code).newbyteorder(order)
        return np.dtype(
            {
                "names": list(names),
                "formats": [members[name][0].numpy() for name in names],
                "offsets": [members[name][1] for name in names],
                "itemsize": size,
            }
        )


@final
class _Array(metaclass=_Inert):
    """Stands for ``numpy.ndarray``, and for the function that makes an empty one."""

    def __init__(self, *kind: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def numbers(self) -> NDArray[Any]:
        _, shape, dtype, is_fortran, content = self.state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise RefusedPickleError("it holds an array of objects, not of numbers")
        found = np.frombuffer(content, dtype.numpy())
        return found.reshape(shape, order="F" if is_fortran else "C")


@final
class _Scalar(metaclass=_Inert):
    """Stands for one number of numpy; a forest predicts without these."""

    def __init__(self, *content: object) -> None:
        pass


_STAND_INS: dict[tuple[str, str], type] = {
    ("sklearn.ensemble._forest", "RandomForestRegressor"): _Estimator,
    ("sklearn.ensemble.forest", "RandomForestRegressor"): _Estimator,
    ("sklearn.tree._classes", "DecisionTreeRegressor"): _Estimator,
    ("sklearn.tree.tree", "DecisionTreeRegressor"): _Estimator,
    ("sklearn.tree._tree", "Tree"): _Tree,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
}


@final
class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise RefusedPickleError(
                f"it names {module}.{name}, which no forest consists of: it was not read any further, and "
                "nothing of it was run"
            ) from None

    def persistent_load(self, identifier: object) -> NoReturn:
        raise RefusedPickleError("it refers to something outside of itself")
