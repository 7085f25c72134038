"""How an architecture is found: each strategy is a Lightning callback."""

from hwnas.non_finite import NonFiniteLossError
from hwnas.strategies.darts import DARTS
from hwnas.strategies.proxyless import Proxyless
from hwnas.strategies.strategy import Strategy

__all__ = ["DARTS", "NonFiniteLossError", "Proxyless", "Strategy"]
