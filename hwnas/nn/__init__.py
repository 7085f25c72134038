"""Operations of ``torch.nn`` whose arguments may be values."""

from hwnas.nn.conv import Conv2d
from hwnas.nn.linear import Linear
from hwnas.nn.mixed import MixedOperation
from hwnas.nn.norm import BatchNorm2d

__all__ = ["BatchNorm2d", "Conv2d", "Linear", "MixedOperation"]
