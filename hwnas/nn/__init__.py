"""Operations of ``torch.nn`` whose arguments may be values."""

from hwnas.nn.attention import MultiheadAttention
from hwnas.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose2d
from hwnas.nn.dropout import Dropout
from hwnas.nn.embedding import Embedding
from hwnas.nn.linear import Linear
from hwnas.nn.mixed import MixedOperation
from hwnas.nn.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm, LayerNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose2d",
    "Dropout",
    "Embedding",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MixedOperation",
    "MultiheadAttention",
]
