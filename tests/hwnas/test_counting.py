from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections import Counter as Tally
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hwnas.counting import Counter, Factor


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, int], list[Factor]]:
    """Up to five labels and four factors of small whole numbers over some of them."""
    sizes = {label: draw(st.integers(1, 3)) for label in "abcde"[: draw(st.integers(1, 5))]}
    factors = []
    for _ in range(draw(st.integers(0, 4))):
        labels = tuple(draw(st.permutations(list(sizes)))[: draw(st.integers(1, 3))])
        shape = tuple(sizes[label] for label in labels)
        cells = draw(st.lists(st.integers(0, 3), min_size=math.prod(shape), max_size=math.prod(shape)))
        factors.append(Factor(labels, np.array(cells, dtype=object).reshape(shape)))
    return sizes, factors


def weights(sizes: Mapping[str, int], factors: list[Factor]) -> dict[tuple[int, ...], int]:
    """Reference: the product of all factors at each assignment."""
    found = {}
    for indices in itertools.product(*map(range, sizes.values())):
        at = dict(zip(sizes, indices, strict=True))
        found[indices] = math.prod(
            int(factor.values[tuple(at[label] for label in factor.labels)]) for factor in factors
        )
    return found


@given(problems())
@settings(deadline=None)
def test_count_equals_brute_force(problem: tuple[dict[str, int], list[Factor]]) -> None:
    assert Counter(*problem).total == sum(weights(*problem).values())


@given(problems(), st.integers(0, 2**32))
@settings(deadline=None)
def test_what_counts_as_zero_is_never_drawn(problem: tuple[dict[str, int], list[Factor]], seed: int) -> None:
    counter = Counter(*problem)
    if counter.total:
        drawn = counter.draw(random.Random(seed))
        assert weights(*problem)[tuple(drawn[label] for label in problem[0])] > 0


def test_draws_are_uniform_over_what_counts() -> None:
    sizes = {"a": 2, "b": 3, "c": 3, "free": 2}
    generator = np.random.default_rng(0)
    factors = [
        Factor(labels, generator.integers(0, 2, [sizes[label] for label in labels]).astype(object))
        for labels in (("b", "a"), ("c", "b"))
    ]
    counter, source = Counter(sizes, factors), random.Random(0)
    draws = [counter.draw(source) for _ in range(4000)]
    tally = Tally(tuple(drawn[label] for label in sizes) for drawn in draws)
    allowed = [indices for indices, weight in weights(sizes, factors).items() if weight]
    assert len(allowed) == counter.total
    assert set(tally) <= set(allowed)
    assert chisquare([tally[indices] for indices in allowed]).pvalue > 1e-3


def test_counts_beyond_64_bits_are_exact() -> None:
    assert Counter({str(index): 7 for index in range(40)}, []).total == 7**40
    unequal = 1 - np.eye(7, dtype=int).astype(object)
    chain = [Factor((str(i), str(i + 1)), unequal) for i in range(39)]
    assert Counter({str(index): 7 for index in range(40)}, chain).total == 7 * 6**39


def test_draws_far_beyond_64_bits_reach_both_halves() -> None:
    counter = Counter({"a": 2}, [Factor(("a",), np.array([10**40, 10**40], dtype=object))])
    source = random.Random(0)
    assert {counter.draw(source)["a"] for _ in range(40)} == {0, 1}


def test_entangled_factors_are_refused_by_name() -> None:
    sizes = {f"c{index}": 10 for index in range(7)}
    together = Factor(tuple(sizes), np.broadcast_to(np.array(1, dtype=object), (10,) * 7))
    with pytest.raises(ValueError, match=r"\['c0', .*'c6'\] depend .* 10000000 cells; at most 4000000 .*Use"):
        Counter(sizes, [together])


def test_draws_do_not_depend_on_the_order_of_sets() -> None:
    program = """
import torch
from tests.contracts.search import conditional_space
generator = torch.Generator().manual_seed(0)
print([list(conditional_space().random(generator).values()) for _ in range(5)])
"""
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
