"""``torch.nn.Linear`` whose features may be values."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.freezing import Freezer
from hwnas.nn.mixed import MixedOperation, blend, split
from hwnas.values import Value


@final
class Linear(MixedOperation, nn.Linear):
    """``torch.nn.Linear`` whose features may be values; features are taken from the front.

    Shapes: ``(..., in_features)`` to ``(..., out_features)``. Under mixing weights the input has its
    largest size and is masked here by the expected presence of each feature (FBNetV2,
    arXiv 2004.05565, section 3.1), and the output keeps its largest size.
    """

    def __init__(
        self, in_features: int | Value, out_features: int | Value, bias: bool = True, **keywords: Any
    ) -> None:
        values, largest = split({"in_features": in_features, "out_features": out_features})
        super().__init__(largest["in_features"], largest["out_features"], bias=bias, **keywords)
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        found = self._combinations()
        ins = [c.values.get("in_features", self.in_features) for c in found]
        outs = [c.values.get("out_features", self.out_features) for c in found]
        weight = self.weight[: max(outs), : max(ins)]
        if found[0].weight is not None and "in_features" in self.values:
            present = torch.tensor(ins, device=weight.device)[:, None] > torch.arange(
                max(ins), device=weight.device
            )
            weight = weight * blend(present, found).to(weight.dtype)
        return F.linear(input, weight, None if self.bias is None else self.bias[: max(outs)])

    def check_can_mix(self) -> None:
        """Always possible."""

    def frozen(self, freezer: Freezer) -> nn.Linear:
        sizes = {name: value.of(freezer.architecture) for name, value in self.values.items()}
        n_in, n_out = sizes.get("in_features", self.in_features), sizes.get("out_features", self.out_features)
        plain = nn.Linear(n_in, n_out, bias=self.bias is not None, device="meta")
        plain.weight = freezer.part(self.weight, self.weight[:n_out, :n_in])
        if self.bias is not None:
            plain.bias = freezer.part(self.bias, self.bias[:n_out])
        return plain.train(self.training)
