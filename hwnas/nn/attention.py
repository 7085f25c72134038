"""``torch.nn.MultiheadAttention`` whose sizes may be values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.nn.mixed import ONE_PATH, MixedOperation, presence, split
from hwnas.values import Value, combinations, outcomes


@final
class MultiheadAttention(MixedOperation, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` whose sizes may be values.

    Shapes, with ``batch_first``: query ``(N, L, embed_dim)``, key ``(N, S, kdim)``, value ``(N, S, vdim)`` to
    ``(N, L, embed_dim)``; else with N and L or S exchanged. Of each projection the first rows and columns are
    taken, and the heads share the rows out among themselves in order. So a head keeps its weights where its
    size is fixed and ``num_heads`` follows, as in AutoFormer (arXiv 2107.00651): ``embed_dim // 64``. With a
    fixed ``num_heads`` the heads' borders move with ``embed_dim``, as in NNI. Departure from AutoFormer: the
    heads together are as wide as ``embed_dim``, which ``torch.nn.MultiheadAttention`` asks for.

    For strategies that run one path, but for ``vdim``, in which attention is linear: under mixing weights
    the value is masked by the expected presence of each feature. `check_can_mix` refuses the others.

    Args:
        embed_dim, num_heads, dropout, kdim, vdim: as in ``torch.nn``; any of them may be a value. Where
            ``kdim`` or ``vdim`` is None, it is ``embed_dim``.
        bias, add_bias_kv, add_zero_attn, batch_first, keywords: as in ``torch.nn``.

    Raises:
        ValueError: heads that do not divide ``embed_dim`` under some option.
    """

    elastic = ("embed_dim", "num_heads", "dropout", "kdim", "vdim")

    def __init__(
        self,
        embed_dim: int | Value,
        num_heads: int | Value,
        dropout: float | Value = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | Value | None = None,
        vdim: int | Value | None = None,
        batch_first: bool = False,
        **keywords: Any,
    ) -> None:
        given = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "dropout": dropout,
            "kdim": embed_dim if kdim is None else kdim,
            "vdim": embed_dim if vdim is None else vdim,
        }
        fixed = {
            "bias": bias,
            "add_bias_kv": add_bias_kv,
            "add_zero_attn": add_zero_attn,
            "batch_first": batch_first,
            **keywords,
        }
        values, largest = split(given, fixed)
        every = [{**largest, **outcome} for outcome in outcomes(values)]
        for sizes in every:
            if sizes["embed_dim"] % sizes["num_heads"]:
                raise ValueError(
                    "embed_dim must be divisible by num_heads in every combination of options; "
                    f"got {sizes['embed_dim']} and {sizes['num_heads']}"
                )
        # The largest of both need not divide.
        super().__init__(**{**largest, "num_heads": 1})
        self.num_heads = largest["num_heads"]
        self.head_dim = self.embed_dim // self.num_heads
        self.values = values
        if self._qkv_same_embed_dim and not all(map(_is_packed, every)):
            self._unpack()

    def _unpack(self) -> None:
        """One weight a projection, where torch holds three equally large ones in one."""
        like = self.in_proj_weight
        for name, size in (("q", self.embed_dim), ("k", self.kdim), ("v", self.vdim)):
            weight = nn.Parameter(torch.empty(self.embed_dim, size, device=like.device, dtype=like.dtype))
            nn.init.xavier_uniform_(weight)
            self.register_parameter(f"{name}_proj_weight", weight)
        self.register_parameter("in_proj_weight", None)
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.values:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        found = combinations(self.values)
        sizes = self.running_sizes()
        parts = self.parts(sizes)
        mask = presence([outcome["vdim"] for outcome in self.live(found)], found)
        if mask is not None:
            value = value * mask.to(value.dtype)
        is_swapped = self.batch_first and query.dim() == 3
        if is_swapped:
            # Equal ones stay one object: torch projects them in one product.
            swapped = {id(given): given.transpose(0, 1) for given in (query, key, value)}
            query, key, value = (swapped[id(given)] for given in (query, key, value))
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            sizes["embed_dim"],
            sizes["num_heads"],
            parts.get("in_proj_weight"),
            parts.get("in_proj_bias"),
            parts.get("bias_k"),
            parts.get("bias_v"),
            self.add_zero_attn,
            sizes["dropout"],
            parts["out_proj.weight"],
            parts.get("out_proj.bias"),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight="in_proj_weight" not in parts,
            q_proj_weight=parts.get("q_proj_weight"),
            k_proj_weight=parts.get("k_proj_weight"),
            v_proj_weight=parts.get("v_proj_weight"),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return output.transpose(0, 1) if is_swapped else output, weights

    def check_can_mix(self) -> None:
        for name, value in self.undecided().items():
            if name != "vdim":
                raise ValueError(
                    f"attention is not linear in its {name}, so that no blended weight equals the mixture of "
                    f"{value.all()}: fix it, choose between whole layers with a LayerChoice, or {ONE_PATH}"
                )

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        return nn.MultiheadAttention(
            **sizes,
            bias=self.in_proj_bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            batch_first=self.batch_first,
            device="meta",
        )

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        width, largest = sizes["embed_dim"], self.embed_dim
        parts = {"out_proj.weight": self.out_proj.weight[:width, :width]}
        if self._qkv_same_embed_dim:
            packed = self.in_proj_weight.reshape(3, largest, largest)
            parts["in_proj_weight"] = packed[:, :width, :width].flatten(0, 1)
        else:
            columns = {"q": width, "k": sizes["kdim"], "v": sizes["vdim"]}
            held = {
                name: getattr(self, f"{name}_proj_weight")[:width, :size] for name, size in columns.items()
            }
            if _is_packed(sizes):
                parts["in_proj_weight"] = torch.cat(list(held.values()))
            else:
                parts.update({f"{name}_proj_weight": weight for name, weight in held.items()})
        if self.in_proj_bias is not None:
            parts["in_proj_bias"] = self.in_proj_bias.reshape(3, largest)[:, :width].flatten()
            parts["out_proj.bias"] = self.out_proj.bias[:width]
        if self.bias_k is not None and self.bias_v is not None:
            parts["bias_k"], parts["bias_v"] = self.bias_k[..., :width], self.bias_v[..., :width]
        return parts


def _is_packed(sizes: Mapping[str, Any]) -> bool:
    """Whether torch holds the projections of such an attention in one weight."""
    return bool(sizes["embed_dim"] == sizes["kdim"] == sizes["vdim"])
