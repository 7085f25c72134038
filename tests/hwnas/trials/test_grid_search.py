from __future__ import annotations

from itertools import islice

from hwnas.trials import GridSearch, Method, search
from tests.contracts.search import SearchContract, conditional_space, worth


class TestGridSearch(SearchContract):
    seeds_matter = False

    def method(self) -> Method:
        return GridSearch()


def test_grid_is_that_of_the_space() -> None:
    space = conditional_space()
    found = search(space, worth, GridSearch(), {"accuracy": "max"}, trials=50)
    assert [trial.architecture for trial in found.trials] == list(islice(space.grid(), 50))
    assert not found.is_exhausted
