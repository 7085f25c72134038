"""What the ranks of a distributed training have to agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor


def average(tensors: Sequence[Tensor]) -> None:
    """The mean over all ranks, in place; all ranks give equally many of equal shapes."""
    if tensors and torch.distributed.is_available() and torch.distributed.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, mean in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(mean.view_as(tensor))
