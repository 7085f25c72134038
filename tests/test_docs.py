"""What the pages in docs show runs as it is shown."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from hwnas.cli import app

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


def test_there_are_pages_with_code() -> None:
    assert any("```python" in page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = types.ModuleType(f"docs_{page.stem}")  # what is defined in one can be pickled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, code in blocks(page.read_text()):
        # Empty lines in front, so that an error names the line of the page.
        exec(compile("\n" * number + code, str(page), "exec"), vars(module))
    for name, made in inspect.getmembers(module, inspect.isclass):
        if name.startswith("Test"):
            run_tests_of(made, tmp_path / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    for words in commands(page.read_text()):
        command = get_command(app)
        while hasattr(command, "commands"):  # a group of them
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)  # reads the words and runs nothing


def commands(text: str) -> list[list[str]]:
    """The words after ``hwnas`` in each line of a sh block that begins with it."""
    found = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in found for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["hwnas"]]


def test_commands_are_found_and_a_wrong_one_is_not_taken() -> None:
    assert commands("```sh\nhwnas table show x.json  # see\nls\n```\n") == [["table", "show", "x.json"]]
    show = get_command(app).commands["table"].commands["show"]
    with pytest.raises(Exception, match="No such option: --nonsense"):
        show.make_context("show", ["x.json", "--nonsense"])


def blocks(text: str) -> list[tuple[int, str]]:
    """Each python block with the number of lines in front of it."""
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run_tests_of(case: type, folder: Path) -> None:
    """A contract's tests, those that need no fixture but ``tmp_path``."""
    tests = {name: test for name, test in inspect.getmembers(case) if name.startswith("test_")}
    given = {name: [*inspect.signature(test).parameters][1:] for name, test in tests.items()}
    alone = [name for name, parameters in given.items() if parameters in ([], ["tmp_path"])]
    assert alone, f"{case.__name__} tests nothing"
    for name in alone:
        (folder / name).mkdir(parents=True)
        getattr(case(), name)(*[folder / name] * len(given[name]))


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```\nno\n```\n```python\ny = 2\n```\n"
    assert blocks(text) == [(2, "x = 1\n"), (8, "y = 2\n")]
