from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lookup_tables.graph import executed_graph

LAYERS = [
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.ReLU6(),
    nn.ReLU6(inplace=True),
    nn.Hardswish(),
    nn.Hardswish(inplace=True),
    nn.Hardsigmoid(),
    nn.GELU(),
    nn.LayerNorm((6, 6)),
    nn.Linear(6, 6),
    nn.Sequential(nn.Flatten(0, 2), nn.Linear(6, 6), nn.Unflatten(0, (1, 8, 6))),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_has_one_key_whether_or_not_it_computes_numbers(layer: nn.Module) -> None:
    # A convolution after it tells whether its output has the right shape and comes from the right place.
    network = nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 4, 3)).eval()
    computed = executed_graph(network, [torch.zeros(1, 3, 6, 6)])
    on_meta = executed_graph(copy.deepcopy(network).to("meta"), [torch.empty(1, 3, 6, 6, device="meta")])
    assert on_meta.key == computed.key
    assert on_meta.output.shape == computed.output.shape
