"""A small space without `hwnas`: an operation, a depth, and widths that couple two layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from profilers.space import Architecture, Implied, Part


class FakeSite:
    def __init__(self, name: str, labels: Sequence[str], part: Callable[..., Part | None]) -> None:
        self.name = name
        self.labels = tuple(labels)
        self._part = part

    def part(self, architecture: Mapping[str, Any]) -> Part | None:
        return self._part(*(architecture[label] for label in self.labels))

    def parts(self, options: Mapping[str, Any]) -> list[Part | None]:
        return [self._part(*chosen) for chosen in itertools.product(*(options[x] for x in self.labels))]


class FakeSpace:
    """``stem(1->width)``, then ``depth`` of two layers ``op(width)``, then ``head(width->out)``."""

    options = {
        "op": ("conv3", "conv1", "skip"),
        "width": (2, 4),
        "depth": (1, 2),
        "out": (3, 5),
        "idle": (0, 1),
    }
    implied: Sequence[Implied] = ()

    def sites(self, *example_inputs: Tensor) -> list[FakeSite]:
        size = example_inputs[0].shape[-1]

        def conv(inputs: int, outputs: int, kernel: int) -> Part:
            module = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, device="meta")
            given = torch.empty(1, inputs, size, size, device="meta")
            name = f"conv({inputs}->{outputs}, k={kernel})"
            return Part(name, f"{name} at {size}", module, (given,), is_free=False)

        def layer(op: str, width: int) -> Part:
            if op == "skip":
                return Part("skip", "skip", nn.Identity(), (), is_free=True)
            return conv(width, width, int(op[-1]))

        return [
            FakeSite("stem", ["width"], lambda width: conv(1, width, 3)),
            FakeSite("layer1", ["op", "width"], layer),
            FakeSite(
                "layer2", ["depth", "op", "width"], lambda d, op, width: layer(op, width) if d > 1 else None
            ),
            FakeSite("head", ["out", "width"], lambda out, width: conv(width, out, 1)),
        ]

    def parameter_sites(self) -> list[FakeSite]:
        return self.sites(torch.empty(1, 1, 1, 1))

    def canonical(self, architecture: Mapping[str, Any]) -> Architecture:
        return dict(architecture)

    def every_architecture(self) -> list[Architecture]:
        combinations = itertools.product(*self.options.values())
        return [dict(zip(self.options, combination, strict=True)) for combination in combinations]


@pytest.fixture
def space() -> FakeSpace:
    return FakeSpace()
