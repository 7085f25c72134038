"""Precision as a choice of the space: which modules of a network compute in INT8.

It stands beside the network, under ``precision`` in the settings of a `ModelSpace`: one choice for the whole
network, or one for each of its modules, by name. A module that is not named computes in fp32. Where nothing
of a module runs (a skip, a depth that it is beyond) its precision takes no part in the architecture.

>>> from torch import nn
>>> from hwnas import ModelSpace, ValueChoice
>>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
>>> space = ModelSpace(network, settings={"precision": {"0": ValueChoice(["fp32", "int8"])}})
>>> int8_modules(space, {"precision.0": "int8"}), precision_labels(space)
(['0'], {'0': 'precision.0'})
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwnas.export import export_onnx
from hwnas.mobile import nodes_in
from hwnas.space import ModelSpace
from hwnas.values import ValueChoice
from lookup_tables import Accuracy, LookupTable, Progress, measure
from lookup_tables.build import Measure
from lookup_tables.calibrate import accuracy_of
from lookup_tables.quantise import quantise_untrained
from lookup_tables.session import PRECISIONS
from profilers import MixedPrecisionProfiler
from profilers.space import Architecture

Floats = NDArray[np.float64]


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
    active = space.active(architecture)
    return [name for name, label in labels.items() if active.get(label) == "int8"]


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


def measure_borders(
    space: ModelSpace,
    example_input: Tensor,
    tables: Mapping[str, LookupTable],
    *,
    networks: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
    measurer: Measure = measure,
) -> tuple[float, Accuracy]:
    """What a border between precisions costs on this machine, and what that leaves unexplained.

    Random networks of random precisions are exported, quantised in the modules that chose it, and measured
    twice; ``border_us`` is the least-squares fit of what they take beyond their sites. The weights are the
    space's own, the inputs random: neither changes the latency.

    Args:
        space: with a choice of the precision (`precision_labels`).
        example_input: shape ``(1, ...)``.
        tables: by precision, as for `profilers.MixedPrecisionProfiler`.
        networks: how many are measured, at least 3; an export takes 3 CPU seconds.
        seed: of their choice.
        progress: told about every step.
        measurer: measures models.

    Returns:
        ``border_us``, and the error on these networks, each predicted by a fit to all others.

    Raises:
        ValueError: as `MixedPrecisionProfiler`; or fewer than 3 networks.
    """
    if networks < 3:
        raise ValueError(f"a fit that is checked needs at least 3 networks, got {networks}")
    report = progress or (lambda what, done, total: None)
    labels = precision_labels(space)
    profilers = [
        MixedPrecisionProfiler(space, example_input, tables, labels, border_us) for border_us in (0, 1)
    ]
    generator = torch.Generator().manual_seed(seed)
    drawn = [space.random(generator) for _ in range(networks)]
    without = np.array([profilers[0].profile(a) for a in drawn]) * 1e3
    borders = np.array([profilers[1].profile(a) for a in drawn]) * 1e3 - without
    models: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="hwnas-") as folder:
        for number, architecture in enumerate(drawn):
            report("exporting mixed networks", number, networks)
            path = export_onnx(space.freeze(architecture), example_input, Path(folder, "network.onnx"))
            nodes = nodes_in(onnx.load(str(path)).graph, int8_modules(space, architecture))
            models[str(number)] = quantise_untrained(path.read_bytes(), nodes)
    settings = tables["fp32"].settings
    twice = {f"{turn} {name}": model for turn in (1, 2) for name, model in models.items()}
    found = measurer(
        twice,
        settings,
        reference=models["0"],
        seed=seed,
        progress=partial(report, "measuring mixed networks"),
    )
    once, again = (
        np.array([found[f"{turn} {number}"].p10_us for number in range(networks)]) for turn in (1, 2)
    )
    beyond = (once + again) / 2 - without
    everyone = np.arange(networks)
    predicted = [without[n] + borders[n] * _fitted(borders, beyond, everyone != n) for n in everyone]
    return _fitted(borders, beyond, everyone >= 0), accuracy_of(predicted, once.tolist(), again.tolist())


def _fitted(borders: Floats, beyond: Floats, kept: NDArray[np.bool_]) -> float:
    """Microseconds a border; what is below 0 is noise."""
    square = float((borders[kept] ** 2).sum())
    return max(0.0, float((borders * beyond)[kept].sum()) / square) if square else 0.0
