"""Signs that a search is about to return something poor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from hwnas.choices import LayerChoice
from hwnas.space import ModelSpace
from profilers.space import Option

_SKIPS = 0.5  # of the layers that may be skipped
_FEWEST_SKIPPABLE = 4
_GAP = 0.25  # of accuracy
_GOOD = 0.5  # a supernet that is worse than that has learned nothing yet
_EARLY = 0.02  # of the greatest entropy
_UNDECIDED = 0.98
_SHORTEST = 10  # epochs of search in which something is to be decided


@final
class Watch:
    """Tells signs of collapse, each kind once.

    - Most of the layers that may be skipped are, though the budget is not used up: the known failure of
      DARTS (Zela et al., arXiv 1909.09656; Liang et al., DARTS+, arXiv 1909.06035).
    - The answer is far less accurate than the supernet: the mixture has learned to work together only.
    - All has been decided before half of the search, or nothing at its end.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def of_validation(
        self,
        space: ModelSpace,
        architecture: Mapping[str, Option],
        own: Mapping[str, float],
        supernet: Mapping[str, float],
        is_bound: bool = False,
    ) -> Iterator[str]:
        """Signs in an answer.

        Args:
            space: the space.
            architecture: the answer.
            own: what was logged of the answer, ``val_…``.
            supernet: what was logged of the supernet under the same names.
            is_bound: the answer uses its budget up, so that skips may be what was asked for.
        """
        skippable = _skippable(space, architecture)
        skipped = [label for label, is_skipped in skippable.items() if is_skipped]
        if not is_bound and len(skippable) >= _FEWEST_SKIPPABLE and len(skipped) > _SKIPS * len(skippable):
            yield from self._once(
                "skips",
                f"{len(skipped)} of {len(skippable)} layers that may be skipped are: {', '.join(skipped)}. "
                "No budget asks for it: train the weights longer before the architecture (warmup_epochs), or "
                "search with a strategy that runs one path",
            )
        for name, value in supernet.items():
            if "acc" in name.lower() and name in own and value > max(_GOOD, own[name] + _GAP):
                yield from self._once(
                    "gap",
                    f"the answer's {name} is {own[name]:.3f}, the supernet's {value:.3f}: options work in "
                    "the mixture only. More epochs or a higher arc_learning_rate (or a lower temperature) "
                    "make it decide; judge candidates by training them on",
                )

    def of_probabilities(
        self, probabilities: Mapping[str, Tensor], epochs: int, of_epochs: int
    ) -> Iterator[str]:
        """Signs in the probabilities after ``epochs`` of ``of_epochs`` epochs of search."""
        shares = [
            float(-(p * p.clamp_min(1e-12).log()).sum()) / math.log(len(p))
            for p in probabilities.values()
            if len(p) > 1
        ]
        if not shares or of_epochs < _SHORTEST:
            return
        mean = float(torch.tensor(shares).mean())
        if 0 < epochs < of_epochs // 2 and mean < _EARLY:
            yield from self._once(
                "early",
                f"all is decided after {epochs} of {of_epochs} epochs of search (entropy {mean:.1%} of the "
                "greatest): what is left cannot change it. Lower arc_learning_rate or raise warmup_epochs",
            )
        if epochs == of_epochs and mean > _UNDECIDED:
            yield from self._once(
                "undecided",
                f"nothing is decided at the end of the search (entropy {mean:.1%} of the greatest): the "
                "answer is close to a random one. Raise arc_learning_rate or the number of epochs",
            )

    def _once(self, kind: str, text: str) -> Iterator[str]:
        if kind not in self._told:
            self._told.add(kind)
            yield text


def _skippable(space: ModelSpace, architecture: Mapping[str, Option]) -> dict[str, bool]:
    """Each active layer choice that has a skip, and whether it is picked."""
    active = space.active(architecture)
    found: dict[str, bool] = {}
    for module in space.network.modules():
        if isinstance(module, LayerChoice) and module.label in active:
            skips = [option for option in module.options if _is_skip(module[option])]
            if skips and len(skips) < len(module.options):
                found[module.label] = active[module.label] in skips
    return found


def _is_skip(layer: Any) -> bool:
    return isinstance(layer, nn.Identity)
