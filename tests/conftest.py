"""One thread for every test: five times faster here than two, and repeatable."""

import pytest
import torch

# Subclassed by test modules: a failed assertion there says what the values were.
pytest.register_assert_rewrite("tests.contracts")

torch.set_num_threads(1)
