"""How an architecture is found: each strategy is a Lightning callback."""

from hwnas.non_finite import NonFiniteLossError
from hwnas.strategies.controller import PPO, Reinforce
from hwnas.strategies.darts import DARTS
from hwnas.strategies.enas import ENAS
from hwnas.strategies.fairnas import FairNAS
from hwnas.strategies.gumbel_darts import GumbelDARTS
from hwnas.strategies.proxyless import Proxyless
from hwnas.strategies.random_one_shot import RandomOneShot
from hwnas.strategies.sampled import SampledStrategy
from hwnas.strategies.sandwich import Sandwich
from hwnas.strategies.strategy import Strategy

__all__ = [
    "DARTS",
    "ENAS",
    "PPO",
    "FairNAS",
    "GumbelDARTS",
    "NonFiniteLossError",
    "Proxyless",
    "RandomOneShot",
    "Reinforce",
    "SampledStrategy",
    "Sandwich",
    "Strategy",
]
