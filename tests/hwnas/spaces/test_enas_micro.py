from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from hwnas import ModelSpace
from hwnas.spaces import ENASMicro
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
