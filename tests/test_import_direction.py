"""The arrows between the packages: hwnas -> profilers -> lookup_tables, never back."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {"hwnas": {"profilers", "lookup_tables"}, "profilers": {"lookup_tables"}, "lookup_tables": set()}
FORBIDDEN = {"torchvision", "nni"}
# Seconds to import and seldom needed; nn_meter also writes into the home folder when it is imported.
LATE = {"nn_meter", "onnxscript", "sklearn", "tensorboard"}


def imported(source: str, package: str = "") -> Iterator[str]:
    """Top-level names of every import in ``source``, also those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "import_module",
            "importlib.import_module",
            "__import__",
        }:
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield name.split(".")[0]


def wrong_arrows(source: str, package: str) -> set[str]:
    return set(imported(source, package)) & ((BELOW.keys() - BELOW[package] - {package}) | FORBIDDEN)


@pytest.mark.parametrize(
    ("path", "package"),
    [(path, name) for name in BELOW for path in sorted((ROOT / name).rglob("*.py"))],
    ids=str,
)
def test_module_imports_only_what_stands_below_it(path: Path, package: str) -> None:
    assert wrong_arrows(path.read_text(), package) == set()


@pytest.mark.parametrize(
    ("source", "package", "wrong"),
    [
        ("import hwnas.space", "profilers", {"hwnas"}),
        ("def f():\n    from profilers import Cost", "lookup_tables", {"profilers"}),
        ("import importlib\nimportlib.import_module('hwnas.nn')", "lookup_tables", {"hwnas"}),
        ("try:\n    import torchvision\nexcept ImportError: pass", "hwnas", {"torchvision"}),
        ("from nni.nas import nn", "hwnas", {"nni"}),
        ("from lookup_tables import Table\nfrom . import space", "profilers", set()),
    ],
)
def test_wrong_arrow_is_seen_wherever_it_hides(source: str, package: str, wrong: set[str]) -> None:
    assert wrong_arrows(source, package) == wrong


@pytest.mark.parametrize("package", BELOW)
def test_import_leaves_what_is_slow_for_later(package: str) -> None:
    program = f"import sys, {package}; print(*sorted({LATE} & sys.modules.keys()))"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
