from __future__ import annotations

import pytest
import torch

from hwnas.trials import Candidates, Method, Objectives, Problem, RegularizedEvolution, Trial
from tests.contracts.search import SearchContract, conditional_space


class TestRegularizedEvolution(SearchContract):
    def method(self) -> Method:
        return RegularizedEvolution(population_size=8, sample_size=3)


class TestRegularizedEvolutionWithCrossover(SearchContract):
    def method(self) -> Method:
        return RegularizedEvolution(population_size=8, sample_size=3, crossover=0.5)


def differing(one: dict[str, object], other: dict[str, object]) -> int:
    return sum(one[label] != other[label] for label in one)


def test_child_is_a_mutation_of_the_best_of_the_youngest() -> None:
    space = conditional_space()
    generator = torch.Generator().manual_seed(0)
    candidates = Candidates(space, [], generator)
    method = RegularizedEvolution(population_size=4, sample_size=4)
    evolution = method.start(Problem(candidates, Objectives({"accuracy": "max"}), generator))
    # The best of all is the first, and is too old when the fifth has joined.
    ages = []
    for number in range(5):
        found = evolution.ask()
        assert found is not None
        candidates.take(found)
        ages.append(found)
        evolution.tell(Trial(number, found, {"accuracy": [9.0, 1.0, 2.0, 3.0, 0.0][number]}))
    child = evolution.ask()
    assert child is not None
    label = {name for name in child if child[name] != ages[3][name]}
    active = space.active(ages[3])
    assert len(label & active.keys()) == 1


def test_crossover_takes_each_choice_from_either_parent() -> None:
    space = conditional_space()
    generator = torch.Generator().manual_seed(0)
    candidates = Candidates(space, [], generator)
    mother = {**space.default(), "op": "wide", "inner": 1, "depth": 3, "block1": 2, "block2": 1}
    father = {**space.default(), "op": "plain", "width": 6, "depth": 2, "block0": 1}
    children = [candidates.cross(mother, father) for _ in range(100)]
    assert all(
        child is not None
        and all(child[label] in (mother[label], father[label], space.default()[label]) for label in child)
        for child in children
    )
    assert len({str(child) for child in children}) > 20


def test_failed_trials_are_no_parents() -> None:
    space = conditional_space()
    generator = torch.Generator().manual_seed(0)
    candidates = Candidates(space, [], generator)
    method = RegularizedEvolution(population_size=2, sample_size=2)
    evolution = method.start(Problem(candidates, Objectives({"accuracy": "max"}), generator))
    for number in range(6):
        found = evolution.ask()
        assert found is not None
        candidates.take(found)
        evolution.tell(Trial(number, found, {}, error="ValueError: no"))
    assert evolution.ask() is not None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((2, 3, 0.0), "sample of 3 of 2"), ((2, 0, 0.0), "sample of 0"), ((2, 1, 1.5), "got 1.5")],
)
def test_settings_without_sense_are_refused(sizes: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegularizedEvolution(*sizes)
