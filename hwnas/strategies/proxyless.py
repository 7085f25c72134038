"""ProxylessNAS: one path runs; its gradient reaches the logits through binary gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack, final

import torch
from torch import Tensor, nn

from hwnas.gate import Gate
from hwnas.strategies.differentiable import ArchOptimizer, DifferentiableOptions, DifferentiableStrategy


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The authors' architecture optimiser: no momentum, which would move options that were not sampled."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.999))


@final
class Proxyless(DifferentiableStrategy):
    """ProxylessNAS's gradient-based search (arXiv 1812.00332, section 3.2).

    A weight step trains one path, sampled from the softmax of the logits. An architecture step samples
    binary gates, one-hot forward; the gradient with respect to a gate is the scalar product of the output's
    gradient with that option's output, and goes on to the logits as if the gate were its probability
    (equation 4). Options that are not picked run without a graph.

    ``paths="two"`` is the memory-saving step of section 3.2.1: two options are sampled from the
    probabilities, one of them is picked with the probabilities of the two alone, only these two run and
    only their logits move; afterwards the two are shifted together so that the probabilities of the other
    options stay (mit-han-lab/proxylessnas, ``search/modules/mix_op.py``, ``rescale_updated_arch_param``).

    Departure: BatchNorm statistics do not move in architecture steps, and derivation is exact under a
    budget (`hwnas.derive`). With a penalty, its gradient reaches all logits, as in the authors' code.

    Args:
        paths: ``"two"`` or ``"full"``.
        arc_learning_rate: the authors' 1e-3 suits a hundred epochs; a short search needs more.
        arch_optimizer: ``(parameters, learning rate)`` to an optimiser.
        options: as in `DifferentiableStrategy` (`penalty`, `arch_dataloader`, ...) and `Strategy`
            (`warmup_epochs`, `seed`, ...).
    """

    def __init__(
        self,
        paths: Literal["two", "full"] = "two",
        arc_learning_rate: float = 1e-3,
        arch_optimizer: ArchOptimizer = adam,
        **options: Unpack[DifferentiableOptions],
    ) -> None:
        if paths not in ("two", "full"):
            raise ValueError(f"paths must be 'two' or 'full'; got {paths!r}")
        super().__init__(arc_learning_rate, arch_optimizer, **options)
        self.paths = paths

    def weight_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        return {label: Gate((_sample(p, generator),)) for label, p in self.probabilities().items()}

    def architecture_gates(self, generator: torch.Generator) -> Mapping[str, Gate]:
        gates = {}
        for label, logits in self.logits.of.items():
            if self.paths == "full" or len(logits) < 3:
                gates[label] = _binary_gate(logits, tuple(range(len(logits))), generator)
            else:
                # Two have to be drawn also where rounding leaves all but one at 0.
                chances = logits.detach().softmax(dim=0).cpu().clamp(min=1e-30)
                two = torch.multinomial(chances, 2, generator=generator)
                gates[label] = _binary_gate(logits, tuple(two.tolist()), generator)
        return gates

    def after_architecture_step(self, gates: Mapping[str, Gate], before: Mapping[str, Tensor]) -> None:
        if self.paths == "full":
            return
        with torch.no_grad():
            for label, gate in gates.items():
                two = list(gate.live())
                logits = self.logits.of[label]
                logits[two] -= logits[two].logsumexp(dim=0) - before[label][two].logsumexp(dim=0)


def _binary_gate(logits: Tensor, options: tuple[int, ...], generator: torch.Generator) -> Gate:
    """One of ``options`` is on, by their softmax; its gradient is that of the probabilities."""
    chances = logits[list(options)].softmax(dim=0)
    on = _sample(chances.detach(), generator)
    one_hot = torch.zeros_like(chances)
    one_hot[on] = 1.0
    # Grouped so that the forward value is exactly 0 or 1.
    straight = one_hot + (chances - chances.detach())
    weights = torch.zeros_like(logits).index_put((torch.tensor(options, device=logits.device),), straight)
    run = None if len(options) == len(logits) else options
    return Gate((options[on],), weights, run)


def _sample(probabilities: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
