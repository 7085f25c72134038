from __future__ import annotations

import pytest
import torch

from hwnas import ModelSpace
from hwnas.spaces import ENASMacro
from hwnas.spaces.enas_macro import OPERATIONS
from profilers import FlopsProfiler, count_macs
from profilers.space import Architecture
from tests.contracts.space import SpaceContract


class TestENASMacro(SpaceContract):
    space = ENASMacro


def test_numbers_are_operations_and_switches() -> None:
    architecture = ENASMacro.architecture_of("1 4 0 0 1 1")
    assert architecture == {
        "layer0.op": "sep_conv_3x3",
        "layer1.op": "avg_pool_3x3",
        "layer1.skip0": False,
        "layer2.op": "conv_3x3",
        "layer2.skip0": True,
        "layer2.skip1": True,
    }
    ModelSpace(ENASMacro(channels=4, layers=3)).validate(architecture)


@pytest.mark.parametrize("numbers", ["6", "0 1", "0 1 2", "0 1 0 3"])
def test_numbers_that_are_no_network_are_refused(numbers: str) -> None:
    with pytest.raises(ValueError, match="is the number of an operation"):
        ENASMacro.architecture_of(numbers)


def test_what_is_derived_doubles_its_width_and_is_counted_too() -> None:
    space = ModelSpace(ENASMacro(channels=4, layers=6, derived=True))
    images = torch.randn(1, 3, 16, 16)
    architecture = space.random(torch.Generator().manual_seed(0))
    subnet = space.freeze(architecture)
    assert subnet.classifier.in_features == 16
    assert FlopsProfiler(space, images).profile(architecture) == count_macs(subnet, [images]).headline


def counted(rows: list[list[int]], channels: int, side: int, keeps_all: bool) -> tuple[int, int]:
    """Multiply-adds and parameters, layer after layer as the authors' ``_fixed_layer`` makes them.

    They keep a reduction of every output, also of those that no layer sees later.
    """
    total = [0, 0]

    def conv(i: int, o: int, kernel: int = 1) -> None:
        total[0] += kernel**2 * i * o * side**2
        total[1] += kernel**2 * i * o + 2 * o

    conv(3, channels, 3)
    third = len(rows) // 3
    for index, (op, *skips) in enumerate(rows):
        conv(channels, channels)
        conv(channels, channels, (3, 3, 5, 5)[op])  # the separable ones are full ones
        if index > 0:
            conv(channels * (1 + sum(skips)), channels)
        if index in (third - 1, 2 * third - 1):
            side //= 2
            for output in range(index + 2):
                is_seen = output == index + 1 or any(row[1 + output] for row in rows[index + 1 :])
                if is_seen or keeps_all:
                    conv(channels, 2 * channels)  # two halves
            channels *= 2
    return total[0] + channels * 10, total[1] + channels * 10


def rows_of(architecture: Architecture) -> list[list[int]]:
    rows: list[list[int]] = []
    while f"layer{len(rows)}.op" in architecture:
        at = f"layer{len(rows)}"
        skips = [int(architecture[f"{at}.skip{i}"]) for i in range(len(rows))]
        rows.append([OPERATIONS.index(architecture[f"{at}.op"]), *skips])
    return rows


def test_the_derived_network_is_counted_as_the_authors_build_it() -> None:
    with torch.device("meta"):
        space = ModelSpace(ENASMacro(channels=4, layers=6, derived=True))
    for seed in range(4):
        architecture = space.random(torch.Generator().manual_seed(seed))
        convolutions = [op for op in OPERATIONS if "conv" in op]
        for layer in range(6):
            architecture[f"layer{layer}.op"] = convolutions[(seed + layer) % 4]
        with torch.device("meta"):
            network = space.freeze(architecture)
            macs = count_macs(network, [torch.empty(1, 3, 16, 16)]).headline
        params = sum(parameter.numel() for parameter in network.parameters())
        assert (macs, params) == counted(rows_of(architecture), 4, 16, keeps_all=False), architecture


def test_the_published_network_leaves_nothing_out_and_is_not_the_one_of_the_paper() -> None:
    published = ENASMacro.published["macro"]
    counts = [counted(rows_of(published.architecture), 96, 32, keeps_all) for keeps_all in (False, True)]
    assert counts == [(published.macs, published.params)] * 2
    # The paper's has 38.0 M, 12 layers and 512 channels in the last ones.
    smallest, largest = ([[op, *[skip] * layer] for layer in range(12)] for op, skip in ((0, 0), (2, 1)))
    assert counted(smallest, 128, 32, keeps_all=True)[1] == 16_507_776
    assert counted(largest, 128, 32, keeps_all=True)[1] == 50_029_440
