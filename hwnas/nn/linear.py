"""``torch.nn.Linear`` whose features may be values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.nn.masked import masked
from hwnas.nn.mixed import MixedOperation, presence, split, uninitialised
from hwnas.values import Value, combinations


@final
class Linear(MixedOperation, nn.Linear):
    """``torch.nn.Linear`` whose features may be values; features are taken from the front.

    Shapes: ``(..., in_features)`` to ``(..., out_features)``. Under mixing weights the input has its
    largest size and is masked here by the expected presence of each feature (FBNetV2,
    arXiv 2004.05565, section 3.1), and the output keeps its largest size.
    """

    elastic = ("in_features", "out_features")

    def __init__(
        self, in_features: int | Value, out_features: int | Value, bias: bool = True, **keywords: Any
    ) -> None:
        given = {"in_features": in_features, "out_features": out_features}
        values, largest = split(given, {"bias": bias, **keywords})
        super().__init__(**largest)
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        parts = self.parts(self.running_sizes())
        weight, bias = parts["weight"], parts.get("bias")
        mask = None
        if "in_features" in self.values:
            found = combinations({"in_features": self.values["in_features"]})
            mask = presence([combination.values["in_features"] for combination in found], found)
        if mask is None:
            return F.linear(input, weight, bias)
        return masked(input, mask, weight, bias, F.linear, _to_input)

    def check_can_mix(self) -> None:
        """Always possible."""

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        return uninitialised(nn.Linear, **sizes, bias=self.bias is not None)

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        parts = {"weight": self.weight[: sizes["out_features"], : sizes["in_features"]]}
        if self.bias is not None:
            parts["bias"] = self.bias[: sizes["out_features"]]
        return parts


def _to_input(gradient: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    return gradient @ weight
