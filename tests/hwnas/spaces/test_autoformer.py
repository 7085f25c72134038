from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hwnas import Gate, ModelSpace
from hwnas.spaces import AutoFormer
from profilers import count_macs
from tests.contracts.space import SpaceContract


class TestAutoFormer(SpaceContract):
    space = AutoFormer
    refuses = dict.fromkeys(("darts", "proxyless-two", "gumbel"), "LayerNorm's mean and variance")


def tiny(**arguments: object) -> AutoFormer:
    sizes = {"widths": (12,), "heads": (2,), "ratios": (2,), "depths": (1,), "image_size": 8, "patch": 4}
    return AutoFormer(**{"num_classes": 3, "head_width": 6, "furthest": 1, **sizes, **arguments})


@pytest.mark.parametrize("name", ["t", "s", "b"])
def test_published_networks_have_the_parameters_that_the_authors_count(name: str) -> None:
    published = AutoFormer.published[name]
    width, depth = published.architecture["width"], published.architecture["depth"]
    # Cls token and positions, patches, last norm, classifier (get_sampled_params_numel).
    count = width * (2 + 196) + 768 * width + width + 2 * width + 1000 * width + 1000
    for block in range(1, depth + 1):
        q = 64 * published.architecture[f"block{block}.heads"]
        hidden = int(width * published.architecture[f"block{block}.ratio"])
        count += 4 * width + 3 * q * (width + 1) + width * (q + 1) + 4 * 30 * 64
        count += hidden * (width + 1) + width * (hidden + 1)
    assert published.params == count


def test_distances_are_clipped_and_the_class_has_a_row_of_its_own() -> None:
    network = tiny(image_size=16, widths=(12, 24), furthest=2)
    vertical, horizontal = network.blocks[0].key_positions.apart
    assert (vertical[0] == 0).all()
    assert (horizontal[:, 0] == 0).all()
    for first, second in itertools.product(range(16), repeat=2):
        down, right = second // 4 - first // 4, second % 4 - first % 4
        assert vertical[1 + first, 1 + second] == max(-2, min(2, down)) + 3
        assert horizontal[1 + first, 1 + second] == max(-2, min(2, right)) + 3


def test_attention_is_that_of_torch_where_positions_say_nothing() -> None:
    torch.manual_seed(0)
    layer = ModelSpace(tiny(heads=(2, 3))).freeze({"block1.heads": 2}).blocks[0]
    for table in (layer.key_positions, layer.value_positions):
        for embedding in (table.vertical, table.horizontal):
            nn.init.zeros_(embedding.weight)
    reference = nn.MultiheadAttention(12, 2, batch_first=True)
    parts = (layer.query, layer.key, layer.value)
    reference.in_proj_weight.data = torch.cat([part.weight for part in parts]).detach()
    reference.in_proj_bias.data = torch.cat([part.bias for part in parts]).detach()
    reference.out_proj.load_state_dict(layer.project.state_dict())
    tokens = torch.randn(2, 5, 12)
    normed = layer.norm(tokens)
    torch.testing.assert_close(layer(tokens), tokens + reference(normed, normed, normed)[0])


def test_mixed_heads_are_the_mixture_of_their_layers() -> None:
    torch.manual_seed(0)
    space = ModelSpace(tiny(heads=(1, 2, 3)))
    space.check_can_mix()
    weights = torch.tensor([0.2, 0.5, 0.3])
    subnets = [space.freeze({"block1.heads": heads}) for heads in (1, 2, 3)]
    tokens = space.network.tokens(torch.randn(2, 3, 8, 8))
    space.network.blocks[0].query.values["out_features"].leaves()[0].gate = Gate((0, 1, 2), weights)
    mixed = space.network.blocks[0](tokens)
    torch.testing.assert_close(
        mixed, sum(w * subnet.blocks[0](tokens) for w, subnet in zip(weights, subnets, strict=True))
    )


def test_smaller_images_are_framed_and_larger_ones_refused() -> None:
    network = ModelSpace(tiny(heads=(1, 2))).freeze({"block1.heads": 1}).eval()
    images = torch.randn(1, 3, 6, 5)
    framed = nn.functional.pad(images, (1, 2, 1, 1))
    assert torch.equal(network(images), network(framed))
    with pytest.raises(ValueError, match="at most 8x8; got 9x8"):
        network(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="multiple of patch"):
        tiny(image_size=10)


def test_multiply_adds_of_convolution_and_linear_layers_are_those_of_the_note() -> None:
    with torch.device("meta"):
        network = AutoFormer.from_published("t")
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    alone = 197 * sum(module.weight.numel() for module in linear[:-1]) + linear[-1].weight.numel()
    alone += 196 * network.tokens.patches.weight.numel()
    note = AutoFormer.published["t"].note
    assert f"{alone:,}" in note
    heads = [AutoFormer.published["t"].architecture[f"block{n}.heads"] for n in range(1, 14)]
    products = sum(heads) * 4 * 197**2 * 64  # of queries and keys, weights and values, and their positions
    assert AutoFormer.published["t"].macs == alone + products


def test_costs_follow_depth_by_whole_blocks() -> None:
    space = ModelSpace(tiny(depths=(1, 2), heads=(1, 2)))
    counts = [
        count_macs(
            space.freeze({"depth": depth, "block1.heads": 1, "block2.heads": 1}), [torch.zeros(1, 3, 8, 8)]
        )
        for depth in (1, 2)
    ]
    assert counts[1].headline - counts[0].headline == counts[0].headline - 4 * 48 * 12 - 12 * 3
