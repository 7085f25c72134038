from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hwnas.strategies.tiny import EVERY, assert_equal

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What both ranks of each strategy's search ended with."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "tests.hwnas.strategies.ddp_run", str(folder), *EVERY]
    # A search that hangs is killed here.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=400,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)]
        for name in EVERY
    }


@pytest.mark.parametrize("name", EVERY)
def test_ranks_end_with_one_policy_one_answer_and_equal_weights(
    name: str, runs: dict[str, list[Any]]
) -> None:
    first, second = runs[name]
    assert first["answer"] == second["answer"]
    assert_equal(second["policy"], first["policy"])
    assert_equal(second["weights"], first["weights"])
    assert second["metrics"]["supernet_val_loss"] == first["metrics"]["supernet_val_loss"]


@pytest.mark.parametrize("name", ["random-one-shot", "proxyless-two"])
def test_ranks_train_paths_of_their_own(name: str, runs: dict[str, list[Any]]) -> None:
    first, second = runs[name]
    assert len(first["paths"]) == len(second["paths"]) == 4
    assert first["paths"] != second["paths"]


@pytest.mark.parametrize("name", ["fairnas", "sandwich"])
def test_ranks_train_the_same_paths_where_several_share_a_step(name: str, runs: dict[str, list[Any]]) -> None:
    first, second = runs[name]
    assert first["paths"] == second["paths"]
