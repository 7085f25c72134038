from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from hwnas import ModelSpace
from hwnas.spaces import ENASMicro
from hwnas.spaces.enas_micro import OPERATIONS
from profilers import count_macs
from tests.contracts.space import SpaceContract

ONE_PATH = "a strategy that runs one path"


class TestENASMicro(SpaceContract):
    space = ENASMicro
    refuses: ClassVar[dict[str, str]] = dict.fromkeys(("darts", "proxyless-two", "gumbel"), ONE_PATH)

    def test_a_published_network_is_plain_and_takes_other_arguments(self) -> None:
        """With fewer cells, which are built in a fraction of the time."""
        network = ENASMicro.from_published("micro", num_classes=7, channels=4, cells=3)
        assert type(network) is ENASMicro
        assert network.classifier.out_features == 7
        with pytest.raises(ValueError, match="no published network 'nobody'"):
            ENASMicro.from_published("nobody")


def test_a_node_may_take_one_state_twice_and_inputs_have_no_order() -> None:
    architecture = ENASMicro.architecture_of("1 0 1 1 2 2 0 3  0 4 0 4 0 0 1 1")
    assert architecture["normal.2.inputs"] == (1, 1)
    assert (architecture["normal.2.first"], architecture["normal.2.second"]) == (
        "sep_conv_3x3",
        "sep_conv_5x5",
    )
    assert architecture["normal.3.inputs"] == (0, 2)
    assert (architecture["normal.3.first"], architecture["normal.3.second"]) == (
        "max_pool_3x3",
        "avg_pool_3x3",
    )
    space = ModelSpace(ENASMicro(channels=4, cells=3, nodes=2))
    assert space.validate(architecture) == space.canonical(architecture)


@pytest.mark.parametrize("numbers", ["0 0 0 0", "0 0 2 0 0 0 0 0", "0 5 0 0 0 0 0 0"])
def test_numbers_that_are_no_cells_are_refused(numbers: str) -> None:
    with pytest.raises(ValueError, match="a node is a state before it"):
        ENASMicro.architecture_of(numbers)


def test_the_derived_network_concatenates_what_is_left() -> None:
    # Normal: node 3 takes node 2, so that nodes 3 and input 0 are left. Reduction: both nodes and no input.
    architecture = ENASMicro.architecture_of("1 0 1 0 2 0 2 0  0 0 1 0 0 4 1 4")
    network = ModelSpace(ENASMicro(channels=4, cells=3, nodes=2, derived=True)).freeze(architecture)
    outputs = []
    for cell in network.cells:
        cell.register_forward_hook(lambda _, __, output: outputs.append(output[1].shape))
    network(torch.randn(2, 3, 16, 16))
    assert outputs == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 16, 8, 8), (2, 32, 4, 4), (2, 32, 4, 4)]


def counted(numbers: list[int], nodes: int, channels: int, cells: int, side: int) -> tuple[int, int]:
    """Multiply-adds and parameters, layer after layer as the authors' ``_fixed_layer`` makes them."""
    total = [0, 0]

    def conv(i: int, o: int, side: int, k: int = 1, groups: int = 1, norm: bool = True) -> None:
        weights = k * k * i * o // groups
        total[0] += weights * side**2
        total[1] += weights + (2 * o if norm else 0)

    conv(3, 3 * channels, side, 3)
    layers = [(3 * channels, side)] * 2
    for index in range(cells + 2):
        reduces = index in (cells // 3, 2 * (cells // 3) + 1)
        channels *= 2 if reduces else 1
        arc = numbers[4 * nodes :] if reduces else numbers[: 4 * nodes]
        (before, larger), (last, side) = layers
        if larger != side or before != channels:  # two halves have as many as one convolution
            conv(before, channels, side)
        if last != channels:
            conv(last, channels, side)
        conv(channels, channels, side)
        states = [side] * 2
        for node in range(nodes):
            after = side
            for state, op in (arc[4 * node : 4 * node + 2], arc[4 * node + 2 : 4 * node + 4]):
                after = states[state] // (2 if reduces and state < 2 else 1)
                for _ in range(2 if op < 2 else 0):
                    conv(channels, channels, after, (3, 5)[op], groups=channels, norm=False)
                    conv(channels, channels, after)
                if op == 4 and after != states[state]:
                    conv(channels, channels, after)
            states.append(after)
        left = [state for state in range(nodes + 2) if state not in arc[::2]]
        side = min(states[state] for state in left)
        for state in left:
            if states[state] > side:
                conv(channels, channels, side)
        layers = [layers[1], (channels * len(left), side)]
    conv(layers[1][0], 10, 1, norm=False)
    return total[0], total[1]


def test_the_derived_network_is_counted_as_the_authors_build_it() -> None:
    with torch.device("meta"):
        space = ModelSpace(ENASMicro(channels=4, cells=6, nodes=2, derived=True))
    lone = [0, 0, 1, 4, 2, 1, 2, 3]  # all states but one are taken: a cell is as wide as a node
    for numbers in (
        lone + lone,
        [1, 4, 1, 0, 2, 2, 2, 1, 0, 3, 0, 4, 1, 1, 0, 4],
        [0, 1, 0, 2, 0, 3, 0, 0, *lone],
    ):
        with torch.device("meta"):
            network = space.freeze(ENASMicro.architecture_of(numbers))
            macs = count_macs(network, [torch.empty(1, 3, 16, 16)]).headline
        params = sum(parameter.numel() for parameter in network.parameters())
        assert (macs, params) == counted(numbers, 2, 4, 6, 16), numbers


def test_18_cells_have_the_parameters_of_the_paper() -> None:
    published = ENASMicro.published["micro"]
    numbers: list[int] = []
    for cell in ("normal", "reduce"):
        for node in range(2, 7):
            states = published.architecture[f"{cell}.{node}.inputs"]
            chosen = (published.architecture[f"{cell}.{node}.{place}"] for place in ("first", "second"))
            numbers += [
                n for state, op in zip(states, chosen, strict=True) for n in (state, OPERATIONS.index(op))
            ]
    assert counted(numbers, 5, 36, 15, 32) == (published.macs, published.params)
    assert counted(numbers, 5, 36, 18, 32)[1] == 4_587_372  # 4.6 M in table 1
