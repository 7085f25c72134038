from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import ChosenInputs, Gate, InputChoice, LayerChoice, ModelSpace, Repeat, ValueChoice


def straight_through(logits: Tensor, picked: int) -> Tensor:
    """One-hot forward, softmax backward: the weights of a Proxyless architecture step."""
    probabilities = logits.softmax(0)
    one_hot = torch.zeros_like(logits)
    one_hot[picked] = 1.0
    return one_hot + probabilities - probabilities.detach()


def random_weights(count: int) -> Tensor:
    return torch.rand(count, dtype=torch.double).softmax(0).requires_grad_()


def three_layers() -> list[nn.Module]:
    return [nn.Linear(4, 4).double() for _ in range(3)]


# ---- LayerChoice


@given(st.integers(0, 2))
@settings(deadline=None)
def test_one_path_runs_the_picked_layer_alone(picked: int) -> None:
    layers = three_layers()
    calls: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    space = ModelSpace(LayerChoice(layers, label="op"))
    x = torch.randn(2, 4, dtype=torch.double)
    with space.running({"op": Gate((picked,))}):
        output = space(x)
    assert calls == [picked]
    torch.testing.assert_close(output, layers[picked](x))


def test_layer_mixture_equals_weighted_sum_with_its_gradients() -> None:
    layers = three_layers()
    space = ModelSpace(LayerChoice(layers, label="op"))
    x, weights = torch.randn(2, 4, dtype=torch.double), random_weights(3)
    with space.running({"op": Gate((0, 1, 2), weights)}):
        mixed = space(x)
    expected = sum(weight * layer(x) for weight, layer in zip(weights, layers, strict=True))
    torch.testing.assert_close(mixed, expected)
    parameters = [weights, *space.parameters()]
    found = torch.autograd.grad(mixed.square().sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), parameters))


def test_two_paths_compute_two_layers_and_keep_no_graph_of_the_second() -> None:
    layers = three_layers()
    outputs: dict[int, Tensor] = {}
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, index=index: outputs.update({index: output}))
    space = ModelSpace(LayerChoice(layers, label="op"))
    x = torch.randn(2, 4, dtype=torch.double, requires_grad=True)
    logits = torch.randn(3, dtype=torch.double, requires_grad=True)
    with space.running({"op": Gate((1,), straight_through(logits, 1), run=(1, 2))}):
        mixed = space(x)
    assert set(outputs) == {1, 2}
    assert outputs[1].requires_grad
    assert not outputs[2].requires_grad
    torch.testing.assert_close(mixed, layers[1](x))


def test_gradient_to_the_logits_equals_brute_force_under_one_hot_weights() -> None:
    layers = three_layers()
    space = ModelSpace(LayerChoice(layers, label="op"))
    x, logits = torch.randn(2, 4, dtype=torch.double), torch.randn(3, dtype=torch.double, requires_grad=True)
    with space.running({"op": Gate((2,), straight_through(logits, 2))}):
        loss = space(x).square().sum()
    (found,) = torch.autograd.grad(loss, logits)
    # BinaryConnect (arXiv 1812.00332, equation 4): dL/dg_j = <dL/dy, o_j>, then the softmax's Jacobian.
    output = layers[2](x).detach()
    to_gates = torch.stack([(2 * output * layer(x)).sum() for layer in layers])
    p = logits.softmax(0)
    expected = p * (to_gates - (p * to_gates).sum())
    torch.testing.assert_close(found, expected.detach())
    assert all(parameter.grad is None for layer in layers for parameter in layer.parameters())


def test_layer_choice_by_name_passes_every_argument_and_result() -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> tuple[Tensor, Tensor]:
            return a + b, a - b

    space = ModelSpace(LayerChoice({"pair": Pair(), "again": Pair()}, label="op"))
    total, difference = space(torch.ones(1), b=torch.ones(1))
    assert (total.item(), difference.item()) == (2, 0)
    assert space.options["op"] == ("pair", "again")


def test_unequal_shapes_cannot_be_mixed_and_the_choice_is_named() -> None:
    space = ModelSpace(LayerChoice([nn.Linear(4, 4), nn.Linear(4, 1)], label="op"))
    gates = {"op": Gate((0, 1), torch.tensor([0.5, 0.5]))}
    with (
        space.running(gates),
        pytest.raises(
            ValueError, match=r"LayerChoice 'op' must have outputs of one shape.*\(2, 4\), \(2, 1\)"
        ),
    ):
        space(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "'op' needs at least one nn.Module and nothing else; got no candidates"),
        ([nn.ReLU(), torch.relu], r"nothing else; got \['ReLU', '.*function.*'\]"),
        ({"a.b": nn.ReLU()}, r"no '\.'.*got 'a\.b' in \['a\.b'\]\. Rename it"),
        ({"": nn.ReLU()}, "no empty one"),
        ({"forward": nn.ReLU()}, "none that is taken; got 'forward'"),
        ({1: nn.ReLU(), "1": nn.Tanh()}, r"none twice.*got '1' in \[1, '1'\]"),
    ],
)
def test_candidates_that_cannot_be_chosen_are_refused(candidates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerChoice(candidates, label="op")


# ---- InputChoice


def expected_inputs(choice: InputChoice, inputs: list[Tensor], option: tuple[int, ...]) -> Any:
    chosen = [inputs[index] for index in option]
    match choice.reduction:
        case "sum":
            return torch.stack(chosen).sum(0)
        case "mean":
            return torch.stack(chosen).mean(0)
        case "concat":
            return torch.cat(chosen, dim=1)
        case "none":
            return chosen


@pytest.mark.parametrize("reduction", ["sum", "mean", "concat", "none"])
@pytest.mark.parametrize("n_chosen", [1, 2, None])
def test_chosen_inputs_are_reduced_alike_in_space_and_subnet(reduction: Any, n_chosen: int | None) -> None:
    choice = InputChoice(3, n_chosen=n_chosen, reduction=reduction, label="edges")
    space = ModelSpace(choice)
    inputs = [torch.randn(2, 3) for _ in range(3)]
    for option in choice.options:
        subnet = space.freeze({"edges": option})
        assert type(subnet) is ChosenInputs
        with space.running(space.gates_of({"edges": option})):
            torch.testing.assert_close(space(inputs), expected_inputs(choice, inputs, option))
        torch.testing.assert_close(subnet(inputs), expected_inputs(choice, inputs, option))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("n_chosen", [1, 2, None])
def test_input_mixture_is_the_expectation_over_subsets(reduction: Any, n_chosen: int | None) -> None:
    choice = InputChoice(3, n_chosen=n_chosen, reduction=reduction, label="edges")
    space = ModelSpace(choice)
    inputs = [torch.randn(2, 3, dtype=torch.double, requires_grad=True) for _ in range(3)]
    weights = random_weights(len(choice.options))
    with space.running({"edges": Gate(tuple(range(len(choice.options))), weights)}):
        mixed = space(inputs)
    outcomes = [expected_inputs(choice, inputs, option) for option in choice.options]
    expected = sum(weight * outcome for weight, outcome in zip(weights, outcomes, strict=True))
    torch.testing.assert_close(mixed, expected)
    found = torch.autograd.grad(mixed.square().sum(), [weights, *inputs], retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [weights, *inputs]))


def test_any_number_of_inputs_enumerates_every_nonempty_subset() -> None:
    every = [s for size in (1, 2, 3, 4) for s in itertools.combinations(range(4), size)]
    assert list(InputChoice(4, n_chosen=None).options) == every


def test_concat_cannot_be_mixed_and_the_place_is_named() -> None:
    space = ModelSpace(nn.ModuleDict({"edges": InputChoice(2, reduction="concat")}))
    with pytest.raises(ValueError, match=r"'edges' cannot be searched .*mixing .*'concat'.*'sum'"):
        space.check_can_mix()
    lone = ModelSpace(InputChoice(2, reduction="none", label="edges"))
    with (
        lone.running({"edges": Gate((0, 1), torch.tensor([0.5, 0.5]))}),
        pytest.raises(ValueError, match="'edges' with reduction 'none' cannot be mixed; use 'sum' or 'mean'"),
    ):
        lone([torch.ones(1), torch.ones(1)])


def test_wrong_number_of_inputs_is_refused() -> None:
    space = ModelSpace(InputChoice(3, label="edges"))
    with pytest.raises(ValueError, match="'edges' chooses among 3 inputs; got 2"):
        space([torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "needs 1 <= n_chosen <= n_candidates; got n_chosen=1, n_candidates=0"),
        ((2, 3), ".* got n_chosen=3, n_candidates=2"),
        ((2, 0), ".* got n_chosen=0, n_candidates=2"),
        ((13, None), "has 8191 subsets of its 13 inputs; at most 4096 are enumerated: set n_chosen"),
        ((2, 1, "product"), "reduces by 'sum', 'mean', 'concat' or 'none'; got 'product'"),
    ],
)
def test_impossible_input_choices_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"InputChoice 'edges' {message}"):
        InputChoice(*arguments, label="edges")


# ---- Repeat


def doubled_depth() -> Repeat:
    depth = ValueChoice([0, 1, 2], label="depth")
    return Repeat(lambda index: nn.Linear(4, 4).double(), depth + depth).double()


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        ((1, 3), (1, 2, 3)),
        ([1, 4], (1, 4)),
        (range(2, 5), (2, 3, 4)),
    ],
)
def test_depth_is_a_range_or_a_list(depth: Any, options: tuple[int, ...]) -> None:
    repeat = Repeat(nn.ReLU(), depth, label="depth")
    assert ModelSpace(repeat).options["depth"] == options
    assert len(repeat) == max(options)


@pytest.mark.parametrize("option", [0, 1, 2])
def test_repeat_runs_its_first_blocks(option: int) -> None:
    repeat = doubled_depth()
    space = ModelSpace(repeat)
    x = torch.randn(2, 4, dtype=torch.double)
    expected = x
    for index in range(2 * option):
        expected = repeat[index](expected)
    with space.running(space.gates_of({"depth": option})):
        torch.testing.assert_close(space(x), expected)
    subnet = space.freeze({"depth": option})
    assert type(subnet) is nn.Sequential
    assert len(subnet) == 2 * option
    torch.testing.assert_close(subnet(x), expected)


def test_repeat_mixture_is_the_expectation_over_depths() -> None:
    repeat = doubled_depth()
    space = ModelSpace(repeat)
    x, weights = torch.randn(2, 4, dtype=torch.double), random_weights(3)
    with space.running({"depth": Gate((0, 1, 2), weights)}):
        mixed = space(x)
    after = [x]
    for index in range(4):
        after.append(repeat[index](after[-1]))
    expected = sum(weight * after[2 * option] for option, weight in enumerate(weights))
    torch.testing.assert_close(mixed, expected)
    parameters = [weights, *space.parameters()]
    found = torch.autograd.grad(mixed.square().sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), parameters))


def test_blocks_deeper_than_the_picked_depth_keep_no_graph() -> None:
    repeat = doubled_depth()
    outputs: list[Tensor] = []
    for index in range(4):
        repeat[index].register_forward_hook(lambda _, __, output: outputs.append(output))
    space = ModelSpace(repeat)
    logits = torch.randn(3, dtype=torch.double, requires_grad=True)
    with space.running({"depth": Gate((1,), straight_through(logits, 1))}):
        space(torch.randn(2, 4, dtype=torch.double))
    assert [output.requires_grad for output in outputs] == [True, True, False, False]


def test_fixed_depth_is_no_choice() -> None:
    network = nn.Sequential(Repeat(nn.Linear(4, 4), 2), LayerChoice([nn.ReLU(), nn.Tanh()], label="op"))
    space = ModelSpace(network)
    assert list(space.options) == ["op"]
    assert len(space.freeze({"op": 0})[0]) == 2  # type: ignore[index]  # a Sequential
    assert "depth=2" in repr(network)


def test_one_block_is_copied_and_listed_blocks_are_taken() -> None:
    block = nn.Linear(4, 4)
    copied = Repeat(block, (1, 2))
    assert copied[0] is not copied[1]
    assert torch.equal(copied[0].weight, copied[1].weight)  # type: ignore[arg-type]  # Linear's
    assert Repeat(nn.ModuleList([block, nn.ReLU()]), (1, 2))[0] is block
    assert Repeat([block, nn.ReLU()], (1, 2))[0] is block


@pytest.mark.parametrize(
    ("blocks", "depth", "label", "message"),
    [
        (nn.ReLU(), [-1, 2], None, r"whole numbers from 0 up as depths; got \(-1, 2\)"),
        (nn.ReLU(), [0.5, 2], None, r"whole numbers from 0 up as depths; got \(0\.5, 2\)"),
        (nn.ReLU(), -1, None, r"whole numbers from 0 up as depths; got \(-1,\)"),
        (nn.ReLU(), (3, 1), None, r"\(least, most\) depth, the least first; got \(3, 1\). Give .* as a list"),
        (nn.ReLU(), (1, 2, 3), None, r"\(least, most\) depth, the least first; got \(1, 2, 3\)"),
        ([nn.ReLU()], (1, 3), None, "needs at least 3 blocks; got 1. Give more, or a function"),
        (nn.ReLU(), ValueChoice([1, 2], label="d"), "e", "takes no label of its own; got 'e'"),
    ],
)
def test_impossible_repeats_are_refused(blocks: Any, depth: Any, label: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Repeat(blocks, depth, label)


# ---- all of them


@pytest.mark.parametrize(
    ("choice", "inputs"),
    [
        (LayerChoice([nn.ReLU(), nn.Tanh()], label="op"), torch.ones(1)),
        (InputChoice(1, label="op"), [torch.ones(1)]),
        (Repeat(nn.ReLU(), (1, 2), label="op"), torch.ones(1)),
    ],
)
def test_choice_that_runs_outside_of_its_space_says_what_to_call(choice: nn.Module, inputs: Any) -> None:
    with pytest.raises(RuntimeError, match="'op' is decided only while its space runs: call the ModelSpace"):
        choice(inputs)
