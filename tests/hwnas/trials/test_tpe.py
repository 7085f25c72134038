from __future__ import annotations

import subprocess
import sys

import pytest

from hwnas.trials import TPE, Method
from tests.contracts.search import SearchContract


class TestTPE(SearchContract):
    def method(self) -> Method:
        return TPE(startup=8)


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 24"):
        TPE(startup=0)


def test_missing_optuna_is_an_error_that_names_the_extra() -> None:
    program = """
import sys
sys.modules["optuna"] = None  # as if it were not installed
from hwnas.trials import TPE, search
from tests.contracts.search import conditional_space, worth
try:
    search(conditional_space(), worth, TPE(), {"accuracy": "max"}, trials=1)
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'hwnas[optuna]'" in found.stdout
