from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from hwnas import LayerChoice, ModelSpace
from hwnas.trials import RandomSearch, RegularizedEvolution, Trials, search
from profilers import RangeProfilerFilter
from tests.contracts.search import conditional_space, parameters, worth

EVOLUTION = RegularizedEvolution(4, 2)


def run(path: Path, **changes: object) -> Trials:
    given: dict[str, object] = {
        "space": conditional_space(),
        "evaluate": worth,
        "method": EVOLUTION,
        "objectives": {"accuracy": "max"},
        "trials": 10,
        "filters": [RangeProfilerFilter(parameters(), max=60)],
        "journal": path,
    }
    return search(**{**given, **changes})  # type: ignore[arg-type]


def test_every_finished_trial_is_a_line_before_the_next_one_begins(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trials.jsonl"
    lines: list[int] = []

    def counts(architecture: dict[str, object]) -> dict[str, float]:
        lines.append(path.read_bytes().count(b"\n"))
        return worth(architecture)

    run(path, evaluate=counts)
    assert lines == list(range(1, 11))


def test_last_line_that_was_cut_off_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    whole = run(path)
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    ended: list[int] = []
    assert run(path, report=lambda trial: ended.append(trial.number)).trials == whole.trials
    assert ended == [9]
    ended.clear()
    assert run(path, report=lambda trial: ended.append(trial.number)).trials == whole.trials
    assert ended == []
    path.write_bytes(content[:20])  # not even the first line is whole
    assert run(path).trials == whole.trials


def test_more_trials_make_a_search_longer_and_fewer_are_its_beginning(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl", trials=20)
    run(tmp_path / "parts.jsonl", trials=8)
    assert run(tmp_path / "parts.jsonl", trials=20).trials == whole.trials
    assert run(tmp_path / "whole.jsonl", trials=5).trials == whole.trials[:5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"method": RandomSearch()}, 'method: "RegularizedEvolution" there, "RandomSearch" here'),
        ({"method": RegularizedEvolution(5, 2)}, "population_size: 4 there, 5 here"),
        ({"objectives": {"latency": "min"}}, "objectives: .*accuracy.* there, .*latency.* here"),
        ({"filters": []}, r"filters: .* there, \[\] here"),
        ({"costs": {"parameters": parameters}}, r"costs: \{\} there, .*parameter "),
        ({"space": ModelSpace(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="op")))}, "space: "),
    ],
)
def test_journal_of_another_search_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "trials.jsonl"
    run(path, trials=2)
    before = path.read_bytes()
    if "costs" in changes:
        changes = {"costs": {"parameters": parameters()}}
    if "space" in changes:
        changes = {**changes, "filters": []}
    with pytest.raises(ValueError, match=rf"is the journal of another search \(.*{message}"):
        run(path, **changes)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"notes\n", b"notes", b'{"schema": "other"}\n', b"[]\n"])
def test_file_that_is_no_journal_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no journal of trials|journal of another search"):
        run(path)
    assert path.read_bytes() == content


def test_folder_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: name a file in it, such as .*trials.jsonl"):
        run(tmp_path)
