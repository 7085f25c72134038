"""What the distribution promises: three typed packages, pinned, with the licence it names."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}
EXTRAS = PROJECT["project"]["optional-dependencies"]
# Others cannot stand beside the versions that are tested, or are compared with where they happen to be.
(TESTED,) = re.findall(r'-e "\.\[([\w,-]+)\]"', (ROOT / "Makefile").read_text())
REQUIREMENTS = [
    Requirement(text)
    for texts in (PROJECT["project"]["dependencies"], *(EXTRAS[name] for name in TESTED.split(",")))
    for text in texts
]


@pytest.mark.parametrize("package", PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
def test_installed_package_is_importable_anywhere_and_typed(package: str, tmp_path: Path) -> None:
    program = f"import pathlib, {package}; print(pathlib.Path({package}.__file__).parent)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (Path(found.stdout.strip()) / "py.typed").is_file()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_constraint_pins_a_version_that_the_project_allows(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_pins_are_whole() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(PINS)


def test_pins_carry_no_local_version() -> None:
    assert [name for name, version in PINS.items() if "+" in version] == []


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_installed_version_is_the_pinned_one(requirement: Requirement) -> None:
    installed = distribution(requirement.name).version.split("+")[0]
    assert installed == PINS[canonicalize_name(requirement.name)]


def test_every_link_of_the_distribution_has_its_file() -> None:
    named = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    assert [name for name in named if not (ROOT / name).is_file()] == []
