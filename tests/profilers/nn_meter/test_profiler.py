from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lookup_tables
from hwnas import LayerChoice, ModelSpace
from profilers.nn_meter import NnMeterPredictor, NnMeterProfiler, UncoveredError
from tests.contracts.meter import MeterContract


def block(kernel: int, *after: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(8, 8, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), *after)


class Net(nn.Module):
    """Two choices and a head; ``after`` is the activation that a site of its own holds."""

    def __init__(self, after: nn.Module | None = None, odd: nn.Module | None = None) -> None:
        super().__init__()
        options = {"k1": block(1, nn.ReLU()), "k3": block(3, nn.ReLU()), "skip": nn.Identity()}
        self.first = LayerChoice(options, label="first")
        self.second = LayerChoice({"k3": block(3), "odd": odd or block(1)}, label="second")
        self.after = after or nn.Identity()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.after(self.second(self.first(images))))


IMAGES = torch.zeros(1, 8, 7, 7)


def test_sum_over_sites_is_nn_meters_number_for_the_whole_network(predictor: NnMeterPredictor) -> None:
    space = ModelSpace(Net())
    profiler = NnMeterProfiler(space, IMAGES, predictor)
    assert profiler.unit == "ms"
    for architecture in ({"first": "k1", "second": "k3"}, {"first": "skip", "second": "odd"}):
        assert profiler.border_error(architecture, space.freeze(architecture)) == pytest.approx(0, abs=1e-12)
        assert profiler.coverage(architecture).uncovered_kernels == 0


def test_what_fuses_across_a_border_is_counted_apart_and_said(
    predictor: NnMeterPredictor, fitted_forests: dict[str, Any]
) -> None:
    space = ModelSpace(Net(after=nn.ReLU()))
    profiler = NnMeterProfiler(space, IMAGES, predictor)
    architecture = {"first": "skip", "second": "k3"}
    error = profiler.border_error(architecture, space.freeze(architecture))
    apart = fitted_forests["relu"].predict([[7, 8]])[0]
    total = profiler.profile(architecture)
    assert error == pytest.approx(total / (total - apart) - 1)


def test_layer_that_is_not_covered_is_an_error_that_names_its_part(predictor: NnMeterPredictor) -> None:
    space = ModelSpace(Net(odd=block(3, nn.Hardswish())))
    with pytest.raises(UncoveredError, match=r"Sequential.* at 1x8x7x7: HardSwish at 1x8x7x7 .* 'hswish'"):
        NnMeterProfiler(space, IMAGES, predictor)


def test_partial_profiler_warns_and_says_the_share_of_each_architecture(predictor: NnMeterPredictor) -> None:
    space = ModelSpace(Net(odd=nn.Conv2d(8, 8, 3, padding=1, groups=2)))
    with pytest.warns(UserWarning, match=r"latencies are partial.* 2 groups of 8 -> 8"):
        profiler = NnMeterProfiler(space, IMAGES, predictor, allow_partial=True)
    whole = profiler.coverage({"first": "k3", "second": "k3"})
    partial = profiler.coverage({"first": "k3", "second": "odd"})
    assert (whole.uncovered_kernels, partial.uncovered_kernels, partial.kernels) == (0, 1, 4)
    macs = {"first": 49 * 8 * 72, "odd": 49 * 8 * 36, "head": 32}
    assert partial.uncovered_mac_share == pytest.approx(macs["odd"] / sum(macs.values()))


@pytest.fixture(scope="module")
def exported() -> dict[str, bytes]:
    """What one test of the contract has exported, by digests: exporting takes longer than all else."""
    return {}


class TestContract(MeterContract):
    unit = "ms"

    @pytest.fixture(autouse=True)
    def _given(
        self,
        predictor: NnMeterPredictor,
        fitted_forests: dict[str, Any],
        exported: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def to_onnx(modules: Mapping[str, Any]) -> dict[str, bytes]:
            missing = {key: module for key, module in modules.items() if key not in exported}
            exported.update(lookup_tables.to_onnx(missing))
            return {key: exported[key] for key in modules}

        monkeypatch.setattr("profilers.nn_meter.profiler.to_onnx", to_onnx)
        self.predictor = predictor
        self.forests = fitted_forests

    def profiler(self, space: Any, inputs: tuple[Tensor, ...]) -> NnMeterProfiler:
        return NnMeterProfiler(space, inputs, self.predictor)

    def truth(self, space: Any, inputs: tuple[Tensor, ...], architecture: dict[str, Any]) -> float:
        """By scikit-learn's forests, on nn-Meter's features of each layer and of the mean."""
        subnet, rows = space.freeze(architecture), []

        def note(layer: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
            if isinstance(layer, nn.Linear):
                cin, cout = layer.in_features, layer.out_features
                flops = (2 * cin + 1) * cout
                rows.append(("fc", [cin, cout, flops / 2e6, flops / 1e6]))
                rows.append(("global-avgpool", [1, cin]))
            elif isinstance(layer, nn.Conv2d):
                hw, cin, cout = given[0].shape[2], layer.in_channels, layer.out_channels
                ks, stride = layer.kernel_size[0], layer.stride[0]
                weights = cout * (ks * ks * cin + 1)
                macs = hw / stride * hw / stride * weights
                rows.append(("conv-bn-relu", [hw, cin, cout, ks, stride, macs / 1e6, weights / 1e6]))

        for layer in subnet.modules():
            layer.register_forward_hook(note)
        subnet.eval()(*inputs)
        return sum(self.forests[kind].predict([row])[0] for kind, row in rows)
