"""``torch.nn.BatchNorm2d`` whose channels may be a value."""

from __future__ import annotations

from typing import Any, cast, final

import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.freezing import Freezer
from hwnas.nn.mixed import MixedOperation, split
from hwnas.values import Value


@final
class BatchNorm2d(MixedOperation, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` whose channels may be a value; channels are taken from the front.

    Shapes: ``(N, num_features, H, W)`` to the same. Widths share one set of statistics: channel ``i``
    has the same running mean in every width that holds it. Recalibrate a subnet's statistics before it
    is judged (`hwnas.recalibrate`).
    """

    def __init__(self, num_features: int | Value, *arguments: Any, **keywords: Any) -> None:
        values, largest = split({"num_features": num_features})
        super().__init__(largest["num_features"], *arguments, **keywords)
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        self._check_input_dim(input)
        width = max(c.values["num_features"] for c in self._combinations())
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        keeps = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            _front(self.running_mean, width) if keeps else None,
            _front(self.running_var, width) if keeps else None,
            _front(self.weight, width),
            _front(self.bias, width),
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )

    def check_can_mix(self) -> None:
        """Always possible: each channel is normalised by itself."""

    def frozen(self, freezer: Freezer) -> nn.BatchNorm2d:
        value = self.values.get("num_features")
        width = self.num_features if value is None else value.of(freezer.architecture)
        plain = nn.BatchNorm2d(
            width, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        if self.affine:
            plain.weight = freezer.part(self.weight, self.weight[:width])
            # Newer torch has ``bias=False``.
            bias = cast("Tensor | None", self.bias)
            plain.register_parameter("bias", None if bias is None else freezer.part(bias, bias[:width]))
        if self.running_mean is not None and self.running_var is not None:
            plain.running_mean = self.running_mean[:width].clone()
            plain.running_var = self.running_var[:width].clone()
        if self.num_batches_tracked is not None:
            plain.num_batches_tracked = self.num_batches_tracked.clone()
        return plain.train(self.training)


def _front(tensor: Tensor | None, width: int) -> Tensor | None:
    return None if tensor is None else tensor[:width]
