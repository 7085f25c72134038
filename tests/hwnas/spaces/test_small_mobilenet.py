from __future__ import annotations

from hwnas.spaces import SmallMobileNet
from tests.contracts.space import SpaceContract


class TestSmallMobileNet(SpaceContract):
    space = SmallMobileNet
