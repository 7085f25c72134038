from __future__ import annotations

import itertools
import re

import pytest
import torch

from hwnas.spaces import NASBench201
from hwnas.spaces.nas_bench_201 import EDGES, OPERATIONS
from profilers import count_macs
from tests.contracts.space import SpaceContract

CONVOLUTIONS = (
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
)


class TestNASBench201(SpaceContract):
    space = NASBench201


def test_any_cell_names_a_network_and_comes_back() -> None:
    for names in itertools.islice(itertools.product(OPERATIONS, repeat=6), 0, None, 97):
        architecture = {f"{i}-{j}": name for (i, j), name in zip(EDGES, names, strict=True)}
        assert NASBench201.architecture_of(NASBench201.cell_of(architecture)) == architecture
    network = NASBench201.from_published(CONVOLUTIONS, num_classes=100)
    # With 10 classes: 7,783,040 + 6 * 35,389,440 MACs, 73,306 + 6 * 243,040 parameters.
    assert count_macs(network, [torch.empty(1, 3, 32, 32)]).headline == 220_119_680 + 90 * 64
    assert sum(p.numel() for p in network.parameters()) == 1_531_546 + 90 * 65


@pytest.mark.parametrize(
    "cell", ["|none~0|", CONVOLUTIONS[:-1], CONVOLUTIONS.replace("3x3~2", "5x5~2"), "|~|"]
)
def test_what_is_no_cell_is_refused(cell: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {cell!r}")):
        NASBench201.from_published(cell)
