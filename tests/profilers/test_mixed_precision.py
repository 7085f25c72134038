from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from lookup_tables import Calibration, LookupTable, SessionSettings
from profilers.latency import LatencyProfiler
from profilers.mixed_precision import MixedPrecisionProfiler
from profilers.profile import distinct_parts
from profilers.program import minimise
from tests.profilers.conftest import FakeSpace
from tests.profilers.test_latency import EXAMPLE, TestContract

BORDER_US = 5.0


class TwoPrecisions(FakeSpace):
    """The fake space, with a precision for its two layers."""

    options = {**FakeSpace.options, "first": ("fp32", "int8"), "second": ("fp32", "int8")}


PRECISION = {"layer1": "first", "layer2": "second"}


@pytest.fixture
def space() -> TwoPrecisions:
    return TwoPrecisions()


@pytest.fixture
def tables(space: TwoPrecisions) -> dict[str, LookupTable]:
    """In INT8 the 3x3 convolutions take half as long, all others twenty times as long."""
    fp32 = TestContract()._table(space, (EXAMPLE,))
    entries = {
        key: dataclasses.replace(entry, p10_us=entry.p10_us * (0.5 if "k=3" in entry.name else 20.0))
        for key, entry in fp32.entries.items()
    }
    int8 = dataclasses.replace(
        fp32,
        entries=entries,
        settings=SessionSettings(precision="int8"),
        calibration=Calibration(scale=1.1, per_site_us=0.5, constant_us=3.0),
    )
    return {"fp32": fp32, "int8": int8}


def profiler(space: Any, tables: dict[str, LookupTable], **given: Any) -> MixedPrecisionProfiler:
    usual = {"precision": PRECISION, "border_us": BORDER_US}
    return MixedPrecisionProfiler(space, EXAMPLE, tables, **{**usual, **given})


def test_cost_is_the_sum_of_each_sites_entry_in_its_own_precision(
    space: TwoPrecisions, tables: dict[str, LookupTable]
) -> None:
    found = profiler(space, tables)
    for architecture in space.every_architecture():
        expected = 0.0
        for site in space.sites(EXAMPLE):
            part = site.part(architecture)
            if part is not None and not part.is_free:
                table = tables[architecture[PRECISION[site.name]] if site.name in PRECISION else "fp32"]
                calibration = table.calibration
                expected += calibration.scale * table.entries[part.key].p10_us + calibration.per_site_us
        skips = architecture["op"] == "skip"
        inside = [] if skips else [architecture["first"], architecture["second"]][: architecture["depth"]]
        chain = ["fp32", *inside, "fp32"]
        expected += BORDER_US * sum(one != other for one, other in itertools.pairwise(chain))
        expected += tables["fp32"].calibration.constant_us  # stem and head always run
        assert found.profile(architecture) == pytest.approx(expected / 1e3, rel=1e-12)


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_one_precision_everywhere_costs_what_its_table_says(
    space: TwoPrecisions, tables: dict[str, LookupTable], name: str
) -> None:
    whole = {site.name: "first" for site in space.sites(EXAMPLE)}
    found = profiler(space, tables, precision=whole)
    alone = LatencyProfiler(space, EXAMPLE, tables[name])
    for architecture in space.every_architecture():
        if architecture["first"] == name:
            assert found.profile(architecture) == pytest.approx(alone.profile(architecture), rel=1e-12)


def test_program_chooses_precision_with_the_operator(
    space: TwoPrecisions, tables: dict[str, LookupTable]
) -> None:
    """A 3x3 convolution wants INT8, a 1x1 convolution fp32, and a border may cost more than it brings."""
    cost = profiler(space, tables, border_us=0.0).cost
    dear = profiler(space, tables, border_us=1e3).cost
    for wanted, chosen in (("conv3", "int8"), ("conv1", "fp32")):
        excluded = [{"op": other} for other in ("conv3", "conv1", "skip") if other != wanted]
        excluded.append({"depth": 1})
        found = minimise(cost, excluded=excluded)
        assert found is not None
        assert (found["op"], found["first"], found["second"]) == (wanted, chosen, chosen)
        kept = minimise(dear, excluded=excluded)
        assert kept is not None
        assert (kept["first"], kept["second"]) == ("fp32", "fp32")


def test_modules_that_may_all_be_skipped_in_a_row_have_their_limit(
    space: TwoPrecisions, tables: dict[str, LookupTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profilers.mixed_precision._LARGEST", 20)
    with pytest.raises(ValueError, match=r"depends on 4 choices .*24 combinations, at most 20"):
        profiler(space, tables)


def test_expected_cost_leads_a_gradient_to_the_precision(
    space: TwoPrecisions, tables: dict[str, LookupTable]
) -> None:
    cost = profiler(space, tables, border_us=0.0).cost
    rows = {label: torch.full((len(found),), 1 / len(found)) for label, found in space.options.items()}
    rows["op"] = torch.tensor([1.0, 0.0, 0.0])  # 3x3: faster in INT8
    rows["first"] = torch.tensor([0.5, 0.5], requires_grad=True)
    cost.expected(rows).backward()
    gradient = rows["first"].grad
    assert gradient is not None
    assert gradient[1] < gradient[0]


def test_tables_that_do_not_go_together_are_refused(
    space: TwoPrecisions, tables: dict[str, LookupTable]
) -> None:
    with pytest.raises(ValueError, match="needed for each precision; missing: int8"):
        profiler(space, {"fp32": tables["fp32"]})
    with pytest.raises(ValueError, match="given as 'int8' was measured in fp32"):
        profiler(space, {"fp32": tables["fp32"], "int8": tables["fp32"]})
    two = dataclasses.replace(tables["int8"], settings=SessionSettings(2, precision="int8"))
    with pytest.raises(ValueError, match="measured alike but for the precision"):
        profiler(space, {**tables, "int8": two})
    with pytest.raises(ValueError, match="in which nothing runs: nowhere"):
        profiler(space, tables, precision={"nowhere": "first"})
    with pytest.raises(ValueError, match="at least 0, got -1"):
        profiler(space, tables, border_us=-1)


def test_missing_entries_are_named(space: TwoPrecisions, tables: dict[str, LookupTable]) -> None:
    key = next(iter(distinct_parts(space, space.sites(EXAMPLE))))
    entries = {other: entry for other, entry in tables["int8"].entries.items() if other != key}
    with pytest.raises(ValueError, match="no latency of 1 of"):
        profiler(space, {**tables, "int8": dataclasses.replace(tables["int8"], entries=entries)})
