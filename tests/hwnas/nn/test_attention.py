from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace, ValueChoice
from hwnas.export import export_onnx, parity
from hwnas.nn import LayerNorm, Linear, MultiheadAttention
from profilers import FlopsProfiler, count_macs
from tests.contracts.mixed_operation import Arguments, MixedOperationContract, choice


class TestMultiheadAttention(MixedOperationContract):
    operation, plain, draws = MultiheadAttention, nn.MultiheadAttention, True

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            width = choice(draw, "width", [8, 12, 16])
            heads = draw(st.sampled_from([2, width // 4, choice(draw, "heads", [1, 2, 4])]))
            sides = [
                {},
                {"kdim": width},
                {"vdim": width, "kdim": width},
                {"kdim": 8},
                {"kdim": 16, "vdim": 16},
            ]
            sides.append({"kdim": choice(draw, "k", [8, 6]), "vdim": choice(draw, "v", [16, 5])})
            return {
                "embed_dim": width,
                "num_heads": heads,
                "dropout": choice(draw, "dropout", [0.0, 0.5]),
                "bias": draw(st.booleans()),
                "add_bias_kv": draw(st.booleans()),
                "add_zero_attn": draw(st.booleans()),
                "batch_first": draw(st.booleans()),
                **draw(st.sampled_from(sides)),
            }

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            return {
                "embed_dim": 8,
                "num_heads": 2,
                "bias": draw(st.booleans()),
                "add_bias_kv": draw(st.booleans()),
                "batch_first": draw(st.booleans()),
                "kdim": draw(st.sampled_from([8, 6])),
                "vdim": choice(draw, "v", [4, 8, 5]),
            }

        return drawn()

    def refused_arguments(self) -> Sequence[Arguments]:
        given = [
            {"embed_dim": ValueChoice([4, 8], label="c")},
            {"num_heads": ValueChoice([2, 4], label="c")},
            {"kdim": ValueChoice([4, 8], label="c")},
            {"dropout": ValueChoice([0.1, 0.2], label="c")},
        ]
        return [{"embed_dim": 8, "num_heads": 2, **some} for some in given]

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        width = sizes["embed_dim"]
        others = (sizes.get("kdim", width), sizes.get("vdim", width))
        key, value = (torch.randn(2, 2, size, dtype=torch.double) for size in others)
        return torch.randn(2, 2, width, dtype=torch.double), key, value

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        width = sizes["embed_dim"]
        whole = state["out_proj.weight"].shape[0]
        columns = {"q": width, "k": sizes.get("kdim", width), "v": sizes.get("vdim", width)}
        if "in_proj_weight" in state:
            held = dict(zip("qkv", state["in_proj_weight"].split(whole), strict=True))
        else:
            held = {name: state[f"{name}_proj_weight"] for name in "qkv"}
        parts = {name: held[name][:width, :size] for name, size in columns.items()}
        if len(set(columns.values())) == 1:
            found = {"in_proj_weight": torch.cat(list(parts.values()))}
        else:
            found = {f"{name}_proj_weight": part for name, part in parts.items()}
        found["out_proj.weight"] = state["out_proj.weight"][:width, :width]
        if "in_proj_bias" in state:
            found["in_proj_bias"] = torch.cat([b[:width] for b in state["in_proj_bias"].split(whole)])
            found["out_proj.bias"] = state["out_proj.bias"][:width]
        for name in ("bias_k", "bias_v"):
            if name in state:
                found[name] = state[name][:, :, :width]
        return found

    def output(self, result: Any) -> Tensor:
        output, weights = result
        assert weights.ndim == 3
        return super().output(output)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("is_batched", [True, False])
def test_masks_and_self_attention_are_those_of_torch(need_weights: bool, is_batched: bool) -> None:
    width = ValueChoice([8, 16], label="width")
    space = ModelSpace(MultiheadAttention(width, width // 4, batch_first=True)).double()
    subnet = space.freeze({"width": 8})
    x = torch.randn(*((3,) if is_batched else ()), 5, 8, dtype=torch.double)
    masks = {
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "key_padding_mask": torch.arange(15).reshape(3, 5) % 5 > 2 if is_batched else torch.arange(5) > 2,
    }
    for mode in (False, True):
        with space.running(space.gates_of({"width": 8})):
            found = space.train(mode)(x, x, x, need_weights=need_weights, average_attn_weights=False, **masks)
        expected = subnet.train(mode)(x, x, x, need_weights=need_weights, average_attn_weights=False, **masks)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_heads_keep_their_weights_where_their_number_follows_the_width() -> None:
    width = ValueChoice([8, 16], label="width")
    attention = MultiheadAttention(width, width // 4, batch_first=True)
    space = ModelSpace(attention).double()
    x = torch.zeros(1, 3, 16, dtype=torch.double)
    x[..., :8] = torch.randn(1, 3, 8, dtype=torch.double)
    found = {}
    for size in (8, 16):
        part = x[..., :size]
        with space.running(space.gates_of({"width": size})):
            found[size] = space(part, part, part, average_attn_weights=False)[1]
    torch.testing.assert_close(found[8], found[16][:, :2])


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match="divisible by num_heads in every combination of options; got 6 and 4"
    ):
        MultiheadAttention(ValueChoice([6, 8], label="width"), 4)


class Block(nn.Module):
    """A transformer block whose width, heads, depth of the MLP and kind of attention are chosen."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([8, 16], label="width")
        hidden = width * ValueChoice([2, 4], label="ratio")
        self.embed = Linear(6, width)
        self.first, self.second = LayerNorm(width), LayerNorm(width)
        self.attention = LayerChoice(
            [MultiheadAttention(width, width // head, batch_first=True) for head in (4, 8)], label="head"
        )
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        normed = self.first(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        output: Tensor = x + self.mlp(self.second(x))
        return output


def test_transformer_block_costs_what_its_subnets_do() -> None:
    space = ModelSpace(Block())
    example = torch.zeros(1, 5, 6)
    profiler = FlopsProfiler(space, example)
    for architecture in space.grid():
        assert profiler.profile(architecture) == count_macs(space.freeze(architecture), [example]).headline


@pytest.mark.slow
def test_transformer_block_exports_to_onnx_with_equal_output(tmp_path: Path) -> None:
    space = ModelSpace(Block()).eval()
    subnet = space.freeze({"width": 16, "ratio": 2, "head": 0})
    x = torch.randn(2, 5, 6)
    path = export_onnx(subnet, x, tmp_path / "block.onnx", dynamic_batch=True)
    assert parity(subnet, path, [x, torch.randn(7, 5, 6)]) < 1e-5
