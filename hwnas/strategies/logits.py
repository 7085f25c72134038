"""The policy of differentiable search: independent softmax distributions over each choice's options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from profilers.space import Option


@final
class Logits:
    """One vector of logits a choice.

    Args:
        options: each label with its options.
        generator: the logits start as 1e-3 times a standard normal (DARTS, quark0/darts
            ``cnn/model_search.py``).
    """

    def __init__(self, options: Mapping[str, tuple[Option, ...]], generator: torch.Generator) -> None:
        self.of = {
            label: nn.Parameter(1e-3 * torch.randn(len(found), generator=generator))
            for label, found in options.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        return list(self.of.values())

    def probabilities(self) -> dict[str, Tensor]:
        """The softmax of each vector, shape ``(options,)``, differentiable."""
        return {label: logits.softmax(dim=0) for label, logits in self.of.items()}

    def to(self, device: torch.device) -> None:
        """Moves the vectors in place: an optimiser keeps holding them."""
        for logits in self.of.values():
            logits.data = logits.data.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {label: logits.detach().clone() for label, logits in self.of.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the state belongs to another space."""
        _same(self.of, state)
        with torch.no_grad():
            for label, logits in self.of.items():
                logits.copy_(state[label])


def _same(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    sizes = {label: len(logits) for label, logits in here.items()}
    given = {label: len(logits) for label, logits in there.items()}
    if sizes != given:
        labels: Iterable[str] = {*sizes, *given}
        differing = [label for label in labels if sizes.get(label) != given.get(label)]
        raise ValueError(
            "the checkpoint belongs to another space: numbers of options differ at "
            + ", ".join(f"'{n}' ({given.get(n, 0)} there, {sizes.get(n, 0)} here)" for n in sorted(differing))
        )
