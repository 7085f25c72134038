"""Makes a cost part of what a search minimises, and refuses what costs too little or too much."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, final, get_args

import torch
from torch import Tensor

from profilers.cost import Cost
from profilers.profile import Profiler
from profilers.program import minimise
from profilers.space import Option

Nonlinear = Literal["linear", "positive", "negative", "absolute"]
Aggregate = Literal["add", "mul"]


class Penalty(ABC):
    """What a differentiable search adds to its loss for the expected cost of its probabilities.

    ``penalty(loss, probabilities)`` is the loss of an architecture step; ``update(probabilities)`` is
    called once after each.
    """

    def __init__(self, profiler: Profiler, baseline: float) -> None:
        check_baseline(profiler, baseline)
        self.profiler = profiler
        self.baseline = baseline

    @abstractmethod
    def __call__(self, loss: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The loss with the penalty; its gradient reaches the probabilities.

        Args:
            loss: scalar.
            probabilities: for each label that the cost depends on, ``(options,)`` numbers that sum to 1.
        """

    @abstractmethod
    def update(self, probabilities: Mapping[str, Tensor]) -> None:
        """Learns from an architecture step, where there is something to learn."""

    @abstractmethod
    def state_dict(self) -> dict[str, float]:
        """What was learned."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes up what `state_dict` returned. Raises ``ValueError`` where it came from another penalty."""

    def excess(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """``expected cost / baseline - 1``: float64 scalar, differentiable; 0 where the baseline is met."""
        return self.profiler.cost.expected(probabilities) / self.baseline - 1


@final
class ExpectationProfilerPenalty(Penalty):
    """The loss with a fixed weight on the expected cost.

    With ``x = f(expected cost / baseline - 1)`` it is ``loss + scale * x`` (``add``) or
    ``loss * (1 + x) ** scale`` (``mul``), where ``f`` is the identity (``linear``), ``max(0, x)``
    (``positive``), ``min(0, x)`` (``negative``) or ``|x|`` (``absolute``). So ``mul`` with ``linear`` is
    ``loss * (cost / baseline) ** scale``, the objective of MnasNet (arXiv 1807.11626, equation 2), and
    ``add`` with ``absolute`` is that of TuNAS (arXiv 2008.06120, equation 1).

    Formulas and arguments are those of NNI 3.0 (microsoft/nni, ``nni/nas/oneshot/pytorch/profiler.py``).
    Departures: the gradient reaches the probabilities (in NNI they pass through numbers, and the
    penalty has no effect); a baseline out of reach is refused; the loss alone is returned.

    Args:
        profiler: what counts.
        baseline: the cost at which the penalty is nothing, in the profiler's unit.
        scale: the weight (``add``) or the exponent (``mul``).
        nonlinear: ``f``.
        aggregate: how loss and penalty are put together.

    Raises:
        ValueError: the baseline is outside of what the space's architectures cost.
    """

    def __init__(
        self,
        profiler: Profiler,
        baseline: float,
        scale: float = 1.0,
        nonlinear: Nonlinear = "linear",
        aggregate: Aggregate = "add",
    ) -> None:
        super().__init__(profiler, baseline)
        self._formula = _Formula(scale, nonlinear, aggregate)

    def __call__(self, loss: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
        return self._formula(loss, _beside(self.excess(probabilities), loss))

    def update(self, probabilities: Mapping[str, Tensor]) -> None:
        pass  # the scale is given

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        _check_keys(state, ())


@final
class LagrangianPenalty(Penalty):
    """The loss with a weight on the expected cost that is learned, so that nobody has to guess it.

    With ``g = expected cost / baseline - 1`` the loss is the augmented Lagrangian for ``g <= 0`` (Nocedal
    and Wright, Numerical Optimization, 2nd edition, equation 17.65)::

        loss + (max(0, multiplier + damping * g) ** 2 - multiplier ** 2) / (2 * damping)

    and after each step ``multiplier = max(0, multiplier + learning_rate * g)``. While the cost is too
    high the weight grows, and while it is low enough it falls, to nothing if need be. The damping term
    answers at once where the multiplier alone would swing around the baseline: together they are the
    proportional and the integral part of a controller (Stooke et al., arXiv 2007.03964).

    The defaults suit losses of a few nats under Adam at a learning rate of 0.01 to 0.05: ten choices of
    seven options whose dearest combination lowers the loss by 0.1, 1 or 7 nats end within
    0.7, 0.6 and 4.5 % of the baseline after 200 to 1,000 steps.

    Args:
        profiler: what counts.
        baseline: the most that the architectures may cost on average, in the profiler's unit.
        learning_rate: the multiplier's step at an excess of 1, which is 100 %.
        damping: the additional weight at an excess of 1.

    Attributes:
        multiplier: what a relative saving is worth now, in units of the loss; never negative.

    Raises:
        ValueError: the baseline is outside of what the space's architectures cost.
    """

    def __init__(
        self, profiler: Profiler, baseline: float, learning_rate: float = 0.2, damping: float = 10.0
    ) -> None:
        super().__init__(profiler, baseline)
        if not (learning_rate > 0 and damping > 0):
            raise ValueError(
                "learning_rate and damping of a LagrangianPenalty must be positive, got "
                f"{learning_rate} and {damping}"
            )
        self.learning_rate = learning_rate
        self.damping = damping
        self.multiplier = 0.0

    def __call__(self, loss: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
        weight = (self.multiplier + self.damping * self.excess(probabilities)).clamp(min=0)
        return loss + _beside((weight**2 - self.multiplier**2) / (2 * self.damping), loss)

    @torch.no_grad()
    def update(self, probabilities: Mapping[str, Tensor]) -> None:
        excess = float(self.excess(probabilities))
        self.multiplier = max(0.0, self.multiplier + self.learning_rate * excess)

    def state_dict(self) -> dict[str, float]:
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        _check_keys(state, ("multiplier",))
        self.multiplier = float(state["multiplier"])


@final
class SampleProfilerPenalty:
    """What a search that tries single architectures minimises: a value with the architecture's cost.

    The formulas are those of `ExpectationProfilerPenalty`, with one architecture's cost for the
    expected one. The value is something to be minimised, such as a loss or an error; `reward` is the
    same for something to be maximised, such as an accuracy.

    Raises:
        ValueError: the baseline is outside of what the space's architectures cost.
    """

    def __init__(
        self,
        profiler: Profiler,
        baseline: float,
        scale: float = 1.0,
        nonlinear: Nonlinear = "linear",
        aggregate: Aggregate = "add",
    ) -> None:
        check_baseline(profiler, baseline)
        self.profiler = profiler
        self.baseline = baseline
        self._formula = _Formula(scale, nonlinear, aggregate)
        self._reward_formula = _Formula(-scale, nonlinear, aggregate)

    def __call__(self, value: float, architecture: Mapping[str, Option]) -> float:
        return self._applied(self._formula, value, architecture)

    def reward(self, value: float, architecture: Mapping[str, Option]) -> float:
        """What is to be maximised: the formula with the opposite sign of the scale.

        So ``add`` with ``absolute`` is the reward of TuNAS, ``Q + beta * |T / T0 - 1|`` (arXiv 2008.06120,
        equation 1), at ``scale = -beta``, and ``mul`` with ``linear`` is that of MnasNet,
        ``Q * (T / T0) ** w`` (arXiv 1807.11626, equation 2), at ``scale = -w``.
        """
        return self._applied(self._reward_formula, value, architecture)

    def _applied(self, formula: _Formula, value: float, architecture: Mapping[str, Option]) -> float:
        excess = self.profiler.profile(architecture) / self.baseline - 1
        found = formula(torch.tensor(value, dtype=torch.float64), torch.tensor(excess, dtype=torch.float64))
        return float(found)


@final
class RangeProfilerFilter:
    """Accepts architectures whose cost is from ``min`` to ``max``, both included.

    Raises:
        ValueError: neither end is given, one is no number, or no architecture of the space is in the range.
    """

    def __init__(self, profiler: Profiler, min: float | None = None, max: float | None = None) -> None:
        if min is None and max is None:
            raise ValueError("a RangeProfilerFilter needs min, max or both; with neither it accepts all")
        self.profiler = profiler
        self.min = -math.inf if min is None else min
        self.max = math.inf if max is None else max
        if math.isnan(self.min) or math.isnan(self.max):
            raise ValueError(f"a range's ends must be numbers of {profiler.unit}; got {min} and {max}")
        if minimise(profiler.cost * 0.0, self.limits) is None:  # any will do
            low, high = profiler.cost.bounds()
            raise ValueError(
                f"no architecture costs {self}; the space has "
                f"{low:.6g} to {high:.6g} {profiler.unit}: give a range that holds some of it"
            )

    def __str__(self) -> str:
        unit = self.profiler.unit
        if self.min == -math.inf:
            return f"at most {self.max:g} {unit}"
        return (
            f"at least {self.min:g} {unit}"
            if self.max == math.inf
            else f"{self.min:g} to {self.max:g} {unit}"
        )

    @property
    def limits(self) -> list[tuple[Cost, float]]:
        """The range as the constraints of `profilers.minimise`."""
        upper = [(self.profiler.cost, self.max)] if self.max < math.inf else []
        return upper + ([(-self.profiler.cost, -self.min)] if self.min > -math.inf else [])

    def filter(self, architecture: Mapping[str, Option]) -> bool:
        """Whether the architecture's cost is in the range."""
        return self.min <= self.profiler.profile(architecture) <= self.max


def check_baseline(profiler: Profiler, baseline: float) -> None:
    """Refuses a cost that no mixture of the space's architectures has.

    Raises:
        ValueError: it is not positive, or not between the space's cheapest and dearest architecture.
    """
    low, high = profiler.cost.bounds()
    if not (low <= baseline <= high and baseline > 0):
        raise ValueError(
            f"a baseline must be a cost that the space can have, positive and from {low:.6g} to {high:.6g} "
            f"{profiler.unit}, got {baseline:g} {profiler.unit}"
        )


@final
class _Formula:
    """NNI's family of penalties, of a value and a relative excess."""

    def __init__(self, scale: float, nonlinear: Nonlinear, aggregate: Aggregate) -> None:
        if nonlinear not in get_args(Nonlinear):
            raise ValueError(f"nonlinear must be one of {get_args(Nonlinear)}, got {nonlinear!r}")
        if aggregate not in get_args(Aggregate):
            raise ValueError(f"aggregate must be one of {get_args(Aggregate)}, got {aggregate!r}")
        self._scale = scale
        self._nonlinear = nonlinear
        self._aggregate = aggregate

    def __call__(self, value: Tensor, excess: Tensor) -> Tensor:
        bent = self._bend(excess)
        if self._aggregate == "add":
            return value + self._scale * bent
        return value * (1 + bent) ** self._scale

    def _bend(self, excess: Tensor) -> Tensor:
        match self._nonlinear:
            case "linear":
                return excess
            case "positive":
                return excess.clamp(min=0)
            case "negative":
                return excess.clamp(max=0)
            case "absolute":
                return excess.abs()


def _beside(number: Tensor, loss: Tensor) -> Tensor:
    """A number on the loss's device, in its type, but never in one too coarse for a few percent."""
    return number.to(loss.device, torch.promote_types(loss.dtype, torch.float32))


def _check_keys(state: Mapping[str, float], keys: tuple[str, ...]) -> None:
    if set(state) != set(keys):
        raise ValueError(
            f"the state belongs to another penalty: it must have {list(keys)}, got {list(state)}; "
            "resume with the penalty that the search was started with"
        )
