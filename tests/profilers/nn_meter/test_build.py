"""An nn-Meter of this machine: with invented times, so that the truth is known, and with real ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import shape_inference
from torch import nn

from lookup_tables import Measurement, SessionSettings, measure, to_onnx
from profilers.nn_meter.build import BuildSettings, build_predictor
from profilers.nn_meter.fusion import fusion_rules
from profilers.nn_meter.package import registered
from profilers.nn_meter.predictor import NnMeterPredictor
from profilers.nn_meter.regression import KernelPredictor

SMALL = BuildSettings(networks=40, calibrating=8)


def invented_us(model: bytes) -> dict[int, float]:
    """By node: 1 us, and what it writes and multiplies; a ReLU that is fused has none."""
    graph = shape_inference.infer_shapes(onnx.load_from_string(model)).graph
    sizes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.value_info, *graph.output)
    }
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    found = {}
    for number, node in enumerate(graph.node):
        written = torch.Size(sizes[node.output[0]]).numel()
        inputs = [makers[name].op_type for name in node.input if name in makers]
        # ONNX Runtime makes one kernel of a convolution, a sum and the activation behind them.
        if (node.op_type == "Relu" and inputs[0] in ("Conv", "Add")) or (
            node.op_type == "Add" and "Conv" in inputs
        ):
            continue
        filters = weights.get(node.input[1], [1]) if len(node.input) > 1 else [1]
        found[number] = 1.0 + written / 1e3 + written * torch.Size(filters[1:]).numel() / 4e4
    return found


class Profiler:
    """Stands for `profile`; stops after so many models, as a power cut would."""

    def __init__(self, most: int = 10**6) -> None:
        self.most = most
        self.timed: list[str] = []

    def __call__(
        self,
        networks: Mapping[str, bytes],
        settings: SessionSettings,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_result: Callable[[str, dict[int, tuple[float, ...]]], None] | None = None,
    ) -> dict[str, dict[int, tuple[float, ...]]]:
        assert on_result is not None
        for name, model in networks.items():
            if len(self.timed) == self.most:
                raise KeyboardInterrupt
            self.timed.append(name)
            on_result(name, {node: (us, us) for node, us in invented_us(model).items()})
        return {}


class Measurer:
    """Stands for `measure`, with 5 us for the session; stops after so many models, as a power cut would."""

    def __init__(self, most: int = 10**6) -> None:
        self.most = most
        self.measured: list[str] = []

    def __call__(
        self,
        models: Mapping[str, bytes],
        settings: SessionSettings,
        *,
        reference: bytes | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_result: Callable[[str, Measurement], None] | None = None,
    ) -> dict[str, Measurement]:
        assert on_result is not None
        for name, model in models.items():
            if len(self.measured) == self.most:
                raise KeyboardInterrupt
            self.measured.append(name)
            us = 5.0 + sum(invented_us(model).values())
            on_result(name, Measurement(us, us, us, 1))
        return {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(16, 96, 1), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(96, 96, 3, 1, 1, groups=96), nn.ReLU())
        self.project = nn.Conv2d(96, 16, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.project(self.depthwise(self.expand(features)))


def network() -> tuple[nn.Module, tuple[torch.Tensor]]:
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 10)).to("meta").eval(), (
        torch.empty(1, 3, 32, 32, device="meta"),
    )


def built(folder: Path, measurer: Measurer, profiler: Profiler, **settings: Any) -> NnMeterPredictor:
    return build_predictor(
        "here",
        SessionSettings(**settings),
        build=SMALL,
        folder=folder,
        measurer=measurer,
        profiling=profiler,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a predictor that was built."""
    folder = tmp_path_factory.mktemp("built")
    built(folder, Measurer(), Profiler())
    return folder


def test_built_predictor_predicts_networks_that_it_has_not_seen(folder: Path) -> None:
    predictor = NnMeterPredictor.load("here", folder)
    assert registered(folder)["here"]["kernel_predictors"] == list(predictor.kernels)
    assert not [*folder.rglob("*.pkl"), *folder.rglob("*.jsonl")]
    assert predictor.facts["accuracy"]["within_10_percent"] > 80
    whole, inputs = network()
    truth = 5.0 + sum(invented_us(to_onnx({"net": (whole, inputs)})["net"]).values())
    assert 1e3 * predictor.predict_ms(whole, inputs) == pytest.approx(truth, rel=0.1)


def test_killed_build_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    profilers, measurers = (Profiler(17), Profiler(), Profiler()), (Measurer(), Measurer(7), Measurer())
    journal = tmp_path / "predictors" / "here.building.jsonl"
    for profiler, measurer in zip(profilers[:2], measurers, strict=False):
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path, measurer, profiler)
        with journal.open("a") as file:
            file.write('{"model": "cut o')
    found = built(tmp_path, measurers[2], profilers[2])
    timed = [name for profiler in profilers for name in profiler.timed]
    measured = [name for measurer in measurers for name in measurer.measured]
    assert [len(profiler.timed) for profiler in profilers] == [17, SMALL.networks - 17, 0]
    assert [len(measurer.measured) for measurer in measurers] == [0, 7, 2 * SMALL.calibrating - 7]
    assert len(set(timed)) == len(timed)
    assert len(set(measured)) == len(measured)
    assert found.facts["accuracy"]["within_10_percent"] > 80
    assert not journal.exists()


def test_journal_of_other_settings_is_dropped(tmp_path: Path) -> None:
    profiler = Profiler(most=3)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, Measurer(), profiler)
    profiler.most = 6
    with (
        pytest.warns(UserWarning, match=r"cannot be gone on with .*of other settings"),
        pytest.raises(KeyboardInterrupt),
    ):
        built(tmp_path, Measurer(), profiler, optimisation="extended")
    header, *records = (tmp_path / "predictors" / "here.building.jsonl").read_text().splitlines()
    assert json.loads(header)["settings"]["optimisation"] == "extended"
    assert len(records) == 3


def test_networks_reach_the_ends_of_the_range(folder: Path) -> None:
    """What is beyond what was measured is not covered."""
    predictor = NnMeterPredictor.load("here", folder)
    for kind, path in predictor.kernels.items():
        law = KernelPredictor.load(kind, path).law
        assert law is not None
        channels = 0 if kind == "fc" else 1
        assert law.low[channels] <= 8
        assert law.high[channels] >= 640
        if kind not in ("fc", "global-avgpool"):  # its height is not among nn-Meter's features
            assert law.high[0] == 32


@pytest.mark.slow
def test_nn_meter_of_this_machine_tells_small_from_large(tmp_path: Path) -> None:
    """Real times, hastily measured; how good they are when they are not is for a benchmark to say."""
    hasty = functools.partial(measure, rounds=1)
    predictor = build_predictor("here", SessionSettings(), build=SMALL, folder=tmp_path, measurer=hasty)
    _, inputs = network()
    wide = nn.Sequential(nn.Conv2d(3, 48, 3, 1, 1), nn.ReLU(), nn.Conv2d(48, 40, 1)).to("meta")
    narrow = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).to("meta")
    assert predictor.predict_ms(wide, inputs) > 2 * predictor.predict_ms(narrow, inputs) > 0
    assert predictor.facts["accuracy"]["spearman"] > 0.7


def test_rules_are_what_the_runtime_fuses() -> None:
    def obeyed(**options: Any) -> set[str]:
        rules = json.loads(fusion_rules(SessionSettings(**options)))
        return {name for name, rule in rules.items() if name.startswith("BF") and rule["obey"]}

    assert {"BF_conv_relu", "BF_dwconv_relu"} <= obeyed(optimisation="extended") <= obeyed(optimisation="all")
    assert "BF_avgpool_relu" not in obeyed(optimisation="all")
    assert obeyed(optimisation="disabled") == set()


@pytest.mark.parametrize(
    ("number", "text"),
    [({"networks": 5}, "networks must be at least 6; got 5"), ({"calibrating": 0}, "at least 6")],
)
def test_builds_that_measure_too_little_are_refused(number: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BuildSettings(**number)
