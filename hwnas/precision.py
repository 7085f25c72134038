"""Precision as a choice of the space: which modules of a network compute in INT8.

It stands beside the network, under ``precision`` in the settings of a `ModelSpace`: one choice for the whole
network, or one for each of its modules, by name. A module that is not named computes in fp32.

>>> from torch import nn
>>> from hwnas import ModelSpace, ValueChoice
>>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
>>> space = ModelSpace(network, settings={"precision": {"0": ValueChoice(["fp32", "int8"])}})
>>> int8_modules(space, {"precision.0": "int8"}), precision_labels(space)
(['0'], {'0': 'precision.0'})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwnas.space import ModelSpace
from hwnas.values import ValueChoice
from lookup_tables.session import PRECISIONS
from profilers.space import Architecture


def precision_labels(space: ModelSpace) -> dict[str, str]:
    """The label of the precision's choice, by the name of the module; '' is the whole network.

    Raises:
        ValueError: the settings hold no precision, or one that is no choice among ``fp32`` and ``int8``, or
            of a module that the network does not have.
    """
    found = {}
    for name, choice in _by_module(space).items():
        if not isinstance(choice, ValueChoice) or not set(choice.options) <= set(PRECISIONS):
            raise ValueError(
                f"the precision of '{name}' must be a ValueChoice among {', '.join(PRECISIONS)}; "
                f"got {choice!r}"
            )
        found[name] = choice.name()
    if not found:
        raise ValueError(
            'the space has no choice of a precision; make it with settings={"precision": {"layers.0": '
            'ValueChoice(["fp32", "int8"])}}, by the names of its modules'
        )
    return found


def int8_modules(space: ModelSpace, architecture: Architecture) -> list[str]:
    """Names of the modules that an architecture computes in INT8; '' is the whole network.

    Raises:
        ValueError: an option that a choice does not have.
    """
    if "precision" not in space.settings:
        return []
    labels = precision_labels(space)
    checked = space.validate(architecture)
    return [name for name, label in labels.items() if checked[label] == "int8"]


def _by_module(space: ModelSpace) -> Mapping[str, Any]:
    setting = space.settings.get("precision", {})
    by_module = setting if isinstance(setting, Mapping) else {"": setting}
    known = dict(space.network.named_modules())
    if unknown := [name for name in by_module if name not in known]:
        raise ValueError(
            f"a precision is chosen for modules of the network, by name; it has no {', '.join(unknown)}, it "
            f"has {', '.join(filter(None, known))}"
        )
    return by_module
