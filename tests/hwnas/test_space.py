from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import re
from collections import Counter as Tally
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hwnas import Gate, InputChoice, LayerChoice, ModelSpace, Repeat, ValueChoice, keep_gates
from hwnas.nn import Conv2d, Linear
from hwnas.strategies import DARTS


class Number(nn.Module):
    """Holds one value choice that its forward pass reads."""

    def __init__(self, options: list[Any], label: str) -> None:
        super().__init__()
        self.number = ValueChoice(options, label=label)

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.number)


def nested_space() -> ModelSpace:
    """``inside`` and ``deep`` are read under ``op`` alone; ``shared`` under ``op`` or the third block."""
    blocks = [Number([1, 2], "block0"), nn.Identity(), Number([1, 2, 3], "shared")]
    inner = LayerChoice({"plain": nn.Identity(), "deep": Number([1, 2, 3], "deep")}, label="inside")
    nested = nn.Sequential(inner, Number([1, 2, 3], "shared"))
    return ModelSpace(
        nn.Sequential(
            LayerChoice({"skip": nn.Identity(), "nested": nested}, label="op"),
            Repeat(blocks, (1, 3), label="depth"),
        )
    )


def every_architecture(space: ModelSpace) -> list[dict[str, Any]]:
    return [
        dict(zip(space.options, chosen, strict=True)) for chosen in itertools.product(*space.options.values())
    ]


def as_key(architecture: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(architecture.items())


@st.composite
def networks(draw: st.DrawFn, depth: int = 0) -> nn.Module:
    """Random nests of choices whose labels are sometimes shared (every label has options 0 and 1)."""
    kinds = ["leaf", "number", "layers", "chain"] if depth < 3 else ["leaf", "number"]
    label = draw(st.sampled_from("abcde"))
    match draw(st.sampled_from(kinds if depth else ["layers", "chain"])):
        case "leaf":
            return nn.Identity()
        case "number":
            return Number([0, 1], "value " + label)
        case "layers":
            return LayerChoice([draw(networks(depth + 1)) for _ in range(2)], label="layer " + label)
        case _:
            blocks = [draw(networks(depth + 1)) for _ in range(2)]
            first = draw(networks(depth + 1))
            return nn.Sequential(first, Repeat(blocks, [1, 2], label="depth " + label))


# ---- canonical architectures


@given(networks())
@settings(deadline=None, max_examples=150)
def test_size_equals_grid_equals_brute_force(network: nn.Module) -> None:
    space = ModelSpace(network)
    brute = {as_key(space.canonical(architecture)) for architecture in every_architecture(space)}
    grid = [as_key(architecture) for architecture in space.grid()]
    assert len(grid) == len(set(grid)) == space.size
    assert set(grid) == brute


@given(networks(), st.integers(0, 2**30))
@settings(deadline=None, max_examples=60)
def test_random_is_canonical_and_canonical_is_idempotent(network: nn.Module, seed: int) -> None:
    space = ModelSpace(network)
    architecture = space.random(torch.Generator().manual_seed(seed))
    assert space.canonical(architecture) == architecture
    anything = every_architecture(space)[seed % len(every_architecture(space))]
    assert space.canonical(space.canonical(anything)) == space.canonical(anything)


@given(networks(), st.integers(0, 2**30))
@settings(deadline=None, max_examples=60)
def test_inactive_choices_never_change_the_network(network: nn.Module, seed: int) -> None:
    space = ModelSpace(network)
    chosen = every_architecture(space)[seed % len(every_architecture(space))]
    active = space.active(chosen)
    ran: set[str] = set()
    space.network.apply(
        lambda module: (
            module.register_forward_pre_hook(
                lambda module, _: ran.add(str(getattr(module, "label", None) or module.number.label))  # type: ignore[union-attr]
            )
            if isinstance(module, LayerChoice | Number)
            else None
        )
    )
    with space.running(space.gates_of(chosen)):
        space(torch.ones(1))
    assert {label for label in active if not label.startswith("depth")} == ran


def test_random_is_uniform_over_canonical_architectures() -> None:
    space = nested_space()
    generator = torch.Generator().manual_seed(0)
    tally = Tally(as_key(space.random(generator)) for _ in range(40 * space.size))
    counts = [tally[as_key(architecture)] for architecture in space.grid()]
    assert sum(counts) == 40 * space.size
    assert chisquare(counts).pvalue > 1e-3


def test_random_repeats_with_its_generator() -> None:
    space = nested_space()
    draws = [
        [space.random(g) for _ in range(5)] for g in (torch.Generator().manual_seed(3) for _ in range(2))
    ]
    assert draws[0] == draws[1]


def test_shared_label_is_active_where_any_of_its_places_is() -> None:
    space = nested_space()
    base = space.default()
    assert "shared" not in space.active(base)
    assert "shared" in space.active({**base, "op": "nested"})
    assert "shared" in space.active({**base, "depth": 3})
    assert "deep" not in space.active({**base, "inside": "deep"})  # `inside` does not run either
    assert "deep" in space.active({**base, "op": "nested", "inside": "deep"})


def test_label_below_a_branch_of_its_own_label_is_counted_once() -> None:
    inner = LayerChoice([nn.Identity(), nn.ReLU()], label="op")
    space = ModelSpace(LayerChoice([nn.Identity(), LayerChoice([inner, nn.Tanh()], label="op")], label="op"))
    assert space.size == len(list(space.grid())) == 2
    outer = LayerChoice([nn.Identity(), Repeat(Repeat(nn.ReLU(), (1, 2), "d"), (1, 2), "d")], label="op")
    assert ModelSpace(outer).size == 3


def test_huge_spaces_are_counted_exactly() -> None:
    layers = [LayerChoice([nn.Identity() for _ in range(7)]) for _ in range(21)]
    space = ModelSpace(nn.Sequential(*layers))
    assert space.size == 7**21
    assert len({as_key(space.random(torch.Generator().manual_seed(seed))) for seed in range(50)}) == 50


def test_architecture_survives_json() -> None:
    kernel = ValueChoice([(3, 5), ((1, 2), 7)], label="kernel")
    network = nn.ModuleDict({"edges": InputChoice(3, n_chosen=2), "number": Number([1.5, 2], "n")})
    network.kernel = kernel
    space = ModelSpace(network)
    for architecture in space.grid():
        back = space.validate(json.loads(json.dumps(architecture)))
        assert back == architecture
        assert [type(option) for option in back.values()] == [
            type(option) for option in architecture.values()
        ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "conv"}, "choice 'op' has the options ['skip', 'nested']; got 'conv'"),
        ({"shared": 4}, "choice 'shared' has the options [1, 2, 3]; got 4"),
        (
            {"opp": "skip"},
            "one option for each of the 6 choices of its space; missing: none, unknown: ['opp']",
        ),
    ],
)
def test_wrong_architecture_is_refused_by_label_and_options(changes: dict[str, Any], message: str) -> None:
    space = nested_space()
    with pytest.raises(ValueError, match=re.escape(message)):
        space.freeze({**space.default(), **changes})


def test_missing_choices_are_named() -> None:
    space = nested_space()
    with pytest.raises(ValueError, match=r"missing: \['op'.*'depth'.*unknown: none"):
        space.validate({})
    with (
        space.running({"op": Gate((0,))}),
        pytest.raises(ValueError, match=r"gates are needed for every choice; missing: \['inside'"),
    ):
        space(torch.ones(1))


# ---- labels


def test_choices_without_a_label_are_named_after_their_place() -> None:
    conv = Conv2d(ValueChoice([1, 2]), ValueChoice([4, 8]) * 2, 3)
    network = nn.Sequential(LayerChoice([nn.Identity()]), nn.Sequential(conv, InputChoice(2)))
    network.pair = [ValueChoice([1, 2]) + ValueChoice([1, 2])]
    assert list(ModelSpace(network).options) == [
        "pair.0.0",
        "pair.0.1",
        "0",
        "1.0.in_channels",
        "1.0.out_channels",
        "1.1",
    ]


def test_a_module_that_stands_twice_is_one_decision() -> None:
    op = LayerChoice([nn.Identity(), nn.ReLU()])
    assert list(ModelSpace(nn.Sequential(op, nn.Tanh(), op)).options) == ["0"]


def test_a_width_shared_across_branches_is_one_decision() -> None:
    width = ValueChoice([2, 3], label="width")
    branches = LayerChoice([Linear(4, width), nn.Sequential(Linear(4, 4), Linear(4, width))], label="op")
    space = ModelSpace(nn.Sequential(branches, Linear(width, 5)))
    assert space.size == 4
    x = torch.randn(2, 4)
    for architecture in space.grid():
        with space.running(space.gates_of(architecture)):
            torch.testing.assert_close(space(x), space.freeze(architecture)(x))


@pytest.mark.parametrize(
    "second",
    [
        LayerChoice([nn.ReLU(), nn.Tanh(), nn.Identity()], label="op"),
        Number([0, 1], "op"),
    ],
)
def test_one_label_with_different_options_is_refused(second: nn.Module) -> None:
    first = LayerChoice([nn.ReLU(), nn.Tanh()], label="op")
    with pytest.raises(
        ValueError, match=r"label 'op' names a LayerChoice over \[0, 1\] and a .*or other labels"
    ):
        ModelSpace(nn.Sequential(first, second))


def test_a_network_without_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one choice; Sequential holds no LayerChoice"):
        ModelSpace(nn.Sequential(nn.Linear(1, 1)))


def test_a_value_that_is_only_read_cannot_be_mixed() -> None:
    with pytest.raises(
        ValueError, match=r"ValueChoice 'n' cannot be searched with mixing weights: .*hwnas\.nn"
    ):
        ModelSpace(Number([1, 2], "n")).check_can_mix()


# ---- gates live for one forward pass


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("last", [nn.Identity(), Fails()])
def test_gates_are_gone_after_the_forward_also_when_it_raises(last: nn.Module) -> None:
    number = Number([1, 2], "n")
    op = LayerChoice([nn.Linear(2, 2), nn.Identity()], label="op")
    space = ModelSpace(nn.Sequential(op, number, last))
    try:
        space(torch.ones(2))
    except ArithmeticError:
        assert isinstance(last, Fails)
    assert (op.gate, number.number.gate) == (None, None)


def test_gates_that_were_set_before_come_back() -> None:
    space = nested_space()
    outer, inner = space.gates_of(space.default()), space.gates_of({**space.default(), "depth": 2})
    with space.running(outer):
        with space.running(inner):
            assert space.gates is inner
        assert space.gates is outer
    assert space.gates is None


def test_space_without_gates_runs_its_default() -> None:
    space = nested_space()
    with space.running(space.gates_of(space.default())):
        expected = space(torch.ones(2))
    assert torch.equal(space(torch.ones(2)), expected)


def mixing_space() -> ModelSpace:
    width, kernel = ValueChoice([2, 4], label="width"), ValueChoice([1, 3], label="kernel")
    block = LayerChoice([Conv2d(width, width, kernel, padding=kernel // 2), nn.Tanh()], label="op")
    body = Repeat(lambda _: nn.Conv2d(5, 5, 1), (0, 2), label="depth")
    return ModelSpace(nn.Sequential(Conv2d(3, width, 1), block, Conv2d(width, 5, 1), body)).double()


def mixing_gates(space: ModelSpace, logits: dict[str, Tensor]) -> dict[str, Gate]:
    return {label: Gate(tuple(range(len(w))), w.softmax(0)) for label, w in logits.items()}


def some_logits(space: ModelSpace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        label: torch.randn(len(options), dtype=torch.double, generator=generator).requires_grad_()
        for label, options in space.options.items()
    }


def test_copy_after_a_forward_with_a_graph_is_independent() -> None:
    space = mixing_space()
    with space.running(mixing_gates(space, some_logits(space))):
        output = space(torch.randn(1, 3, 4, 4, dtype=torch.double))
    assert output.requires_grad
    twin = copy.deepcopy(space)
    x, architecture = torch.randn(1, 3, 4, 4, dtype=torch.double), space.random()
    with (
        torch.no_grad(),
        space.running(space.gates_of(architecture)),
        twin.running(twin.gates_of(architecture)),
    ):
        before = space(x)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(space(x), before)
        assert twin(x).count_nonzero() == 0
    assert twin.canonical(architecture) == space.canonical(architecture)


def test_space_survives_pickling() -> None:
    space = mixing_space()
    twin = pickle.loads(pickle.dumps(space))
    assert list(twin.grid()) == list(space.grid())
    assert twin.size == space.size
    x, architecture = torch.randn(1, 3, 4, 4, dtype=torch.double), space.random()
    assert torch.equal(twin.freeze(architecture)(x), space.freeze(architecture)(x))


def test_state_dict_is_that_of_the_network_and_names_no_choice() -> None:
    space = mixing_space()
    assert {f"network.{name}" for name in space.network.state_dict()} == set(space.state_dict())
    buffer = io.BytesIO()
    torch.save(space.state_dict(), buffer)
    buffer.seek(0)
    assert not mixing_space().load_state_dict(torch.load(buffer, weights_only=True)).missing_keys


def test_a_subnet_stands_in_for_its_space() -> None:
    space = nested_space()
    with space.represented_by(nn.Flatten(0)):
        assert space(torch.ones(2, 2)).shape == (4,)
    assert space(torch.ones(2, 2)).shape == (2, 2)


# ---- activation checkpoints, compilation


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False, context_fn=lambda: keep_gates(self.inner))


@pytest.mark.parametrize("mixes", [False, True])
def test_checkpointing_gives_equal_gradients(mixes: bool) -> None:
    plain = mixing_space()
    kept = ModelSpace(Checkpointed(copy.deepcopy(plain.network)))
    x, gradients = torch.randn(2, 3, 4, 4, dtype=torch.double), []
    architecture = {**plain.default(), "depth": 2, "width": 4, "kernel": 3}
    for space in (plain, kept):
        logits = some_logits(plain)
        gates = mixing_gates(space, logits) if mixes else space.gates_of(architecture)
        with space.running(gates):
            loss = space(x).square().sum()
        wanted = [*space.parameters(), *(logits.values() if mixes else ())]
        gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert all(choice.gate is None for choice in [kept.network.inner[1]])  # type: ignore[index,union-attr]


def test_compiling_a_space_says_to_compile_the_subnet() -> None:
    space = nested_space()
    with pytest.raises(
        RuntimeError, match=r"cannot be compiled.*torch\.compile\(space\.freeze\(architecture\)\)"
    ):
        torch.compile(space, backend="eager")(torch.ones(1))


def test_exporting_a_space_says_to_export_the_subnet() -> None:
    space = nested_space()
    with pytest.raises(Exception, match=r"cannot be compiled or exported; do that with a subnet"):
        torch.export.export(space, (torch.ones(1),))


def with_settings() -> ModelSpace:
    """Two networks, and beside them a rate and, in a list, a batch size."""
    network = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()], label="op"))
    sizes = ValueChoice([8, 16, 32], label="batch")
    return ModelSpace(network, {"lr": ValueChoice([0.1, 0.3]), "loader": {"sizes": [sizes, sizes * 2]}})


def test_one_architecture_covers_the_network_and_what_is_chosen_beside_it() -> None:
    space = with_settings()
    assert dict(space.options) == {"op": (0, 1), "lr": (0.1, 0.3), "batch": (8, 16, 32)}
    assert space.size == len(list(space.grid())) == 12
    architecture = {"op": 1, "lr": 0.3, "batch": 16}
    assert space.canonical(architecture) == architecture
    assert isinstance(space.freeze(architecture)[0], nn.Identity)  # type: ignore[index]  # a Sequential
    assert space.settings_of(architecture) == {"lr": 0.3, "loader": {"sizes": [16, 32]}}
    drawn = Tally(as_key(space.random(torch.Generator().manual_seed(seed))) for seed in range(1200))
    assert chisquare(list(drawn.values())).pvalue > 1e-3
    assert len(drawn) == 12


def test_settings_are_no_part_of_what_runs_and_of_what_it_costs() -> None:
    from profilers import FlopsProfiler

    space = with_settings()
    inputs = torch.randn(2, 4)
    assert torch.equal(space(inputs), space.network[0][0](inputs))
    macs = FlopsProfiler(space, torch.zeros(1, 4))
    assert [macs.profile({"op": op, "lr": 0.3, "batch": 32}) for op in (0, 1)] == [16, 0]
    assert with_settings().network.state_dict().keys() == {"0.0.weight", "0.0.bias"}


def test_a_plain_network_with_a_chosen_setting_is_a_space() -> None:
    space = ModelSpace(nn.Linear(3, 2), {"lr": ValueChoice([0.1, 0.2]), "momentum": 0.9})
    assert space.size == 2
    assert space.settings_of({"lr": 0.2}) == {"lr": 0.2, "momentum": 0.9}


def test_training_a_supernet_cannot_choose_a_setting() -> None:
    with pytest.raises(ValueError, match=r"the setting .*label='lr'.* is no part of the network.*by trials"):
        DARTS().prepare_for(with_settings())


@pytest.mark.parametrize("network", [3, nn.Linear])
def test_what_is_no_network_is_refused(network: Any) -> None:
    with pytest.raises(TypeError, match=r"made of a network, an nn.Module; got"):
        ModelSpace(network)


def test_settings_that_are_no_dictionary_are_refused() -> None:
    with pytest.raises(TypeError, match="settings are a dictionary of names and values; got 'lr'"):
        ModelSpace(nn.Linear(1, 1), settings="lr")  # type: ignore[arg-type]  # on purpose


def test_module_beside_the_network_is_refused() -> None:
    network = nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="op"))
    with pytest.raises(TypeError, match=r"the setting 'optimizer' holds a module"):
        ModelSpace(network, settings={"optimizer": [LayerChoice([nn.ReLU(), nn.Tanh()], label="beside")]})
