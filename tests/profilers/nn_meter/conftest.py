"""A predictor of nn-Meter whose forests are random: what it says is known by scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from profilers.nn_meter.forest import Forest
from profilers.nn_meter.predictor import NnMeterPredictor, save_predictor
from profilers.nn_meter.regression import KernelPredictor
from tests.profilers.nn_meter.forests import fitted

RULES = {
    name: {"obey": obey}
    for name, obey in {
        "MON": 0, "FN": True, "BF_conv_relu": True, "BF_dwconv_relu": True, "BF_add_relu": True,
    }.items()
}  # fmt: skip
FEATURES = {
    "conv-bn-relu": 7,
    "dwconv-bn-relu": 7,
    "fc": 4,
    "global-avgpool": 2,
    "relu": 2,
    "add": 3,
    "addrelu": 3,
    "avgpool": 5,
}


@pytest.fixture(scope="session")
def fitted_forests() -> dict[str, Any]:
    return {kind: fitted(count, 5, seed) for seed, (kind, count) in enumerate(FEATURES.items())}


@pytest.fixture
def predictor(fitted_forests: dict[str, Any], tmp_path: Path) -> NnMeterPredictor:
    kernels = [KernelPredictor(kind, Forest.from_sklearn(found)) for kind, found in fitted_forests.items()]
    save_predictor("toy", kernels, json.dumps(RULES).encode(), {}, tmp_path / "ours")
    return NnMeterPredictor.load("toy", tmp_path / "ours")
