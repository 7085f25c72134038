"""Ready-made spaces: network classes with choices in them."""

from hwnas.spaces.small_mobilenet import SmallMobileNet

__all__ = ["SmallMobileNet"]
