"""The controller of ENAS: a recurrent policy over a space's choices, and how it learns from rewards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, final

import torch
from torch import Tensor, nn

from hwnas.activity import Activity
from hwnas.space import ModelSpace
from profilers.space import Architecture, Option


@final
@dataclass(frozen=True)
class Draws:
    """Architectures with what the controller says of them.

    Attributes:
        architectures: canonical ones.
        log_prob: ``(architectures,)``, in nats.
        entropy: ``(architectures,)``: the entropies of the distributions that an architecture's choices were
            drawn from, added up, in nats. Its expectation is the entropy of the whole policy.
        skip_divergence: ``(architectures,)``: for each choice of any number of inputs, the divergence of its
            inputs' probabilities from the skip target, added up over inputs, in nats; the mean over such
            choices, 0 without any.
    """

    architectures: list[Architecture]
    log_prob: Tensor
    entropy: Tensor
    skip_divergence: Tensor


@final
class Controller:
    """The policy of ENAS: an LSTM that decides choice after choice (arXiv 1802.03268, section 2).

    Its input is an embedding of the option that was drawn last; what it puts out are the logits of the
    next choice's options. Choices are decided in the space's order, but after those that decide whether
    they take part. A choice that takes no part under what was drawn so far is left out: it gets its
    default, adds nothing to the log-probability or the entropy, and the LSTM takes no step. So what
    is drawn is canonical, and the probabilities of all canonical architectures add up to 1.

    A choice of inputs (an `InputChoice` with more than one chosen) has one number ``q`` for each input, and
    the logit of a subset is the sum of ``q`` over the inputs that it holds, less the sum over the others.
    These are the independent bits of the paper's skip connections, under the condition that the choice
    can take what they say: a subset that is not empty, or is of the given size. They need as many
    numbers as there are inputs, where a free distribution needs one for each subset.

    Numbers and initialisation are those of the authors' code (melodyguan/enas,
    ``src/cifar10/general_controller.py`` and ``scripts/cifar10_macro_search.sh``): weights uniform in ±0.1,
    no biases, logits ``tanh_constant * tanh(logit / temperature)``. Departures: embeddings and output
    weights belong to one choice each, since choices differ in their options; the numbers of a choice of
    inputs are linear in the LSTM's state (there: attention to the states of earlier layers); entropies are
    exact (there: of the drawn option alone); the divergence from the skip target is that of the
    probabilities that are drawn from (there ``sigmoid(q)``, while ``sigmoid(2q)`` is drawn from).

    All of it is float32 on the CPU, whatever the precision and the device of the network: a few hundred
    small steps in a row are fastest there.

    Args:
        space: whose choices are decided.
        hidden_size: of the embeddings and of the LSTM. The paper's text has 100, its code 64.
        temperature: divides the logits: above 1, draws are closer to uniform. The paper's language model
            has 5.
        tanh_constant: bounds the logits, so that no option is ruled out; None: they are not bounded. The
            paper's language model has 2.5.
        skip_target: the share of inputs that a choice of any number of inputs should take (see
            `Draws.skip_divergence`), between 0 and 1.
        seed: of the initial weights.

    Raises:
        ValueError: a size or number out of range.

    >>> from hwnas import LayerChoice
    >>> space = ModelSpace(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="act")))
    >>> draws = Controller(space).sample(3, torch.Generator().manual_seed(0))
    >>> draws.architectures
    [{'act': 1}, {'act': 0}, {'act': 0}]
    """

    def __init__(
        self,
        space: ModelSpace,
        hidden_size: int = 64,
        temperature: float = 1.0,
        tanh_constant: float | None = 1.5,
        skip_target: float = 0.4,
        seed: int = 0,
    ) -> None:
        if hidden_size < 1 or not temperature > 0 or not (tanh_constant is None or tanh_constant > 0):
            raise ValueError(
                "hidden_size, temperature and tanh_constant (or None) of a controller must be positive; "
                f"got {hidden_size}, {temperature} and {tanh_constant}"
            )
        if not 0 < skip_target < 1:
            raise ValueError(
                f"skip_target is a share of the inputs and must be between 0 and 1; got {skip_target}"
            )
        self.space = space
        self.temperature = temperature
        self.tanh_constant = tanh_constant
        self.skip_target = skip_target
        self._hidden_size = hidden_size
        choices: dict[str, _Choice] = {}
        first = 0
        for label, options in space.options.items():
            choices[label] = _Choice(label, options, space.activity[label], first)
            first = choices[label].rows.stop
        self._visits = [choices[label] for label in _order(space.activity)]
        self._start = _parameter(1, hidden_size)
        self._input_weights = _parameter(4 * hidden_size, hidden_size)
        self._state_weights = _parameter(4 * hidden_size, hidden_size)
        self._embeddings = _parameter(first, hidden_size)
        self._heads = _parameter(first, hidden_size)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)

    def parameters(self) -> list[nn.Parameter]:
        return list(self._named_parameters().values())

    # ---- what it says

    def sample(self, count: int, generator: torch.Generator) -> Draws:
        """``count`` independent draws, without a graph."""

        def draw(_: _Choice, log_p: Tensor, rows: list[int]) -> Tensor:
            return torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(1)

        with torch.no_grad():
            return self._run(count, draw)

    def evaluate(self, architectures: Sequence[Mapping[str, Option]]) -> Draws:
        """What would have been said had these been drawn, differentiable with respect to `parameters`.

        Raises:
            ValueError: an architecture is not one of the space.
        """
        canonical = [self.space.canonical(architecture) for architecture in architectures]

        def follow(choice: _Choice, _: Tensor, rows: list[int]) -> Tensor:
            return torch.tensor([choice.index[canonical[row][choice.label]] for row in rows])

        return self._run(len(canonical), follow)

    def greedy(self) -> Architecture:
        """The architecture of the most probable option, choice after choice."""
        with torch.no_grad():
            return self._run(1, lambda _, log_p, __: log_p.argmax(dim=1)).architectures[0]

    def probabilities(self, count: int = 256, seed: int = 0) -> dict[str, Tensor]:
        """For each label how probable its options are where it takes part, estimated from draws.

        Args:
            count: how many architectures are drawn. The estimate is the mean of the distributions that were
                drawn from, not of the draws, and so exact for a choice that comes first.
            seed: of the draws. Uniform where a choice took part in none of them.
        """
        generator = torch.Generator().manual_seed(seed)
        sums = {label: self._start.new_zeros(len(found)) for label, found in self.space.options.items()}

        def draw(choice: _Choice, log_p: Tensor, rows: list[int]) -> Tensor:
            sums[choice.label] += log_p.exp().sum(dim=0)
            return torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(1)

        with torch.no_grad():
            self._run(count, draw)
        return {
            label: total / total.sum() if total.any() else torch.full_like(total, 1 / len(total))
            for label, total in sums.items()
        }

    def _run(self, count: int, pick: Callable[[_Choice, Tensor, list[int]], Tensor]) -> Draws:
        """Decides ``count`` architectures at once; ``pick`` says which options are taken.

        It is given the choice, the log-probabilities ``(rows, options)`` and which architectures the rows
        are, and returns option indices ``(rows,)``.
        """
        # Whoever calls may be inside the autocast of a network's step.
        with torch.autocast("cpu", enabled=False):
            found: list[Architecture] = [{} for _ in range(count)]
            like = self._start
            hidden, cell = like.new_zeros(2, count, self._hidden_size)
            inputs = self._start.expand(count, -1)
            log_prob, entropy, skips, skip_choices = like.new_zeros(4, count)
            for choice in self._visits:
                rows = [row for row, drawn in enumerate(found) if choice.is_due(drawn)]
                if not rows:
                    continue
                at = torch.tensor(rows)
                new_hidden, new_cell = torch.lstm_cell(
                    inputs[at], (hidden[at], cell[at]), self._input_weights, self._state_weights
                )
                log_p = self._log_probabilities(choice, new_hidden)
                picked = pick(choice, log_p, rows)
                for row, index in zip(rows, picked.tolist(), strict=True):
                    found[row][choice.label] = choice.options[index]
                hidden = hidden.index_copy(0, at, new_hidden)
                cell = cell.index_copy(0, at, new_cell)
                embedded = choice.to_embedding[picked] @ self._embeddings[choice.rows]
                inputs = inputs.index_copy(0, at, embedded)
                log_prob = log_prob.index_add(0, at, log_p.gather(1, picked[:, None]).squeeze(1))
                entropy = entropy.index_add(0, at, -(log_p.exp() * log_p).sum(dim=1))
                if choice.takes_any_number:
                    skips = skips.index_add(0, at, self._skip_divergence(choice, log_p.exp()))
                    skip_choices = skip_choices.index_add(0, at, torch.ones_like(skips[at]))
        default = self.space.default()
        architectures = [{label: drawn.get(label, default[label]) for label in default} for drawn in found]
        return Draws(architectures, log_prob, entropy, skips / skip_choices.clamp(min=1))

    def _log_probabilities(self, choice: _Choice, hidden: Tensor) -> Tensor:
        """Of each option, ``(rows, options)``, given the LSTM's state ``(rows, hidden_size)``."""
        numbers = hidden @ self._heads[choice.rows].T / self.temperature
        if self.tanh_constant is not None:
            numbers = self.tanh_constant * numbers.tanh()
        return (numbers @ choice.to_logits.T).log_softmax(dim=1)

    def _skip_divergence(self, choice: _Choice, p: Tensor) -> Tensor:
        """``KL(taken or not || skip target or not)`` of each input, added up; shape ``(rows,)``."""
        least = torch.finfo(p.dtype).tiny
        taken = p @ (choice.to_logits > 0).to(p.dtype)
        left = p @ (choice.to_logits < 0).to(p.dtype)
        to_taken = taken * (taken.clamp(min=least) / self.skip_target).log()
        to_left = left * (left.clamp(min=least) / (1 - self.skip_target)).log()
        return (to_taken + to_left).sum(dim=1)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python."""
        weights = {name: found.detach().clone() for name, found in self._named_parameters().items()}
        return {"options": self._sizes(), "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the state belongs to another space or size."""
        here, there = self._sizes(), dict(state["options"])
        if here != there:
            differing = sorted(label for label in {*here, *there} if here.get(label) != there.get(label))
            raise ValueError(
                "the checkpoint belongs to another space: numbers of options differ at "
                + ", ".join(f"'{n}' ({there.get(n, 0)} there, {here.get(n, 0)} here)" for n in differing)
            )
        size = state["weights"]["start"].shape[1]
        if size != self._hidden_size:
            raise ValueError(
                f"the checkpoint's controller has a hidden_size of {size}, this one of {self._hidden_size}; "
                "resume with the hidden_size that the search was started with"
            )
        with torch.no_grad():
            for name, parameter in self._named_parameters().items():
                parameter.copy_(state["weights"][name])

    def _sizes(self) -> dict[str, int]:
        return {label: len(options) for label, options in self.space.options.items()}

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            "start": self._start,
            "embeddings": self._embeddings,
            "input": self._input_weights,
            "state": self._state_weights,
            "heads": self._heads,
        }


class Learner(ABC):
    """Makes a controller better by the rewards of architectures that it drew.

    It goes up the gradient of ``E[reward] + entropy_weight * entropy of the policy - skip_weight * E[skip
    divergence]``. The baseline ``b`` makes the steps less noisy: an episode of return ``r`` (the reward
    and its share of the entropy, as in the authors' code) counts by ``r - b``, and then
    ``b = baseline_decay * b + (1 - baseline_decay) * r``, one episode after the other; so the decay means
    the same however many episodes make an update, and no episode is compared with itself.

    Departures from the authors' code: ``b`` starts at the mean return of the first update instead of 0,
    where all that is drawn first would look good; an entropy's own gradient is followed beside its share of
    the return, which alone says nothing about a single choice.

    Args:
        controller: what learns.
        optimizer: over ``controller.parameters()``.
        entropy_weight: what a nat of the policy's entropy is worth, in units of the reward.
        skip_weight: what a nat of `Draws.skip_divergence` costs; the authors' macro search has 0.8.
        baseline_decay: what is left of the baseline after an episode, from 0 to under 1.
        epochs: how often an update goes over its episodes.

    Attributes:
        baseline: the moving average; None before the first update.

    Raises:
        ValueError: a decay or weight out of range.
    """

    def __init__(
        self,
        controller: Controller,
        optimizer: torch.optim.Optimizer,
        entropy_weight: float,
        skip_weight: float,
        baseline_decay: float,
        epochs: int,
    ) -> None:
        if not 0 <= baseline_decay < 1 or entropy_weight < 0 or skip_weight < 0 or epochs < 1:
            raise ValueError(
                "baseline_decay must be from 0 to under 1, entropy_weight and skip_weight not negative, and "
                f"epochs at least 1; got {baseline_decay}, {entropy_weight}, {skip_weight} and {epochs}"
            )
        self.controller = controller
        self.optimizer = optimizer
        self.entropy_weight = entropy_weight
        self.skip_weight = skip_weight
        self.baseline_decay = baseline_decay
        self.epochs = epochs
        self.baseline: float | None = None

    @abstractmethod
    def surrogate(self, log_prob: Tensor, drawn_log_prob: Tensor, advantage: Tensor) -> Tensor:
        """What is made larger, for each episode.

        Args:
            log_prob: ``(episodes,)``, under the controller as it is now; leads to its parameters.
            drawn_log_prob: ``(episodes,)``, under the controller that drew the episodes.
            advantage: ``(episodes,)``, return less baseline.
        """

    def update(self, architectures: Sequence[Mapping[str, Option]], rewards: Sequence[float]) -> Draws:
        """Learns from episodes that the controller, as it is now, has drawn.

        Returns:
            What the controller said of them before, without a graph.

        Raises:
            ValueError: no episode, another number of rewards, or a reward that is no finite number.
        """
        if not architectures or len(architectures) != len(rewards):
            raise ValueError(
                "an update takes at least one architecture, and one reward for each; "
                f"got {len(architectures)} and {len(rewards)}"
            )
        if not all(math.isfinite(reward) for reward in rewards):
            raise ValueError(f"rewards must be finite numbers; got {[float(reward) for reward in rewards]}")
        # Whoever calls may be inside the autocast of a network's step, or of `no_grad`, which ends here, too.
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            drawn = draws = self.controller.evaluate(architectures)
            returns = [
                float(reward) + self.entropy_weight * entropy
                for reward, entropy in zip(rewards, drawn.entropy.tolist(), strict=True)
            ]
            advantage = torch.tensor(self._advantages(returns), dtype=torch.float32)
            for epoch in range(self.epochs):
                if epoch:
                    draws = self.controller.evaluate(architectures)
                gain = self.surrogate(draws.log_prob, drawn.log_prob.detach(), advantage)
                gain = gain + self.entropy_weight * draws.entropy - self.skip_weight * draws.skip_divergence
                self.optimizer.zero_grad()
                (-gain.mean()).backward()  # type: ignore[no-untyped-call]  # torch's own
                self.optimizer.step()
            self.optimizer.zero_grad()
        return Draws(
            drawn.architectures,
            drawn.log_prob.detach(),
            drawn.entropy.detach(),
            drawn.skip_divergence.detach(),
        )

    def _advantages(self, returns: Sequence[float]) -> list[float]:
        baseline = sum(returns) / len(returns) if self.baseline is None else self.baseline
        advantages = []
        for found in returns:
            advantages.append(found - baseline)
            baseline = self.baseline_decay * baseline + (1 - self.baseline_decay) * found
        self.baseline = baseline
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """Controller, optimiser and baseline, as tensors and plain Python."""
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "baseline": self.baseline,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the state belongs to another space or size."""
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.baseline = state["baseline"]


@final
class Reinforce(Learner):
    """The policy gradient of the paper: ``advantage * log p``, one step for an update.

    Arguments as in `Learner`.
    """

    def __init__(
        self,
        controller: Controller,
        optimizer: torch.optim.Optimizer,
        entropy_weight: float = 1e-4,
        skip_weight: float = 0.0,
        baseline_decay: float = 0.99,
    ) -> None:
        super().__init__(controller, optimizer, entropy_weight, skip_weight, baseline_decay, epochs=1)

    def surrogate(self, log_prob: Tensor, drawn_log_prob: Tensor, advantage: Tensor) -> Tensor:
        return advantage * log_prob


@final
class PPO(Learner):
    """Proximal policy optimisation (arXiv 1707.06347, equation 7): several steps for an update.

    An architecture is one action: the ratio is that of its whole probability. The advantage is that of the
    moving baseline; there is no critic, since an episode has one reward and no states in between.

    With additive rewards and ten episodes an update at a learning rate of 0.01, the best of 256 architectures
    was the most probable one after 10 to 530 episodes (median of 16 seeds: 45; `Reinforce`: 100), the best of
    82 nested ones after 10 to 1,010 (median 115; `Reinforce`: 260).

    Args:
        controller, optimizer, entropy_weight, skip_weight, baseline_decay: as in `Learner`.
        clip: beyond a change of the probability by this share there is nothing more to gain.
        epochs: steps for an update, each over all its episodes.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        controller: Controller,
        optimizer: torch.optim.Optimizer,
        entropy_weight: float = 1e-4,
        skip_weight: float = 0.0,
        baseline_decay: float = 0.99,
        clip: float = 0.2,
        epochs: int = 4,
    ) -> None:
        super().__init__(controller, optimizer, entropy_weight, skip_weight, baseline_decay, epochs)
        if not 0 < clip < 1:
            raise ValueError(f"clip of PPO must be between 0 and 1; got {clip}")
        self.clip = clip

    def surrogate(self, log_prob: Tensor, drawn_log_prob: Tensor, advantage: Tensor) -> Tensor:
        ratio = (log_prob - drawn_log_prob).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return torch.minimum(ratio * advantage, clipped * advantage)


def controller_adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimiser of the authors' code: Adam without momentum, ``src/utils.py``."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.999), eps=1e-3)


@final
class _Choice:
    """One choice as the controller sees it.

    Attributes:
        rows: its part of the embeddings and output weights: one row an option, or one an input.
        to_logits: float32 ``(options, rows)``: which of its numbers make an option's logit.
        to_embedding: float32 ``(options, rows)``: which of its embeddings make an option's.
        takes_any_number: whether it is a choice of any number of inputs.
    """

    def __init__(self, label: str, options: tuple[Option, ...], activity: Activity, first: int) -> None:
        self.label = label
        self.options = options
        self.index = {option: index for index, option in enumerate(options)}
        self._is_always = activity.is_always()
        self._paths = activity.paths
        inputs = _number_of_inputs(options)
        self.takes_any_number = inputs is not None and len({len(option) for option in options}) > 1
        if inputs is None:
            self.to_logits = self.to_embedding = torch.eye(len(options), dtype=torch.float32)
        else:
            holds = torch.zeros(len(options), inputs, dtype=torch.float32)
            for row, subset in zip(holds, options, strict=True):
                row[list(subset)] = 1.0
            self.to_logits = 2 * holds - 1
            self.to_embedding = holds / holds.sum(dim=1, keepdim=True)
        self.rows = slice(first, first + self.to_logits.shape[1])

    def is_due(self, drawn: Mapping[str, Option]) -> bool:
        """Whether it takes part, as far as is known, and has not been decided.

        A path that hangs on a choice without a decision does not run: either it will, once that
        choice was decided, or that choice takes no part itself.
        """
        if self.label in drawn:
            return False
        return self._is_always or any(
            all(all(label in drawn for label in c.labels) and c.holds(drawn) for c in path)
            for path in self._paths
        )


def _number_of_inputs(options: tuple[Option, ...]) -> int | None:
    """Of how many inputs the options are all subsets, of one size above 1 or of any; None: they are not."""
    if not all(isinstance(option, tuple) and option for option in options):
        return None
    if not all(type(index) is int and index >= 0 for option in options for index in option):
        return None
    inputs = 1 + max(index for option in options for index in option)
    sizes = sorted({len(option) for option in options})
    if sizes == [1] or (len(sizes) > 1 and (sizes[0], sizes[-1], len(sizes)) != (1, inputs, inputs)):
        return None
    if len(options) != sum(math.comb(inputs, size) for size in sizes):  # before all are enumerated
        return None
    return (
        inputs if set(options) == {s for size in sizes for s in combinations(range(inputs), size)} else None
    )


def _order(activity: Mapping[str, Activity]) -> list[str]:
    """The labels in an order in which a choice comes after those that decide whether it takes part.

    Where shared labels make choices decide about one another, which comes first hangs on what is drawn:
    such choices are visited again and again, as often as there are of them; each visit decides one.
    """
    order: list[str] = []
    left = list(activity)
    while left:
        ready = next((label for label in left if not {*activity[label].labels()} & {*left}), None)
        if ready is None:
            return order + left * len(left)
        order.append(ready)
        left.remove(ready)
    return order


def _parameter(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns, device="cpu", dtype=torch.float32))
