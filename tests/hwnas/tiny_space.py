"""A space that a search gets through in seconds, and a latency table of it that nobody measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace, ValueChoice
from hwnas.latency_table import spread_architectures, subnet_source
from hwnas.nn import BatchNorm2d, Conv2d
from lookup_tables import (
    Accuracy,
    Calibration,
    DeviceFingerprint,
    Entry,
    LookupTable,
    SessionSettings,
    Subnet,
    executed_graph,
    fingerprint,
)
from profilers import distinct_parts

EXAMPLE = torch.zeros(1, 1, 28, 28)


class TinyNet(nn.Module):
    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        width = ValueChoice([4, 8], label="width")
        self.stem = nn.Sequential(
            Conv2d(in_channels, width, 3, stride=4, padding=1), BatchNorm2d(width), nn.ReLU()
        )
        self.layers = nn.Sequential(*(self._layer(width, index) for index in range(3)))
        self.head = nn.Sequential(Conv2d(width, 16, 1), nn.ReLU())
        self.classifier = nn.Linear(16, num_classes)

    def _layer(self, width: ValueChoice, index: int) -> LayerChoice:
        layers: dict[str, nn.Module] = {
            f"k{kernel}": nn.Sequential(
                Conv2d(width, width, kernel, padding=kernel // 2), BatchNorm2d(width), nn.ReLU()
            )
            for kernel in (1, 3, 5)
        }
        return LayerChoice({**layers, "skip": nn.Identity()}, label=f"layer{index}")

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.head(self.layers(self.stem(images))).mean((2, 3)))
        return scores


def tiny_table(
    device: DeviceFingerprint | None = None, without: int = 0, settings: SessionSettings | None = None
) -> LookupTable:
    """A table whose entries are 1 us and a bit for each parameter; some can be left out."""
    space = ModelSpace(TinyNet())
    sites = space.sites(EXAMPLE)
    parts = distinct_parts(space, sites)
    entries = {
        key: Entry(key, part.name, time, time, time, 8)
        for key, part in list(parts.items())[without:]
        for time in [1.0 + sum(p.numel() for p in part.module.parameters()) / 100]
    }
    subnets = []
    for architecture in spread_architectures(space, EXAMPLE, 2, seed=0):
        source = subnet_source(space, sites, architecture, EXAMPLE)
        key = executed_graph(source.module, source.inputs).key
        kept = tuple(k for k in source.keys if k in entries)
        subnets.append(Subnet(key, source.name, kept, 10.0, 10.0, 10.0, 8, 10.0))
    return LookupTable(
        space="tiny",
        date="2026-01-01T00:00:00+00:00",
        device=device or fingerprint(),
        settings=settings or SessionSettings(),
        protocol={"method": "isolated", "clock": "thread_cpu", "overhead_us": 1.0},
        entries=entries,
        subnets=tuple(subnets),
        calibration=Calibration(1.0, 0.0, 0.0),
        accuracy=Accuracy(1.0, 100.0, 100.0, 1.0, 1.0, 2, -0.05, 0.05, 0.9),
    )
