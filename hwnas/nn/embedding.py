"""``torch.nn.Embedding`` whose sizes may be values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.nn.mixed import ONE_PATH, MixedOperation, split
from hwnas.values import Value


@final
class Embedding(MixedOperation, nn.Embedding):
    """``torch.nn.Embedding`` whose sizes may be values; rows and features are taken from the front.

    Shapes: integers ``(*)`` to ``(*, embedding_dim)``. Under mixing weights the output keeps its largest
    width, and what comes next masks it. Options of ``num_embeddings`` are for strategies that run one path:
    where all of them know an index they return the same, so that no gradient tells them apart.

    Raises:
        ValueError: ``padding_idx`` is not among the rows of every option, or ``max_norm`` or ``sparse`` is
            set, which need whole rows.
    """

    elastic = ("num_embeddings", "embedding_dim")

    def __init__(
        self,
        num_embeddings: int | Value,
        embedding_dim: int | Value,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **keywords: Any,
    ) -> None:
        given = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
        fixed = {
            "padding_idx": padding_idx,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "scale_grad_by_freq": scale_grad_by_freq,
            "sparse": sparse,
            **keywords,
        }
        values, largest = split(given, fixed)
        if values and (max_norm is not None or sparse):
            raise ValueError(
                "max_norm and sparse need whole rows, and an Embedding whose sizes are values runs on parts "
                f"of them; got max_norm={max_norm}, sparse={sparse}. Leave them out, or fix the sizes"
            )
        if padding_idx is not None and "num_embeddings" in values:
            least = min(values["num_embeddings"].all())
            if not 0 <= padding_idx < least:
                raise ValueError(
                    f"padding_idx must be one of the rows that every option has, 0 to {least - 1}; "
                    f"got {padding_idx}"
                )
        super().__init__(**largest)
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        sizes = self.running_sizes()
        weight = self.parts(sizes)["weight"]
        return F.embedding(
            input, weight, padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )

    def check_can_mix(self) -> None:
        if "num_embeddings" in self.undecided():
            raise ValueError(
                f"options of num_embeddings {self.values['num_embeddings'].all()} return the same where all "
                f"of them know an index, so that no gradient tells them apart: fix it, or {ONE_PATH}"
            )

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        return nn.Embedding(**sizes, **{name: getattr(self, name) for name in names}, device="meta")

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"weight": self.weight[: sizes["num_embeddings"], : sizes["embedding_dim"]]}
