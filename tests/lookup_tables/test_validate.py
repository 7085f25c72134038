"""A table is held to networks that are measured anew, and to other tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from lookup_tables.sources import SubnetSource
from lookup_tables.table import LookupTable, MissingEntryError
from lookup_tables.validate import Validation, difference, held_out, validate_table
from tests.lookup_tables.test_build import Machine, built, named_models, nets

__all__ = ["named_models"]  # a fixture


@pytest.fixture
def table(tmp_path: Path) -> LookupTable:
    found = built(tmp_path / "table.json", Machine())
    return replace(
        found, accuracy=replace(found.accuracy, interval_low=-0.1, interval_high=0.1, coverage=0.9)
    )


def test_validation_measures_networks_anew(table: LookupTable) -> None:
    same = validate_table(table, nets(5), measurer=Machine())
    assert same.accuracy.mape_percent < 0.01
    assert (same.inside, same.coverage, same.covers, same.is_quiet) == (5, 0.9, True, True)
    slower = validate_table(table, nets(5), measurer=Machine(bias=1.25))
    assert slower.accuracy.mape_percent == pytest.approx(20, abs=0.01)
    assert (slower.inside, slower.covers) == (0, False)
    assert slower.measured_us == pytest.approx([1.25 * us for us in same.measured_us])


def test_validation_needs_networks_of_the_table(table: LookupTable) -> None:
    with pytest.raises(ValueError, match="at least one subnet"):
        validate_table(table, [], measurer=Machine())
    strange = SubnetSource("strange", nn.ReLU(), nets(1)[0].inputs, ("unknown",))
    with pytest.raises(MissingEntryError, match="unknown"):
        validate_table(table, [strange], measurer=Machine())


@pytest.mark.parametrize(("inside", "covers"), [(60, True), (54, True), (53, False), (0, False)])
def test_interval_is_doubted_where_so_few_inside_are_no_chance(
    table: LookupTable, inside: int, covers: bool
) -> None:
    """Of 60 at 95 %, 53 or fewer come in 3.5 % of cases, 54 or fewer in 8 %."""
    found = Validation((1.0,) * 60, (1.0,) * 60, table.accuracy, inside, 0.95, "thread_cpu")
    assert found.covers is covers


def test_restless_machine_is_told_by_its_floor(table: LookupTable) -> None:
    restless = replace(table.accuracy, noise_floor_percent=4.0)
    assert not Validation((1.0,), (1.0,), restless, 1, 0.9, "thread_cpu").is_quiet
    assert Validation((1.0,), (1.0,), restless, 1, 0.9, "wall").is_quiet


def test_networks_of_a_table_are_predicted_by_the_others(table: LookupTable) -> None:
    predicted, measured = held_out(table)
    assert predicted == pytest.approx(measured, rel=1e-3)
    odd = replace(table.subnets[3], p10_us=500.0, repeat_us=500.0)
    others = [net for net in table.subnets if net is not table.subnets[3]]
    predicted, measured = held_out(replace(table, subnets=(odd, *others)))
    assert measured[0] == 500
    assert predicted[0] < 200


def test_difference_of_a_table_from_itself_is_none(table: LookupTable) -> None:
    same = difference(table, table)
    assert (same.facts, same.only_first, same.only_second) == ((), 0, 0)
    assert set(same.ratios.values()) == {1.0}


def test_difference_says_what_changed_and_by_how_much(table: LookupTable, tmp_path: Path) -> None:
    slower = built(tmp_path / "slower.json", Machine(bias=2.0))
    entries = {key: entry for key, entry in slower.entries.items() if key != "relu"}
    entries["conv"] = replace(entries["conv"], p10_us=table.entries["conv"].p10_us * 3)
    other = replace(slower, entries=entries, device=replace(slower.device, cpu="another CPU"), space="other")
    found = difference(table, other)
    assert list(found.ratios.items()) == [("linear", pytest.approx(2.0)), ("conv", pytest.approx(3.0))]
    assert (found.only_first, found.only_second) == (1, 0)
    assert [fact.split(":")[0] for fact in found.facts] == ["CPU", "space"]
