from __future__ import annotations

from hwnas.trials import Method, RandomSearch
from tests.contracts.search import SearchContract


class TestRandomSearch(SearchContract):
    def method(self) -> Method:
        return RandomSearch()
