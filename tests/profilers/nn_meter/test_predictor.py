from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lookup_tables import to_onnx
from profilers.nn_meter.forest import Forest
from profilers.nn_meter.predictor import NnMeterPredictor, UncoveredError

MBV2 = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2, 1),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, 1, 1, groups=16),
    nn.ReLU(),
    nn.Conv2d(16, 24, 1),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(24, 10),
)


def meta(module: nn.Module, *shape: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return module.to("meta").eval(), (torch.empty(shape, device="meta"),)


def test_prediction_is_nn_meters_own(
    predictor: NnMeterPredictor, fitted_forests: dict[str, Any], tmp_path: Path
) -> None:
    from nn_meter.predictor import nnMeterPredictor

    network, inputs = meta(MBV2, 1, 3, 32, 32)
    model = onnx.load_from_string(to_onnx({"net": (network, inputs)})["net"])
    logging.getLogger("nn-Meter").setLevel(logging.ERROR)
    rules = tmp_path / "ours" / "predictors" / "toy" / "fusion_rules.json"
    truth = nnMeterPredictor(fitted_forests, str(rules)).predict(model, "onnx")
    assert predictor.predict_ms(network, inputs) == pytest.approx(truth, rel=1e-12)


def test_operator_that_stands_alone_has_its_time(predictor: NnMeterPredictor) -> None:
    """nn-Meter alone drops a graph of one node."""
    assert predictor.predict_ms(*meta(nn.Conv2d(8, 16, 1), 1, 8, 14, 14)) > 0


def test_first_layer_of_one_channel_is_a_dense_convolution(
    predictor: NnMeterPredictor, fitted_forests: dict[str, Any]
) -> None:
    """nn-Meter alone takes it for a depthwise one: its groups are as many as its channels."""
    found = predictor.predict_ms(*meta(nn.Conv2d(1, 16, 3, 2, 1), 1, 1, 28, 28))
    features = [[28, 1, 16, 3, 2, 14 * 14 * 16 * 10 / 1e6, 16 * 10 / 1e6]]
    assert found == pytest.approx(fitted_forests["conv-bn-relu"].predict(features)[0], rel=1e-12)


def test_equal_kernels_are_predicted_once(
    predictor: NnMeterPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []
    plain = Forest.predict
    monkeypatch.setattr(Forest, "predict", lambda self, given: rows.extend(given) or plain(self, given))
    layer = [nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()]
    network, inputs = meta(nn.Sequential(*layer, *layer, *layer), 1, 8, 14, 14)
    models = to_onnx({"net": (network, inputs)})
    (once,) = predictor.read(models).values()
    assert once.coverage.kernels == 3
    assert len(rows) == 1
    assert predictor.read(models)["net"] == once
    assert len(rows) == 1
    assert once.ms == pytest.approx(3 * plain(Forest.from_arrays(arrays_of(predictor)), rows)[0])


def arrays_of(predictor: NnMeterPredictor) -> dict[str, Any]:
    return dict(np.load(predictor.kernels["conv-bn-relu"]))


class Resize(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(images, scale_factor=2)


class Swap(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.transpose(2, 3) + images


class Double(nn.Module):
    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.relu() + numbers


UNCOVERED = {
    "hardswish": (nn.Hardswish(), (1, 8, 14, 14), r"HardSwish at 1x8x14x14 'toy' has no .*'hswish'"),
    "silu": (nn.SiLU(), (1, 8, 14, 14), r"Sigmoid at 1x8x14x14 nn-Meter has no features for 'Sigmoid'"),
    "transposed": (nn.ConvTranspose2d(8, 4, 2, 2), (1, 8, 7, 7), r"ConvTranspose\(8->4, 2x2\) at .* 0 ms"),
    "resize": (Resize(), (1, 8, 7, 7), r"Resize at 1x8x7x7 nn-Meter has no features .* would count 0 ms"),
    "transpose": (Swap(), (1, 8, 7, 7), r"Transpose at 1x8x7x7 .* would count 0 ms"),
    "batch": (nn.Conv2d(8, 8, 3, 1, 1), (2, 8, 7, 7), r"Conv\(8->8, 3x3\) at 2x8x7x7 runs on a batch of 2"),
    "not square": (nn.Conv2d(8, 8, 3, 1, 1), (1, 8, 7, 9), r"Conv\(8->8, 3x3\) at 1x8x7x9 works on 7x9"),
    "kernel": (nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), (1, 8, 7, 7), r"8, 1x3\) .* a \(1, 3\) window"),
    "strides": (nn.Conv2d(8, 8, 1, (1, 2)), (1, 8, 7, 7), r"works on 7x4|strides \(1, 2\)"),
    "dilated": (nn.Conv2d(8, 8, 3, padding=2, dilation=2), (1, 8, 7, 7), r"3x3\) .* is dilated by \(2, 2\)"),
    "grouped": (nn.Conv2d(8, 8, 3, padding=1, groups=2), (1, 8, 7, 7), r"has 2 groups of 8 -> 8 channels"),
    "multiplied": (nn.Conv2d(8, 16, 3, padding=1, groups=8), (1, 8, 7, 7), r"has 8 groups of 8 -> 16"),
    "padding": (nn.Conv2d(8, 8, 3), (1, 8, 7, 7), r"makes 5x5 of 7x7 at stride 1"),
    "no predictor": (nn.MaxPool2d(2), (1, 8, 8, 8), r"MaxPool at 1x8x8x8 'toy' has no .*'maxpool'"),
    "three axes": (nn.Linear(8, 4), (1, 3, 8), r"has a tensor of shape \(1, 3, 8\)"),
    "vectors": (Double(), (1, 8), r"Add at 1x8 adds tensors of shapes"),
}  # fmt: skip


@pytest.fixture(scope="module")
def uncovered_models() -> dict[str, bytes]:
    return to_onnx({name: meta(module, *shape) for name, (module, shape, _) in UNCOVERED.items()})


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_nn_meter_cannot_tell_is_found_and_names_the_layer(
    predictor: NnMeterPredictor, uncovered_models: dict[str, bytes], name: str
) -> None:
    reading = predictor.read({name: uncovered_models[name]})[name]
    assert any(re.search(UNCOVERED[name][2], f"{gap.layer} {gap.reason}") for gap in reading.gaps), (
        reading.gaps
    )


def test_what_is_not_covered_is_an_error(predictor: NnMeterPredictor) -> None:
    network, inputs = meta(nn.Conv2d(8, 8, 3, padding=2, dilation=2), 1, 8, 7, 7)
    text = (
        r"'toy' does not cover 1 layers: Conv2d: Conv\(8->8, 3x3\) at 1x8x7x7 is dilated .*allow_partial=True"
    )
    with pytest.raises(UncoveredError, match=text):
        predictor.predict_ms(network, inputs)


def test_partial_number_leaves_out_what_is_not_covered(predictor: NnMeterPredictor) -> None:
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    odd = nn.Conv2d(8, 8, 3, groups=2)
    networks = {"covered": nn.Sequential(*layers), "partial": nn.Sequential(*layers, odd)}
    found = predictor.read(to_onnx({name: meta(net, 1, 8, 7, 7) for name, net in networks.items()}))
    assert found["partial"].ms == pytest.approx(found["covered"].ms)
    coverage = found["partial"].coverage
    assert (coverage.kernels, coverage.uncovered_kernels) == (2, 1)
    # 3x3 filters over 8 channels at 7x7, and over 4 channels at 5x5.
    expected = 25 * 8 * 36 / (25 * 8 * 36 + 49 * 8 * 72)
    assert coverage.uncovered_mac_share == pytest.approx(expected)


def test_missing_files_are_told_with_size_source_and_what_else_can_be_done(tmp_path: Path) -> None:
    text = (
        r"'cortexA76cpu_tflite21' are not in .* nothing is downloaded unasked.*cortexA76cpu_tflite21.zip, "
        r"1.3 GB unpacked, at https://github.com/microsoft/nn-Meter/releases/.*hwnas nnmeter import .*"
        r"hwnas nnmeter build.*hwnas table build"
    )
    with pytest.raises(ValueError, match=text):
        NnMeterPredictor.load("cortexA76cpu_tflite21", tmp_path)


def test_unknown_predictor_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no predictor 'pixel9' .*there are cortexA76cpu_tflite21"):
        NnMeterPredictor.load("pixel9", tmp_path)


def test_facts_of_another_schema_are_refused(predictor: NnMeterPredictor, tmp_path: Path) -> None:
    facts = tmp_path / "ours" / "predictors" / "toy" / "predictor.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "schema": "other"}))
    with pytest.raises(ValueError, match="must have schema 'hwnas nn-Meter predictor, version 1'"):
        NnMeterPredictor.load("toy", tmp_path / "ours")


def test_no_pickle_is_loaded(predictor: NnMeterPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle is loaded")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert predictor.predict_ms(*meta(nn.Conv2d(8, 16, 1), 1, 8, 14, 14)) > 0
