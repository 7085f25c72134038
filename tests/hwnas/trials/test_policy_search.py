from __future__ import annotations

import pytest
import torch
from torch import nn

from hwnas import LayerChoice, ModelSpace
from hwnas.trials import Method, PolicySearch, RandomSearch, search
from profilers.space import Architecture
from tests.contracts.search import SearchContract


class TestPolicySearch(SearchContract):
    def method(self) -> Method:
        return PolicySearch(episodes_per_update=4)


def agreements(architecture: Architecture) -> dict[str, float]:
    """How many of eight choices are what they should be."""
    return {"score": sum(architecture[f"op{i}"] == i % 4 for i in range(8))}


def eight_choices() -> ModelSpace:
    layers = [LayerChoice([nn.Identity() for _ in range(4)], label=f"op{i}") for i in range(8)]
    return ModelSpace(nn.Sequential(*layers))


def test_policy_finds_more_than_random_draws() -> None:
    space = eight_choices()
    best: dict[str, list[float]] = {"policy": [], "random": []}
    for seed in range(3):
        for name, method in {"policy": PolicySearch(), "random": RandomSearch()}.items():
            found = search(space, agreements, method, {"score": "max"}, trials=150, seed=seed)
            best[name].append(found.best.metrics["score"])
    assert sum(best["policy"]) >= sum(best["random"]) + 3  # one more of eight, on average


def test_failed_trials_are_rewarded_as_the_worst() -> None:
    space = eight_choices()

    def evaluate(architecture: Architecture) -> dict[str, float]:
        if architecture["op0"] == 0:
            raise RuntimeError("out of memory")
        return {"score": float(torch.rand(()))}

    with pytest.warns(UserWarning, match="out of memory"):
        found = search(space, evaluate, PolicySearch(), {"score": "max"}, trials=200)
    failed = [trial.is_failed for trial in found.trials]
    assert sum(failed[-50:]) < 0.7 * sum(failed[:50]) + 1


def test_empty_updates_are_refused() -> None:
    with pytest.raises(ValueError, match="episodes_per_update must be at least 1; got 0"):
        PolicySearch(episodes_per_update=0)
