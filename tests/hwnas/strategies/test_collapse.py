from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hwnas import LayerChoice, ModelSpace
from hwnas.classification import Classification
from hwnas.strategies import DARTS
from hwnas.strategies.collapse import Watch
from tests.hwnas.strategies.tiny import CLASSES, Mean, fit


def space_of_skips() -> ModelSpace:
    layers = [
        LayerChoice({"conv": nn.Conv2d(1, 1, 1), "skip": nn.Identity()}, label=f"l{i}") for i in range(4)
    ]
    head = nn.Sequential(nn.Flatten(2), Mean(), nn.Linear(1, CLASSES))
    return ModelSpace(nn.Sequential(*layers, head))


def architecture(skips: int) -> dict[str, Any]:
    return {f"l{i}": "skip" if i < skips else "conv" for i in range(4)}


def test_more_than_half_skips_are_told_once() -> None:
    watch, space = Watch(), space_of_skips()
    assert not list(watch.of_validation(space, architecture(2), {}, {}))
    (told,) = watch.of_validation(space, architecture(3), {}, {})
    assert told.startswith("3 of 4 layers that may be skipped are: l0, l1, l2.")
    assert not list(watch.of_validation(space, architecture(4), {}, {}))


def test_skips_that_a_budget_asks_for_are_not_told() -> None:
    assert not list(Watch().of_validation(space_of_skips(), architecture(4), {}, {}, is_bound=True))


def test_layers_without_a_skip_do_not_count() -> None:
    layers = [LayerChoice([nn.ReLU(), nn.Tanh()], label=f"l{i}") for i in range(4)]
    space = ModelSpace(nn.Sequential(*layers))
    assert not list(Watch().of_validation(space, space.default(), {}, {}))


@pytest.mark.parametrize(
    ("own", "supernet", "is_told"),
    [(0.3, 0.9, True), (0.7, 0.9, False), (0.1, 0.4, False), (0.9, 0.3, False)],
)
def test_a_supernet_that_is_far_better_than_the_answer_is_told(
    own: float, supernet: float, is_told: bool
) -> None:
    found = list(
        Watch().of_validation(space_of_skips(), architecture(0), {"val_acc": own}, {"val_acc": supernet})
    )
    assert [f"the answer's val_acc is {own:.3f}" in text for text in found] == [True] * is_told


@pytest.mark.parametrize(
    ("sharpness", "epochs", "said"),
    [
        (50.0, 3, "all is decided after 3 of 20"),
        (50.0, 15, ""),
        (0.0, 20, "nothing is decided"),
        (0.0, 10, ""),
    ],
)
def test_deciding_too_early_or_never_is_told(sharpness: float, epochs: int, said: str) -> None:
    probabilities = {"op": torch.tensor([sharpness, 0.0, 0.0]).softmax(0)}
    found = list(Watch().of_probabilities(probabilities, epochs, 20))
    assert len(found) == bool(said)
    assert all(said in text for text in found)


def test_a_search_that_skips_everything_warns() -> None:
    strategy = DARTS()
    module = Classification(space_of_skips(), CLASSES)
    strategy.prepare_for(module.network)
    with torch.no_grad():
        for logits in strategy.logits.of.values():
            logits[1] = 5.0
    with pytest.warns(UserWarning, match="DARTS: 4 of 4 layers that may be skipped are"):
        fit(strategy, module)
