from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import ModelSpace, ValueChoice
from hwnas.nn import Embedding, Linear
from tests.contracts.mixed_operation import Arguments, MixedOperationContract, choice


class TestEmbedding(MixedOperationContract):
    operation, plain = Embedding, nn.Embedding

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            return {
                "num_embeddings": choice(draw, "rows", [5, 7, 9]),
                "embedding_dim": choice(draw, "width", [2, 4, 6]),
                "padding_idx": draw(st.sampled_from([None, 0, 3])),
                "scale_grad_by_freq": draw(st.booleans()),
            }

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        return self.arguments().map(lambda arguments: {**arguments, "num_embeddings": 9})

    def refused_arguments(self) -> Sequence[Arguments]:
        return [{"num_embeddings": ValueChoice([5, 7], label="c"), "embedding_dim": 4}]

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        return (torch.arange(12).reshape(3, 4) % sizes["num_embeddings"],)

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        return {"weight": state["weight"][: sizes["num_embeddings"], : sizes["embedding_dim"]]}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_norm": 1.0}, "need whole rows.*got max_norm=1.0, sparse=False"),
        ({"sparse": True}, "need whole rows.*got max_norm=None, sparse=True"),
        ({"padding_idx": 5}, "one of the rows that every option has, 0 to 4; got 5"),
        ({"padding_idx": -1}, "one of the rows that every option has, 0 to 4; got -1"),
    ],
)
def test_what_needs_the_whole_weight_is_refused(keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Embedding(ValueChoice([5, 7], label="rows"), 4, **keywords)


def test_weight_that_is_tied_to_the_output_layer_stays_tied() -> None:
    width = ValueChoice([4, 6], label="width")
    embedding, output = Embedding(9, width), Linear(width, 9, bias=False)
    output.weight = embedding.weight
    subnet = ModelSpace(nn.Sequential(embedding, output)).freeze({"width": 4})
    assert subnet[0].weight is subnet[1].weight  # type: ignore[index]  # a Sequential
    assert subnet[0].weight.shape == (9, 4)  # type: ignore[index]
