"""What the README shows runs as it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_python_examples_of_the_readme_run_and_keep_to_their_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for code in blocks:  # each goes on from those before it
        exec(compile(code, "README.md", "exec"), names)
    assert macs_of_best(names) <= names["budget"]
    macs, subnet = names["macs"], names["subnet"]
    assert macs.profile(names["strategy"].architecture()) <= names["budget"]
    assert type(subnet) is names["Net"]


def macs_of_best(names):
    return names["macs"].profile(names["found"].best.architecture)


def test_the_tour_is_the_example():
    example = README.parent / "examples" / "latency_constrained_search.py"
    blocks = re.findall(r"```py\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    assert all(block in example.read_text() for block in blocks)


def test_commands_of_the_readme_exist():
    from typer.testing import CliRunner

    from hwnas.cli import app

    for command in (
        *("search", "table build", "table show", "table validate", "table diff", "table bundle"),
        *("table import", "profile", "export", "verify", "spaces check", "nnmeter build", "nnmeter import"),
    ):
        result = CliRunner().invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, command
