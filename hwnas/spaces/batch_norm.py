"""BatchNorm as spaces of cells search with it: without a learned scale and shift."""

from __future__ import annotations

from typing import final

from torch import nn

from hwnas.freezing import Freezer, Freezes


@final
class UnscaledBatchNorm2d(Freezes, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose scale stays 1 and whose shift stays 0 until it is in a subnet.

    While operations are compared by their mixing weights, a learned scale could undo a weight (DARTS, arXiv
    1806.09055, appendix A.1.1); a network that is trained alone has none to undo. So the subnet holds a plain
    ``nn.BatchNorm2d``, which learns both from 1 and 0 on, and its parameters are counted in every cost.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.requires_grad_(False)

    def frozen(self, freezer: Freezer) -> nn.BatchNorm2d:
        plain = nn.BatchNorm2d(self.num_features, self.eps, self.momentum, device="meta")
        for name in plain.state_dict():
            setattr(plain, name, freezer(getattr(self, name)))
        plain.requires_grad_(True)
        plain.training = self.training
        return plain
