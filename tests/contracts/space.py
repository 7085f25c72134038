"""What a ready-made space promises, as a test case that each of them subclasses.

::

    from tests.contracts.space import SpaceContract

    class TestMyNet(SpaceContract):
        space = MyNet
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hwnas import ModelSpace
from hwnas.certificate import certify, verify
from hwnas.classification import Classification
from hwnas.derive import ranked
from hwnas.export import export_onnx
from hwnas.spaces import SPACES, conformance
from lookup_tables import (
    Accuracy,
    Calibration,
    Entry,
    LatencyReading,
    LookupTable,
    SessionSettings,
    fingerprint,
    to_onnx,
)
from profilers import (
    FlopsProfiler,
    LagrangianPenalty,
    LatencyProfiler,
    ParamsProfiler,
    RangeProfilerFilter,
    count_macs,
    distinct_parts,
)
from profilers.space import Part
from tests.hwnas.strategies.tiny import EVERY, STRATEGIES, trainer

COUNTED = Path(__file__).parents[3] / "shared" / "data" / "published_archs.json"
CLASSES = 4
SEARCHED_BY = ("darts", "proxyless-two", "gumbel", "random-one-shot", "enas")  # others run the same gates


class SpaceContract(ABC):
    """Subclass it as ``Test…`` and name the class."""

    space: ClassVar[type[Any]]
    images: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    """Of the small variant."""

    refuses: ClassVar[dict[str, str]] = {}
    """Strategies that cannot search it, by name as in ``EVERY``, with a part of what they say."""

    counted: ClassVar[dict[str, str]] = {}
    """Published networks that stand in shared/data/published_archs.json, with their name there."""

    def make(self) -> ModelSpace:
        torch.manual_seed(0)
        return ModelSpace(self.space.small(num_classes=CLASSES, in_channels=self.images[0]))

    def example(self, batch: int = 1) -> Tensor:
        return torch.randn(batch, *self.images, generator=torch.Generator().manual_seed(1))

    @classmethod
    @functools.cache
    def macs(cls) -> FlopsProfiler:
        """Of one instance for all tests: it takes seconds, and equal classes have equal choices."""
        return FlopsProfiler(cls().make(), cls().example())

    def test_the_command_line_knows_it(self) -> None:
        assert self.space in SPACES.values()

    def test_published_networks_are_counted_as_published(self) -> None:
        for name in self.space.published:
            found = conformance("", self.space, name)
            assert (found.macs, found.params) == (found.published.macs, found.published.params), name
            assert found.published.source, name

    def test_what_is_published_is_what_others_counted(self) -> None:
        if not self.counted:
            pytest.skip("no network of this space is in the table of counts")
        if not COUNTED.exists():
            pytest.skip(f"{COUNTED} is not there")
        measured = {a["name"]: a["measured"] for a in json.loads(COUNTED.read_text())["archs"]}
        for name, known_as in self.counted.items():
            published = self.space.published[name]
            assert published.macs == measured[known_as]["macs"], name
            assert published.params == measured[known_as]["params"], name

    def test_a_published_network_is_plain_and_takes_other_arguments(self) -> None:
        for name in [*self.space.published][:1]:
            network = self.space.from_published(name, num_classes=7)
            assert type(network) is self.space
            linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
            assert linear[-1].out_features == 7
        with pytest.raises(ValueError, match="no published network 'nobody'"):
            self.space.from_published("nobody")

    def test_multiply_adds_and_parameters_of_subnets_are_what_the_costs_say(self) -> None:
        space = self.make()
        macs, params = self.macs(), ParamsProfiler(space)
        generator = torch.Generator().manual_seed(2)
        for architecture in (macs.cost.minimum(), macs.cost.maximum(), space.random(generator)):
            subnet = space.freeze(architecture)
            assert macs.profile(architecture) == count_macs(subnet, [self.example()]).headline
            assert params.profile(architecture) == sum(p.numel() for p in subnet.parameters())

    def test_every_part_can_be_measured_for_a_latency_table(self) -> None:
        _, parts = self.surveyed()
        some = dict([*parts.items()][:: max(1, len(parts) // 8)])
        files = to_onnx({key: (part.module, part.inputs) for key, part in some.items()})
        assert files.keys() == some.keys()

    @pytest.mark.parametrize("name", SEARCHED_BY)
    def test_a_search_keeps_its_budget_and_freezes_with_weights(self, name: str) -> None:
        space, macs = self.make(), self.macs()
        low, high = macs.cost.bounds()
        budget = low + 0.6 * (high - low)
        bound: dict[str, Any] = {"filter": RangeProfilerFilter(macs, max=budget)}
        if name in STRATEGIES or name.startswith("darts"):
            bound = {"penalty": LagrangianPenalty(macs, baseline=budget)}
        strategy = EVERY[name](arc_learning_rate=0.1, **bound)
        data = TensorDataset(self.example(8), torch.arange(8) % CLASSES)
        module = Classification(space, CLASSES)
        fitted = trainer(strategy, limit_train_batches=1, limit_val_batches=1)
        loaders = DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)
        with warnings.catch_warnings():
            # A search of one step decides nothing, and says so.
            warnings.filterwarnings("ignore", "[A-Za-z]+. (the answer|. of . layers|nothing is decided)")
            if name in self.refuses:
                with pytest.raises(ValueError, match=self.refuses[name]):
                    fitted.fit(module, *loaders)
                return
            fitted.fit(module, *loaders)
        architecture = strategy.architecture()
        assert macs.profile(architecture) <= budget
        subnet = space.eval().freeze(architecture)
        with space.running(space.gates_of(architecture)):
            torch.testing.assert_close(subnet(self.example(3)), space(self.example(3)))

    def test_a_latency_that_was_asked_is_what_the_file_gets(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a table by a budget to a certified file, on a machine that takes 1 us a 1,000 weights."""

        def read(path: Path, settings: SessionSettings) -> LatencyReading:
            graph = onnx.load(str(path)).graph
            sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
            layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
            ms = sum(max(sizes.get(name, 0) for name in node.input) for node in layers) / 1e6
            return LatencyReading(ms, ms, ms, 0.5, "thread_cpu", True, "")

        monkeypatch.setattr("hwnas.certificate.measure_latency", read)
        space, parts = self.surveyed()
        latency = LatencyProfiler(space, self.example(), self.table(parts))
        low, high = latency.cost.bounds()
        budget = low + 0.6 * (high - low)
        generator = torch.Generator().manual_seed(3)
        rows = {
            label: torch.rand(len(options), generator=generator).softmax(0)
            for label, options in space.options.items()
        }
        architecture = next(iter(ranked(space, rows, {latency: budget})))
        subnet = space.freeze(architecture).eval()
        file = export_onnx(subnet, self.example(), tmp_path / "subnet.onnx")
        proof = certify(file, subnet, latency, architecture, budget, [self.example()])
        assert proof.predicted_ms is not None
        assert proof.predicted_ms <= budget
        assert proof.measured_ms == pytest.approx(proof.predicted_ms, rel=1e-3)
        assert proof.passed, proof.reason
        assert verify(file).holds
        assert proof.parity_max_abs_diff < 1e-3

    @classmethod
    @functools.cache
    def surveyed(cls) -> tuple[ModelSpace, dict[str, Part]]:
        """A space and its parts, for all tests."""
        space = cls().make().eval()
        return space, distinct_parts(space, space.sites(cls().example()))

    def table(self, parts: Mapping[str, Part]) -> LookupTable:
        """What was never measured: 1 us a 1,000 weights."""
        entries = {}
        for key, part in parts.items():
            layers = [m for m in part.module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            weights = sum(layer.weight.numel() for layer in layers)
            us = max(weights / 1e3, 1e-6)
            entries[key] = Entry(key, part.name, us, us, us, 8)
        return LookupTable(
            space="small",
            date="2026-01-01T00:00:00+00:00",
            device=fingerprint(),
            settings=SessionSettings(),
            protocol={"method": "isolated"},
            entries=entries,
            subnets=(),
            calibration=Calibration(1.0, 0.0, 0.0),
            accuracy=Accuracy(1.0, 100.0, 100.0, 1.0, 1.0, 2, -0.05, 0.05, 0.9),
        )
