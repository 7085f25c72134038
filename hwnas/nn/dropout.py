"""``torch.nn.Dropout`` whose probability may be a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.nn.mixed import MixedOperation, blend, split
from hwnas.values import Value, combinations


@final
class Dropout(MixedOperation, nn.Dropout):
    """``torch.nn.Dropout`` whose probability may be a value.

    Shapes: any to the same. Under mixing weights all options see one draw of uniform numbers, each keeps the
    elements whose number is at least its ``p``, and the input is scaled by their weighted masks in one go:
    the mixture of the options' outputs.

    Raises:
        ValueError: an option is not in 0 to 1.
    """

    elastic = ("p",)

    def __init__(self, p: float | Value = 0.5, inplace: bool = False) -> None:
        values, largest = split({"p": p}, {"inplace": inplace})
        for chance in values["p"].all() if values else ():
            if not 0 <= chance <= 1:
                raise ValueError(f"p must be from 0 to 1 under every option; {p!r} can be {chance!r}")
        super().__init__(**largest)
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        found = combinations(self.values)
        chances = [outcome["p"] for outcome in self.live(found)]
        if not found[0].is_mixed:
            return F.dropout(input, chances[0], self.training, self.inplace)
        if not self.training:
            return input
        # Where a number lies between two options decides which of them keep the element.
        steps = sorted(set(chances))
        scales = [
            [1.0 / (1.0 - chance) if chance <= step < 1.0 else 0.0 for step in (-1.0, *steps)]
            for chance in chances
        ]
        scale = blend(torch.tensor(scales, dtype=torch.double, device=input.device), found).to(input.dtype)
        drawn = torch.rand(input.shape, device=input.device)
        passed = torch.bucketize(drawn, torch.tensor(steps, device=input.device), right=True)
        return input * scale[passed]

    def check_can_mix(self) -> None:
        """Always possible."""

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        return nn.Dropout(**sizes, inplace=self.inplace)

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}
