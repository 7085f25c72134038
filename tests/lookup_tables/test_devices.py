"""The tables that ship with the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lookup_tables
from hwnas.loading import load_space
from lookup_tables import LookupTable
from lookup_tables.measure import LARGEST_FLOOR_PERCENT
from profilers import distinct_parts

SHIPPED = sorted((Path(lookup_tables.__file__).parent / "devices").glob("*.json"))


def test_there_are_some() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_table_is_valid_and_covers_its_space(path: Path) -> None:
    table = LookupTable.load(path)
    assert path.stem.startswith(table.space.replace(":", "-"))
    assert table.doubt() is None
    assert table.accuracy.noise_floor_percent <= LARGEST_FLOOR_PERCENT[table.settings.clock]
    space = load_space(table.space, 10, 1)
    parts = distinct_parts(space, space.sites(torch.zeros(1, 1, 28, 28)))
    table.require({key: part.name for key, part in parts.items()})
