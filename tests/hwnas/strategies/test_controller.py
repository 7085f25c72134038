from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn

from hwnas import InputChoice, LayerChoice, ModelSpace, Repeat
from hwnas.strategies.controller import (
    PPO,
    Controller,
    Learner,
    Reinforce,
    _number_of_inputs,
    controller_adam,
)
from tests.hwnas.strategies.tiny import assert_equal
from tests.hwnas.test_space import as_key, nested_space, networks

LEARNERS: Mapping[str, Callable[..., Learner]] = {"reinforce": Reinforce, "ppo": PPO}
every_learner = pytest.mark.parametrize("name", LEARNERS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(count: int) -> list[nn.Module]:
    return [nn.Identity() for _ in range(count)]


def flat_space(*sizes: int) -> ModelSpace:
    choices = [LayerChoice(layers(size), label=f"c{index}") for index, size in enumerate(sizes)]
    return ModelSpace(nn.Sequential(*choices))


def skip_space(inputs: int, n_chosen: int | None = None, choices: int = 1) -> ModelSpace:
    return ModelSpace(
        nn.Sequential(*(InputChoice(inputs, n_chosen, label=f"in{index}") for index in range(choices)))
    )


def tangled_space() -> ModelSpace:
    """Under ``c`` = 0, ``b`` decides about ``a``; under ``c`` = 1, ``a`` decides about ``b``."""

    def choice(label: str, first: nn.Module) -> LayerChoice:
        return LayerChoice([first, nn.ReLU(), nn.Tanh()][: 2 if label == "c" else 3], label=label)

    left, right = choice("b", choice("a", nn.Identity())), choice("a", choice("b", nn.Identity()))
    return ModelSpace(LayerChoice([left, right], label="c"))


def scattered(space: ModelSpace, seed: int = 0, scale: float = 1.0, **options: Any) -> Controller:
    """A controller that is far from uniform."""
    controller = Controller(space, seed=seed, **options)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator(seed)))
    return controller


SPACES = {
    "flat": lambda: flat_space(3, 2, 4),
    "nested": nested_space,
    "tangled": tangled_space,
    "any-inputs": lambda: skip_space(3, choices=2),
    "two-inputs": lambda: skip_space(4, 2),
}
every_space = pytest.mark.parametrize("kind", SPACES)


# ---- what it draws


@every_space
def test_log_prob_and_entropy_equal_those_of_sampling(kind: str) -> None:
    controller = scattered(SPACES[kind]())
    drawn = controller.sample(50, generator())
    again = controller.evaluate(drawn.architectures)
    # One at a time, in another batch: the products may be rounded otherwise.
    alone = [controller.evaluate([architecture]) for architecture in drawn.architectures]
    assert drawn.architectures == again.architectures
    assert torch.equal(again.log_prob, drawn.log_prob)
    assert torch.equal(again.entropy, drawn.entropy)
    torch.testing.assert_close(torch.cat([one.log_prob for one in alone]), drawn.log_prob)
    assert again.log_prob.requires_grad
    assert not drawn.log_prob.requires_grad


@every_space
def test_draws_are_canonical_and_distributed_as_log_prob_says(kind: str) -> None:
    space = SPACES[kind]()
    controller = scattered(space, scale=0.5)
    every = list(space.grid())
    p = controller.evaluate(every).log_prob.detach().exp().double()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    counts = Counter(as_key(a) for a in controller.sample(4000, generator(1)).architectures)
    assert set(counts) <= {as_key(architecture) for architecture in every}
    observed = torch.tensor([counts[as_key(architecture)] for architecture in every]).double()
    # Cells of few draws are one cell, as the test asks for.
    rare = p * 4000 < 5
    cells = [torch.cat([found[~rare], found[rare].sum()[None]]) for found in (observed, 4000 * p / p.sum())]
    cells = [cell[cells[1] > 0] for cell in cells]
    assert chisquare(cells[0], cells[1]).pvalue > 0.001


@settings(max_examples=30, deadline=None)
@given(networks(), st.integers(0, 10))
def test_probabilities_of_all_canonical_architectures_add_up_to_one(network: nn.Module, seed: int) -> None:
    space = ModelSpace(network)
    controller = scattered(space, seed)
    every = list(itertools.islice(space.grid(), 3000))
    total = float(controller.evaluate(every).log_prob.detach().exp().sum())
    assert total == pytest.approx(1, abs=1e-4) if space.size <= 3000 else total < 1.0001
    for architecture in controller.sample(20, generator(seed)).architectures:
        assert space.canonical(architecture) == architecture


def test_choice_that_takes_no_part_changes_neither_log_prob_nor_entropy() -> None:
    space = nested_space()
    controller = scattered(space)
    plain = space.default()
    found = controller.evaluate([plain, {**plain, "inside": "deep", "deep": 3}])
    assert float(found.log_prob[0].detach()) == float(found.log_prob[1].detach())
    assert found.architectures[0] == found.architectures[1] == plain
    # `op` and `depth` and `block0` are all that takes part: at most this many nats.
    most = sum(torch.tensor(float(len(space.options[n]))).log() for n in ("op", "depth", "block0"))
    assert float(found.entropy[0].detach()) <= most


def test_mean_entropy_of_draws_is_the_entropy_of_the_policy() -> None:
    space = nested_space()
    controller = scattered(space, scale=0.5)
    log_p = controller.evaluate(list(space.grid())).log_prob.detach()
    drawn = controller.sample(4000, generator())
    # Four standard errors of the mean.
    error = 4 * float(drawn.entropy.std()) / 4000**0.5
    assert float(drawn.entropy.mean()) == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=error)


def test_choice_shared_with_a_later_branch_is_decided_after_it() -> None:
    shared = LayerChoice(layers(2), label="shared")
    first = LayerChoice([shared, nn.Identity()], label="first")
    last = LayerChoice([nn.Identity(), LayerChoice(layers(2), label="shared")], label="last")
    space = ModelSpace(nn.Sequential(first, last))
    assert list(space.options) == ["first", "shared", "last"]
    controller = scattered(space)
    every = controller.evaluate(list(space.grid()))
    assert space.size == 7
    assert float(every.log_prob.detach().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_inputs_are_independent_bits_given_that_one_is_chosen() -> None:
    space = skip_space(3)
    controller = scattered(space, tanh_constant=None, seed=1)
    subsets = space.options["in0"]
    found = controller.evaluate([{"in0": subset} for subset in subsets]).log_prob.detach().exp()
    p = dict(zip(subsets, found.tolist(), strict=True))
    odds = [p[0, 1] / p[(1,)], p[0, 2] / p[(2,)], p[0, 1, 2] / p[1, 2]]  # of input 0, whatever the others
    assert odds == pytest.approx([odds[0]] * 3, rel=1e-4)
    assert odds[0] != pytest.approx(1, abs=0.05)


def test_tuples_that_are_no_subsets_are_options_like_any_other() -> None:
    assert _number_of_inputs(((0, 1), (0, 2), (1, 2))) == 3
    assert _number_of_inputs(((0,), (1,), (0, 1))) == 2
    for kernels in [
        ((3, 3), (5, 5)),
        ((1, 3), (3, 1)),
        ((0,), (1,)),
        ((1, 10**9), (2, 3)),
        (3, 5),
        ((), (0,)),
    ]:
        assert _number_of_inputs(kernels) is None


def test_greedy_takes_the_most_probable_option_choice_after_choice() -> None:
    controller = scattered(flat_space(3, 2, 4))
    found: dict[str, int] = {}
    for label, options in controller.space.options.items():
        rest = {name: 0 for name in controller.space.options if name not in found}
        ends = [
            [{**found, **rest, label: option, **end} for end in completions(controller.space, label)]
            for option in options
        ]
        totals = [float(controller.evaluate(end).log_prob.detach().exp().sum()) for end in ends]
        found[label] = totals.index(max(totals))
    assert controller.greedy() == found
    assert found != controller.space.default()


def completions(space: ModelSpace, after: str) -> list[dict[str, Any]]:
    labels = list(space.options)
    later = labels[labels.index(after) + 1 :]
    return [
        dict(zip(later, chosen, strict=True))
        for chosen in itertools.product(*(space.options[label] for label in later))
    ]


@every_space
def test_probabilities_are_the_shares_of_draws_in_which_a_choice_takes_part(kind: str) -> None:
    space = SPACES[kind]()
    controller = scattered(space, scale=0.5)
    every = list(space.grid())
    p = controller.evaluate(every).log_prob.detach().exp()
    found = controller.probabilities(3000)
    assert_equal(found, controller.probabilities(3000))
    for label, options in space.options.items():
        exact = torch.zeros(len(options))
        for architecture, share in zip(every, p, strict=True):
            if label in space.active(architecture):
                exact[options.index(architecture[label])] += share
        # Four standard deviations of a share of the fewest draws in which a choice takes part here.
        torch.testing.assert_close(found[label], exact / exact.sum(), atol=0.07, rtol=0)


def test_temperature_and_tanh_bound_the_logits() -> None:
    space = flat_space(5)
    every = [{"c0": option} for option in range(5)]

    def log_p(**options: Any) -> Tensor:
        return scattered(space, **options).evaluate(every).log_prob.detach()

    free = log_p(tanh_constant=None)
    free -= free.mean()
    # Up to the constant that a softmax does not see.
    cooler = log_p(tanh_constant=None, temperature=2.0)
    torch.testing.assert_close(cooler - cooler.mean(), free / 2)
    bounded = log_p(tanh_constant=0.5)
    assert float(bounded.max() - bounded.min()) <= 1.0
    assert float(free.max() - free.min()) > 1.0


def test_initial_weights_are_within_a_tenth_and_follow_the_seed() -> None:
    space = nested_space()
    weights = [
        torch.cat([p.detach().flatten() for p in Controller(space, seed=s).parameters()]) for s in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.099 < float(weights[0].abs().max()) <= 0.1


def test_skip_divergence_is_that_of_the_inputs_that_are_drawn() -> None:
    space = skip_space(3)
    controller = scattered(space, scale=0.3, skip_target=0.4)
    subsets = space.options["in0"]
    found = controller.evaluate([{"in0": subset} for subset in subsets])
    p = found.log_prob.detach().exp()
    expected = 0.0
    for index in range(3):
        taken = sum(float(share) for share, subset in zip(p, subsets, strict=True) if index in subset)
        bit, target = torch.tensor([taken, 1 - taken]), torch.tensor([0.4, 0.6])
        expected += float((bit * (bit / target).log()).sum())
    assert found.skip_divergence.tolist() == pytest.approx([expected] * len(subsets), rel=1e-4)
    assert expected > 0.01
    # The mean over choices: all but equal here, where all are all but uniform.
    one, two = (Controller(skip_space(3, choices=n)).sample(1, generator()).skip_divergence for n in (1, 2))
    assert float(two) == pytest.approx(float(one), rel=0.2)
    assert not scattered(skip_space(4, 2)).sample(3, generator()).skip_divergence.any()


# ---- what it learns


def learner(name: str, controller: Controller, lr: float = 0.01, **options: Any) -> Learner:
    return LEARNERS[name](controller, controller_adam(controller.parameters(), lr), **options)


def moved(controller: Controller, made: Callable[[torch.optim.Optimizer], Learner], *update: Any) -> Tensor:
    """Minus the gradient that one update followed: the way of a step of gradient descent at rate 1."""
    before = [parameter.detach().clone() for parameter in controller.parameters()]
    made(torch.optim.SGD(controller.parameters(), lr=1.0)).update(*update)
    pairs = zip(controller.parameters(), before, strict=True)
    way = torch.cat([(parameter.detach() - start).flatten() for parameter, start in pairs])
    with torch.no_grad():
        for parameter, start in zip(controller.parameters(), before, strict=True):
            parameter.copy_(start)
    return way


@pytest.mark.parametrize("kind", ["bandit", "nested", "any-inputs"])
def test_expected_gradient_of_reinforce_is_that_of_expected_reward_and_entropy(kind: str) -> None:
    space = flat_space(4) if kind == "bandit" else SPACES[kind]()
    controller = scattered(space, scale=0.3)
    every = list(space.grid())
    rewards = torch.randn(len(every), generator=generator(7))
    p = controller.evaluate(every).log_prob.detach().exp()

    def reinforce(optimizer: torch.optim.Optimizer) -> Learner:
        made = Reinforce(controller, optimizer, entropy_weight=0.3, skip_weight=0.2)
        made.baseline = 0.4  # any: it must not matter on average
        return made

    found = sum(
        share * moved(controller, reinforce, [architecture], [float(reward)])
        for architecture, reward, share in zip(every, rewards, p, strict=True)
    )
    draws = controller.evaluate(every)
    chance = draws.log_prob.exp()
    objective = (chance * (rewards - 0.3 * draws.log_prob)).sum()
    # The divergence of a choice is followed where it was met, not how often it is met.
    objective = objective - 0.2 * (p * draws.skip_divergence).sum()
    objective.backward()  # type: ignore[no-untyped-call]  # torch's own
    expected = [torch.zeros_like(w) if w.grad is None else w.grad for w in controller.parameters()]
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), atol=1e-5, rtol=1e-3)


def test_aggregated_update_is_the_mean_of_its_episodes() -> None:
    controller = scattered(flat_space(3, 3))
    drawn = controller.sample(6, generator()).architectures
    rewards = [0.1, 0.9, 0.3, 0.2, 0.8, 0.5]

    def made(baseline: float, optimizer: torch.optim.Optimizer) -> Learner:
        found = Reinforce(controller, optimizer, baseline_decay=0.9)
        found.baseline = baseline
        return found

    together = moved(controller, partial(made, 0.5), drawn, rewards)
    baseline, apart = 0.5, torch.zeros_like(together)
    for architecture, reward in zip(drawn, rewards, strict=True):
        apart += moved(controller, partial(made, baseline), [architecture], [reward]) / 6
        entropy = float(controller.evaluate([architecture]).entropy.detach())
        baseline = 0.9 * baseline + 0.1 * (reward + 1e-4 * entropy)
    torch.testing.assert_close(together, apart)


@every_learner
def test_baseline_starts_at_the_first_mean_and_decays_episode_by_episode(name: str) -> None:
    made = learner(name, Controller(flat_space(3)), baseline_decay=0.8, entropy_weight=0.0)
    assert made.baseline is None
    made.update([{"c0": 0}, {"c0": 1}], [1.0, 2.0])
    assert made.baseline == pytest.approx(0.8 * (0.8 * 1.5 + 0.2 * 1.0) + 0.2 * 2.0)
    before = made.baseline
    made.update([{"c0": 0}], [5.0])
    assert made.baseline == pytest.approx(0.8 * before + 0.2 * 5.0)


@every_learner
def test_update_returns_what_was_said_before_it(name: str) -> None:
    controller = scattered(nested_space(), scale=0.5)
    drawn = controller.sample(5, generator())
    returned = learner(name, controller).update(drawn.architectures, [1.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(returned.log_prob, drawn.log_prob)
    assert not returned.entropy.requires_grad
    assert not torch.equal(controller.evaluate(drawn.architectures).log_prob, drawn.log_prob)


def test_ppo_gains_nothing_beyond_its_clip() -> None:
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5]).log()
    ppo = PPO(Controller(flat_space(2)), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), clip=0.2)
    for advantage, has_gradient in [(1.0, [True, True, True, False]), (-1.0, [False, True, True, True])]:
        log_prob = ratio.clone().requires_grad_()
        gain = ppo.surrogate(log_prob, torch.zeros(4), torch.full((4,), advantage))
        (gradient,) = torch.autograd.grad(gain.sum(), log_prob)
        assert (gradient != 0).tolist() == has_gradient
    assert gain.tolist() == pytest.approx([-0.8, -0.9, -1.1, -1.5])


def test_first_step_of_ppo_is_that_of_reinforce() -> None:
    controller = scattered(flat_space(3, 3))
    drawn = controller.sample(4, generator()).architectures
    update = (drawn, [0.1, 0.9, 0.3, 0.2])
    ppo = moved(controller, lambda optimizer: PPO(controller, optimizer, epochs=1), *update)
    torch.testing.assert_close(ppo, moved(controller, lambda opt: Reinforce(controller, opt), *update))


@every_learner
@pytest.mark.parametrize("seed", range(3))
def test_best_arm_of_a_bandit_is_found(name: str, seed: int) -> None:
    controller = Controller(flat_space(5), seed=seed)
    made, source = learner(name, controller), generator(seed)
    means = [0.2, 0.5, 0.7, 0.4, 0.3]
    for _ in range(150):
        drawn = controller.sample(4, source).architectures
        noise = (0.1 * torch.randn(4, generator=source)).tolist()
        made.update(drawn, [means[a["c0"]] + n for a, n in zip(drawn, noise, strict=True)])
    assert controller.greedy() == {"c0": 2}
    # The logits are within ±1.5: no more than exp(3) / (exp(3) + 4) = 0.83.
    assert float(controller.probabilities()["c0"][2]) > 0.6


def additive_rewards(space: ModelSpace, seed: int) -> Callable[[Mapping[str, Any]], float]:
    """A number for each option of each choice that takes part, evenly spaced and shuffled; their sum."""
    source = generator(seed)
    numbers = {
        label: torch.randperm(len(options), generator=source) / len(options) / len(space.options)
        for label, options in space.options.items()
    }
    return lambda a: sum(
        float(numbers[label][space.options[label].index(option)]) for label, option in space.active(a).items()
    )


def episodes_to_the_best(name: str, space: ModelSpace, seed: int, most: int = 3000) -> int:
    """How many episodes, ten to an update, until the most probable architecture is the best one."""
    reward = additive_rewards(space, seed)
    best = max(space.grid(), key=reward)
    controller = Controller(space, seed=seed)
    made, source = learner(name, controller), generator(seed)
    for episodes in range(10, most + 1, 10):
        drawn = controller.sample(10, source).architectures
        made.update(drawn, [reward(architecture) for architecture in drawn])
        if controller.greedy() == best:
            return episodes
    return most + 1


@pytest.mark.parametrize(
    ("kind", "name", "most"),
    [
        ("flat", "reinforce", 300),
        ("nested", "reinforce", 1600),
        ("flat", "ppo", 600),
        ("nested", "ppo", 1100),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_best_architecture_of_an_additive_reward_is_found(kind: str, name: str, most: int, seed: int) -> None:
    space = flat_space(4, 4, 4, 4) if kind == "flat" else SPACES[kind]()
    assert episodes_to_the_best(name, space, seed, most) <= most


def test_ppo_needs_fewer_episodes_than_reinforce() -> None:
    space = flat_space(4, 4, 4, 4)
    medians = {
        name: statistics.median(episodes_to_the_best(name, space, seed, 600) for seed in range(9))
        for name in LEARNERS
    }
    assert medians["ppo"] <= 0.7 * medians["reinforce"]


@every_learner
def test_entropy_weight_keeps_entropy_up(name: str) -> None:
    found = {}
    for weight in (0.0, 1.0):
        controller = Controller(flat_space(4, 4), tanh_constant=None)
        made, source = learner(name, controller, entropy_weight=weight), generator()
        for _ in range(100):
            drawn = controller.sample(5, source).architectures
            made.update(drawn, [float(a["c0"] == 1) + float(a["c1"] == 2) for a in drawn])
        found[weight] = float(controller.sample(100, generator()).entropy.mean())
    assert found[0.0] < 0.7
    assert found[1.0] > 1.5  # of 2.77 nats


@every_learner
def test_skip_weight_draws_the_inputs_towards_the_target(name: str) -> None:
    shares = {}
    for target in (0.25, 0.75):
        controller = Controller(skip_space(4, choices=2), skip_target=target)
        made, source = learner(name, controller, skip_weight=0.8), generator()
        for _ in range(100):
            made.update(controller.sample(5, source).architectures, [0.5] * 5)
        drawn = controller.sample(500, generator()).architectures
        shares[target] = sum(len(subset) for a in drawn for subset in a.values()) / (500 * 2 * 4)
    # At least one input is taken, so the lower target is met from above.
    assert 0.25 < shares[0.25] < 0.4
    assert shares[0.75] == pytest.approx(0.75, abs=0.05)


# ---- checkpoints and surroundings


@every_learner
def test_resumed_learning_equals_uninterrupted_learning(name: str, tmp_path: Any) -> None:
    space = nested_space()
    reward = additive_rewards(space, 0)

    def learn(made: Learner, first: int, last: int) -> Learner:
        for step in range(first, last):
            drawn = made.controller.sample(3, generator(step)).architectures
            made.update(drawn, [reward(architecture) for architecture in drawn])
        return made

    whole = learn(learner(name, Controller(space)), 0, 8)
    torch.save(learn(learner(name, Controller(space)), 0, 5).state_dict(), tmp_path / "state")
    other = learner(name, Controller(space, seed=9))
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert_equal(learn(other, 5, 8).state_dict(), whole.state_dict())


@every_learner
def test_surroundings_in_bfloat16_or_without_gradients_change_nothing(name: str) -> None:
    space = nested_space()

    def learned() -> Any:
        made = learner(name, Controller(space), skip_weight=0.1)
        for step in range(3):
            drawn = made.controller.sample(4, generator(step)).architectures
            made.update(drawn, [0.1, 0.5, 0.2, 0.9])
        return {**made.state_dict(), "probabilities": made.controller.probabilities(50)}

    alone = learned()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            inside = learned()
    finally:
        torch.set_default_dtype(before)
    assert_equal(inside, alone)
    assert {w.dtype for w in inside["controller"]["weights"].values()} == {torch.float32}


@every_learner
def test_learning_inside_inference_mode_changes_nothing(name: str) -> None:
    states = []
    for is_inside in (False, True):
        made = learner(name, Controller(nested_space()))
        for step in range(2):
            with torch.inference_mode(is_inside):
                drawn = made.controller.sample(2, generator(step)).architectures
                made.update(drawn, [0.1, 0.5])
        states.append(made.state_dict())
    assert_equal(*states)


def test_draws_neither_use_nor_move_global_random_numbers() -> None:
    before = torch.get_rng_state()
    controller = Controller(nested_space())
    controller.sample(3, generator())
    controller.probabilities(3)
    learner("ppo", controller).update([controller.greedy()], [1.0])
    assert torch.equal(torch.get_rng_state(), before)


# ---- errors


def test_architecture_of_another_space_is_refused() -> None:
    with pytest.raises(ValueError, match=r"choice 'c0' has the options \[0, 1\]; got 9"):
        Controller(flat_space(2)).evaluate([{"c0": 9}])


def test_state_of_another_space_or_size_is_refused() -> None:
    state = Controller(flat_space(3, 2)).state_dict()
    with pytest.raises(
        ValueError, match=r"another space.*'c0' \(3 there, 2 here\), 'c1' \(2 there, 0 here\)"
    ):
        Controller(flat_space(2)).load_state_dict(state)
    with pytest.raises(ValueError, match="hidden_size of 64, this one of 8"):
        Controller(flat_space(3, 2), hidden_size=8).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "must be positive; got 0, 1.0 and 1.5"),
        ({"temperature": 0.0}, "must be positive; got 64, 0.0 and 1.5"),
        ({"tanh_constant": -1.0}, "must be positive; got 64, 1.0 and -1.0"),
        ({"skip_target": 1.0}, "skip_target is a share.*got 1.0"),
    ],
)
def test_numbers_of_a_controller_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Controller(flat_space(2), **options)


@every_learner
@pytest.mark.parametrize(
    "options", [{"baseline_decay": 1.0}, {"entropy_weight": -1.0}, {"skip_weight": -1.0}]
)
def test_numbers_of_a_learner_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="baseline_decay must be from 0 to under 1"):
        learner(name, Controller(flat_space(2)), **options)


def test_numbers_of_ppo_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="clip of PPO must be between 0 and 1; got 0"):
        learner("ppo", Controller(flat_space(2)), clip=0.0)
    with pytest.raises(ValueError, match="epochs at least 1"):
        learner("ppo", Controller(flat_space(2)), epochs=0)


@every_learner
@pytest.mark.parametrize(
    ("rewards", "message"),
    [([], "one reward for each; got 1 and 0"), ([float("nan")], r"finite numbers; got \[nan\]")],
)
def test_rewards_that_say_nothing_are_refused(name: str, rewards: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(name, Controller(flat_space(2))).update([{"c0": 0}], rewards)


def test_repeat_is_decided_before_what_its_blocks_hold() -> None:
    blocks = [LayerChoice(layers(2), label=f"b{index}") for index in range(3)]
    space = ModelSpace(Repeat(blocks, (1, 3), label="depth"))
    drawn = scattered(space).sample(40, generator()).architectures
    assert {a["depth"] for a in drawn} == {1, 2, 3}
    assert all(a[f"b{index}"] == 0 for a in drawn for index in range(a["depth"], 3))
