"""A run's folder goes on with the same settings, refuses others, and never holds half a file."""

from __future__ import annotations

import csv
import json
import os
from types import SimpleNamespace

import pytest
import torch

from hwnas.run_folder import MetricsFile, RunFolder, read_json, write_json


def test_same_settings_go_on_with_what_was_reached(tmp_path):
    RunFolder(tmp_path / "run", {"seed": 0, "span": (1, 2)}).update(budget_ms=0.5)
    again = RunFolder(tmp_path / "run", {"seed": 0, "span": (1, 2)})
    assert again["budget_ms"] == 0.5
    assert again.get("architecture") is None


def test_other_settings_are_refused_with_both_values_once_something_was_reached(tmp_path):
    RunFolder(tmp_path, {"seed": 0, "data": "digits"}).update(budget_ms=0.5)
    with pytest.raises(ValueError, match=r"\(seed: 0 there, 1 asked\).*another --out"):
        RunFolder(tmp_path, {"seed": 1, "data": "digits"})
    assert RunFolder(tmp_path, {"seed": 0, "data": "digits"})["budget_ms"] == 0.5


def test_other_settings_replace_those_of_a_run_that_reached_nothing(tmp_path):
    RunFolder(tmp_path, {"seed": 0})
    RunFolder(tmp_path, {"seed": 1}).update(budget_ms=0.5)
    assert RunFolder(tmp_path, {"seed": 1})["budget_ms"] == 0.5


@pytest.mark.parametrize("content", [b'{"settings": {"se', b"[1]", b"\xff\xfe", b""])
def test_damaged_state_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json' is no run file"):
        RunFolder(tmp_path, {"seed": 0})


def test_absent_file_is_named_with_its_kind(tmp_path):
    with pytest.raises(ValueError, match=r"no architecture file at .*absent.json"):
        read_json(tmp_path / "absent.json", "architecture")


def test_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def logged(path, step, epoch, **metrics):
    trainer = SimpleNamespace(
        is_global_zero=True,
        current_epoch=epoch,
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
    )
    MetricsFile(path, step).on_train_epoch_end(trainer, None)


def test_resumed_fit_replaces_its_rows_and_leaves_those_of_others(tmp_path):
    path = tmp_path / "metrics.csv"
    for epoch in range(3):
        logged(path, "search", epoch, loss=1.0)
    logged(path, "train", 0, loss=2.0, accuracy=0.5)
    logged(path, "search", 1, loss=3.0)
    with path.open(newline="") as file:
        rows = [(row["step"], row["epoch"], row["loss"], row["accuracy"]) for row in csv.DictReader(file)]
    assert rows == [
        ("search", "0", "1.0", ""),
        ("train", "0", "2.0", "0.5"),
        ("search", "1", "3.0", ""),
    ]
