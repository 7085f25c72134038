"""Every strategy on a space of every kind of choice, and the table of what goes together.

python -m tests.hwnas.matrix > docs/support.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hwnas import Cell, InputChoice, LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.nn import BatchNorm2d, Conv2d, Linear, MultiheadAttention
from tests.hwnas.strategies.tiny import CLASSES, EVERY, Mean, TinyNet

IMAGES = torch.zeros(2, 1, 8, 8)


def _head(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(2), Mean(), nn.Linear(width, CLASSES))


def _convolutions() -> dict[str, nn.Module]:
    return {
        "conv": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        "point": nn.Conv2d(4, 4, 1),
        "skip": nn.Identity(),
    }


def layer_choice() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), LayerChoice(_convolutions()), nn.ReLU(), _head(4))


class Branches(nn.Module):
    """Two of three branches are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1)
        self.branches = nn.ModuleList(_convolutions().values())
        self.choice = InputChoice(3, n_chosen=2)
        self.head = _head(4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        scores: Tensor = self.head(self.choice([branch(features) for branch in self.branches]))
        return scores


def repeat() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), Repeat(block, (1, 3)), _head(4))


def cell() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), Cell(_convolutions(), num_nodes=2, num_ops_per_node=1), _head(8)
    )


class LooseEnds(nn.Module):
    """A cell that concatenates what no node takes, before a layer of that width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1)
        self.cell = Cell(_convolutions(), num_nodes=3, num_ops_per_node=1, merge_op="loose_end")
        self.project = Conv2d(self.cell.n_outputs * 4, 4, 1)
        self.head = _head(4)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.project(self.cell(self.stem(images))))
        return scores


def coupled_widths() -> nn.Module:
    width = ValueChoice([2, 4, 6])
    return nn.Sequential(
        nn.Sequential(Conv2d(1, width, 3, 2, 1), BatchNorm2d(width), nn.ReLU()),
        Conv2d(width, width * 2, 3, padding=1),
        nn.Flatten(2),
        Mean(),
        Linear(width * 2, CLASSES),
    )


class Attention(nn.Module):
    """Rows of an image are the tokens; ``attention`` maps ``(N, 8, 8)`` to the same."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.attention(images.squeeze(1)).mean(dim=1))
        return scores


class Heads(nn.Module):
    """Self-attention whose width and heads are searched together."""

    def __init__(self, width: int | ValueChoice, heads: int | ValueChoice) -> None:
        super().__init__()
        self.into = Linear(8, width)
        self.attention = MultiheadAttention(width, heads, batch_first=True)
        self.out = Linear(width, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        inner = self.into(tokens)
        attended, _ = self.attention(inner, inner, inner, need_weights=False)
        mixed: Tensor = self.out(attended)
        return tokens + mixed


def attention_layers() -> nn.Module:
    return Attention(LayerChoice({"narrow": Heads(4, 2), "wide": Heads(8, 2), "skip": nn.Identity()}))


def attention_sizes() -> nn.Module:
    return Attention(Heads(ValueChoice([4, 8]), ValueChoice([1, 2])))


def nested() -> nn.Module:
    inner = LayerChoice([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)])
    outer = LayerChoice({"inner": nn.Sequential(inner, nn.ReLU()), "skip": nn.Identity()})
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), outer, _head(4))


KINDS: Mapping[str, Callable[[], nn.Module]] = {
    "layer choice": layer_choice,
    "input choice": Branches,
    "repeat": repeat,
    "cell": cell,
    "cell with loose ends": LooseEnds,
    "coupled widths": coupled_widths,
    "attention layers": attention_layers,
    "attention sizes": attention_sizes,
    "nested": nested,
    "all at once": TinyNet,
}


def refusal(name: str, kind: str) -> str | None:
    """Why a strategy does not take a space, from the strategy itself; None where it does."""
    try:
        EVERY[name]().prepare_for(ModelSpace(KINDS[kind]()))
    except ValueError as error:
        return str(error)
    return None


def table() -> str:
    """Markdown."""
    lines = [
        "# What goes together",
        "",
        "Each strategy on a small space of each kind of choice: searched, derived inside a budget, frozen",
        "with equal outputs and exported to ONNX by `tests/hwnas/test_matrix.py`. What is refused is refused",
        "before the first step.",
        "",
        "    python -m tests.hwnas.matrix > docs/support.md",
        "",
        f"| | {' | '.join(EVERY)} |",
        f"|---|{'---|' * len(EVERY)}",
    ]
    reasons: dict[str, int] = {}
    for kind in KINDS:
        cells = []
        for name in EVERY:
            reason = refusal(name, kind)
            cells.append("yes" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
