"""Other engines compute what torch does, or say what is missing."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import nn

from hwnas.engines import ENGINES, MissingEngineError, engine, engine_parity, parity_report
from hwnas.export import export_onnx

INPUTS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    return export_onnx(network, INPUTS[:1], tmp_path_factory.mktemp("engines") / "net.onnx")


@pytest.mark.parametrize("name", ENGINES)
def test_engine_computes_what_torch_does(name, network, path):
    try:
        assert engine_parity(name, network, path, [INPUTS, INPUTS[:1]]) < 1e-5
    except MissingEngineError as error:
        pytest.skip(str(error))


def test_engine_that_computes_something_else_is_seen(network, path):
    other = nn.Sequential(network, nn.Softmax(1)).eval()
    try:
        assert engine_parity("openvino", other, path, [INPUTS]) > 0.01
    except MissingEngineError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ENGINES)
def test_missing_engine_is_skipped_with_the_extra_that_brings_it(name, network, path, monkeypatch):
    imported = builtins.__import__

    def absent(module, *arguments):
        if module in ("openvino", "ncnn", "pnnx", "MNN", "_tools", "litert_torch"):
            raise ModuleNotFoundError(f"No module named '{module}'")
        return imported(module, *arguments)

    engine(name)
    monkeypatch.setattr(builtins, "__import__", absent)
    report = parity_report([name], network, path, INPUTS)
    assert f"pip install hwnas[{name}]" in report[name]
    assert report[name].startswith("skipped: No module named")


def test_unknown_engine_is_told_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown engine 'tvm'; there are openvino, ncnn, mnn, litert"):
        engine("tvm")
