"""What every method of multi-trial search promises, as a test case for who writes one.

class TestMine(SearchContract):
    def method(self) -> Method:
        return Mine(...)
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.nn import Linear
from hwnas.trials import Method, Trials, search
from profilers import ParamsProfiler, RangeProfilerFilter
from profilers.space import Architecture


class Conditional(nn.Module):
    """A shared width, an operation within an operation, and a depth: 480 networks."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([2, 4, 6], label="width")
        wide = nn.Sequential(
            Linear(4, width), LayerChoice([nn.ReLU(), nn.Tanh()], label="inner"), Linear(width, 4)
        )
        self.op = LayerChoice({"skip": nn.Identity(), "plain": nn.Linear(4, 4), "wide": wide}, label="op")
        self.deep = Repeat(
            lambda index: LayerChoice([nn.Identity(), nn.Linear(4, 4), nn.Tanh()], label=f"block{index}"),
            (0, 3),
            label="depth",
        )
        self.head = Linear(4, width)

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.deep(self.op(features)))
        return outputs


@functools.cache
def conditional_space() -> ModelSpace:
    return ModelSpace(Conditional())


@functools.cache
def parameters() -> ParamsProfiler:
    return ParamsProfiler(conditional_space())


@functools.cache
def filters() -> tuple[RangeProfilerFilter, ...]:
    """92 of the space's networks."""
    return (RangeProfilerFilter(parameters(), min=20, max=32),)


def worth(architecture: Architecture) -> dict[str, float]:
    """Many wide layers are accurate and slow."""
    layers = {"skip": 0, "plain": 1, "wide": 2}[architecture["op"]] + architecture["depth"]
    tanhs = sum(architecture[f"block{index}"] == 2 for index in range(3))
    return {"accuracy": 0.5 * layers + 0.1 * architecture["width"] + 0.2 * tanhs, "latency": layers + 0.01}


class SearchContract(ABC):
    """A method's promises on a space with conditional choices.

    Attributes:
        seeds_matter: whether another seed makes another search.
    """

    seeds_matter = True

    @abstractmethod
    def method(self) -> Method:
        """The method, with settings that let it learn within 40 trials."""

    def run(self, seed: int = 0, trials: int | None = 40, **more: object) -> Trials:
        return search(
            conditional_space(),
            worth,
            self.method(),
            {"accuracy": "max", "latency": "min"},
            trials=trials,
            filters=filters(),
            seed=seed,
            **more,  # type: ignore[arg-type]  # keywords of search
        )

    def test_every_trial_is_canonical_and_within_the_filters(self) -> None:
        for trial in self.run().trials:
            assert trial.architecture == conditional_space().canonical(trial.architecture)
            assert 20 <= parameters().profile(trial.architecture) <= 32
            assert trial.metrics == worth(trial.architecture)

    def test_no_architecture_is_tried_twice(self) -> None:
        found = [tuple(trial.architecture.values()) for trial in self.run().trials]
        assert len(set(found)) == len(found) == 40

    def test_one_seed_is_one_search(self) -> None:
        assert self.run(seed=1).trials == self.run(seed=1).trials
        assert (self.run(seed=1).trials != self.run(seed=2).trials) == self.seeds_matter

    def test_all_that_there_are_are_tried_when_asked_for(self) -> None:
        within = [a for a in conditional_space().grid() if 20 <= parameters().profile(a) <= 32]
        found = self.run(trials=None)
        assert found.is_exhausted
        assert sorted(map(str, within)) == sorted(str(trial.architecture) for trial in found.trials)

    @pytest.mark.parametrize("kept", [0, 1, 17, 39, 40])
    def test_cut_off_search_goes_on_as_if_it_had_not_been(self, kept: int, tmp_path: Path) -> None:
        whole = self.run(journal=tmp_path / "whole.jsonl")
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[: kept + 1]))
        ended: list[int] = []
        resumed = self.run(journal=tmp_path / "cut.jsonl", report=lambda trial: ended.append(trial.number))
        assert resumed.trials == whole.trials
        assert ended == list(range(kept, 40))

    def test_journal_of_several_workers_is_neither_repeated_nor_lost_by_one(self, tmp_path: Path) -> None:
        path = tmp_path / "trials.jsonl"
        with ThreadPoolExecutor(3) as threads:
            before = self.run(trials=20, executor=threads, workers=3, journal=path)
        after = self.run(trials=None, journal=path)
        assert after.trials[:20] == before.trials
        found = {tuple(trial.architecture.values()) for trial in after.trials}
        assert len(found) == len(after.trials) == 92

    def test_failed_trials_stop_nothing(self) -> None:
        def fails_half_the_time(architecture: Architecture) -> dict[str, float]:
            if architecture["depth"] % 2:
                raise ArithmeticError(f"no depth of {architecture['depth']}")
            return worth(architecture)

        with pytest.warns(UserWarning, match="no depth of"):
            found = search(
                conditional_space(), fails_half_the_time, self.method(), {"accuracy": "max"}, trials=40
            )
        failed = [trial for trial in found.trials if trial.is_failed]
        assert len(found.trials) == 40
        assert all("ArithmeticError: no depth of" in str(trial.error) for trial in failed)
        assert all(trial.architecture["depth"] % 2 == 0 for trial in found.finished)
