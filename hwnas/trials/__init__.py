"""Multi-trial search: architectures are tried one by one, on any function or on a trained supernet."""

from hwnas.trials.additive import ParetoPoint, pareto_front
from hwnas.trials.candidates import Candidates
from hwnas.trials.grid_search import GridSearch
from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.nsga2 import NSGA2
from hwnas.trials.policy_search import PolicySearch
from hwnas.trials.random_search import RandomSearch
from hwnas.trials.regularized_evolution import RegularizedEvolution
from hwnas.trials.results import Direction, Objectives, Trial, Trials
from hwnas.trials.search import search
from hwnas.trials.supernet_evaluator import SupernetEvaluator
from hwnas.trials.tpe import TPE

__all__ = [
    "NSGA2",
    "TPE",
    "Candidates",
    "Direction",
    "GridSearch",
    "Method",
    "Objectives",
    "ParetoPoint",
    "PolicySearch",
    "Problem",
    "Proposals",
    "RandomSearch",
    "RegularizedEvolution",
    "SupernetEvaluator",
    "Trial",
    "Trials",
    "pareto_front",
    "search",
]
