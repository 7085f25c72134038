from __future__ import annotations

import pytest

from hwnas.trials import NSGA2, Method
from tests.contracts.search import SearchContract


class TestNSGA2(SearchContract):
    def method(self) -> Method:
        return NSGA2(population_size=8)


@pytest.mark.parametrize(("settings", "message"), [((1, 0.5), "at least 2, got 1"), ((4, -0.1), "got -0.1")])
def test_settings_without_sense_are_refused(settings: tuple[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSGA2(*settings)
