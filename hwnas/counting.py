"""Exact numbers of networks, and exactly uniform draws of them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

_LARGEST_PRODUCT = 4_000_000


@dataclass(frozen=True)
class Factor:
    """Which joint options count: integers, one axis a label. The count is the product of all factors."""

    labels: tuple[str, ...]
    values: NDArray[np.object_]


@final
class Counter:
    """Counts and draws assignments by variable elimination, in whole numbers of any size.

    Args:
        sizes: each label with its number of options.
        factors: labels without a factor are free.

    Raises:
        ValueError: the factors are so entangled that a table of over four million cells would be needed.
    """

    def __init__(self, sizes: Mapping[str, int], factors: Sequence[Factor]) -> None:
        self._sizes = dict(sizes)
        entangled = {label for factor in factors for label in factor.labels}
        self._free = [label for label in sizes if label not in entangled]
        self._steps: list[tuple[str, Factor]] = []
        remaining = list(factors)
        total = 1
        while entangled:
            # Ties by name: a set has another order in each process, and with it the draws would differ.
            label = min(sorted(entangled), key=lambda name: self._width(name, remaining))
            entangled.remove(label)
            touching = [factor for factor in remaining if label in factor.labels]
            remaining = [factor for factor in remaining if label not in factor.labels]
            product = self._product(touching)
            self._steps.append((label, product))
            axis = product.labels.index(label)
            left = tuple(name for name in product.labels if name != label)
            summed = product.values.sum(axis=axis)
            if left:
                remaining.append(Factor(left, summed))
            else:
                total *= int(summed)
        self.total: int = total * math.prod(self._sizes[label] for label in self._free)

    def draw(self, source: random.Random) -> dict[str, int]:
        """One of the ``total`` assignments, each equally likely: option indices."""
        drawn = {label: source.randrange(self._sizes[label]) for label in self._free}
        for label, factor in reversed(self._steps):
            at = tuple(slice(None) if name == label else drawn[name] for name in factor.labels)
            weights = [int(weight) for weight in factor.values[at]]
            point = source.randrange(sum(weights))
            for index, weight in enumerate(weights):
                point -= weight
                if point < 0:
                    drawn[label] = index
                    break
        return drawn

    def _width(self, label: str, factors: Sequence[Factor]) -> int:
        near = {name for factor in factors if label in factor.labels for name in factor.labels}
        return math.prod(self._sizes[name] for name in near)

    def _product(self, factors: Sequence[Factor]) -> Factor:
        labels = tuple(dict.fromkeys(name for factor in factors for name in factor.labels))
        shape = tuple(self._sizes[name] for name in labels)
        if math.prod(shape) > _LARGEST_PRODUCT:
            raise ValueError(
                f"the choices {sorted(labels)} depend on one another so closely that counting them needs "
                f"a table of {math.prod(shape)} cells; at most {_LARGEST_PRODUCT} are made. Use fewer "
                "shared labels across branches"
            )
        product = np.full(shape, 1, dtype=object)
        for factor in factors:
            order = [factor.labels.index(name) for name in labels if name in factor.labels]
            spread = tuple(self._sizes[name] if name in factor.labels else 1 for name in labels)
            product = product * factor.values.transpose(order).reshape(spread)
        return Factor(labels, product)
