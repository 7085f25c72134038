"""What is described alike does the same; what differs in more than weights and labels is not alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hwnas import ModelSpace, ValueChoice
from hwnas.alike import description
from hwnas.nn import BatchNorm2d, Conv2d
from hwnas.spaces import ShuffleNetV2


def block(label: str, options=(4, 8), kernel: int = 3) -> nn.Module:
    width = ValueChoice(options, label=label)
    return nn.Sequential(Conv2d(4, width, kernel), BatchNorm2d(width), nn.ReLU())


def test_blocks_that_differ_in_weights_and_labels_are_alike() -> None:
    assert description(block("a"), ["a"]) == description(block("b"), ["b"])


@pytest.mark.parametrize(
    "other",
    [
        block("a", options=(4, 16)),
        block("a", kernel=5),
        block("a").eval(),
        nn.Sequential(*block("a"), nn.Identity()),
        nn.Sequential(*block("a")[:2], nn.ReLU6()),
    ],
)
def test_other_blocks_are_not_alike(other: nn.Module) -> None:
    assert description(block("a"), ["a"]) != description(other, ["a"])


def test_tied_weights_are_not_like_untied_ones() -> None:
    tied, untied = (
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    )
    tied[1].weight = tied[0].weight
    assert description(tied, []) != description(untied, [])


def test_what_has_no_pickle_has_no_description() -> None:
    module = nn.Identity()
    module.function = lambda x: x
    assert description(module, []) is None


def test_a_survey_looks_once_at_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    from hwnas import survey

    frozen = survey._Runner._frozen
    monkeypatch.setattr(
        survey._Runner,
        "_frozen",
        lambda self, call, own: (looked.append(call.module), frozen(self, call, own))[1],
    )
    network = ShuffleNetV2(4, 1, widths=(8, 16, 16), layers=(4,), ratios=(0.5, 1.0))
    ModelSpace(network).sites(torch.zeros(1, 1, 32, 32))
    blocks = [name for name in looked if name and name.startswith("blocks.")]
    assert len(blocks) == 2 * 4 * 2  # the first layer and the three others; four blocks; two widths


def test_blocks_that_have_run_are_like_those_that_have_not() -> None:
    ran, fresh = block("a"), block("b")
    space = ModelSpace(ran)
    for width in (4, 8):
        with space.running(space.gates_of({"a": width})):
            space(torch.zeros(1, 4, 8, 8))
    assert description(ran, ["a"]) == description(fresh, ["b"])
