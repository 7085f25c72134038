from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import Cell, LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.freezing import Freezer, Freezes
from hwnas.nn import BatchNorm2d, Conv2d, Linear
from hwnas.spaces import SmallMobileNet
from profilers.space import Architecture
from tests.hwnas.test_freezing import RichNetwork, Tied


class CellNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([2, 3], label="width")
        ops: list[Any] = [
            lambda *_: nn.Sequential(Conv2d(3, width, 3, padding=1), BatchNorm2d(width), Conv2d(width, 3, 1)),
            nn.Identity(),
        ]
        self.cell = Cell(ops, 3, merge_op="loose_end", label="cell")
        self.again = Repeat(lambda _: nn.Sequential(nn.BatchNorm2d(3), Conv2d(3, 3, 1)), (0, 2), label="deep")
        self.head = Conv2d(self.cell.n_outputs * 3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.cell(self.again(x)))


SPACES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "rich": (RichNetwork, (2, 3, 9, 9)),
    "mobile": (SmallMobileNet, (2, 1, 28, 28)),
    "tied": (Tied, (2, 4)),
    "cell": (CellNetwork, (2, 3, 5, 5)),
}


def draw(name: str, seed: int) -> tuple[ModelSpace, Architecture, Tensor]:
    torch.manual_seed(seed)
    make, shape = SPACES[name]
    space = ModelSpace(make()).double()
    return space, space.random(torch.Generator().manual_seed(seed)), torch.randn(shape, dtype=torch.double)


def changed(before: dict[str, Tensor], space: ModelSpace) -> int:
    """How many elements of the space are others than before; those of tied weights count once."""
    seen = {id(t): name for name, t in space.state_dict(keep_vars=True).items()}
    after = space.state_dict()
    return sum(int((before[name] != after[name]).sum()) for name in seen.values())


def elements(module: nn.Module) -> int:
    return sum(t.numel() for t in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values())


def run(space: ModelSpace, architecture: Architecture, x: Tensor) -> Any:
    with space.running(space.gates_of(architecture)):
        return space(x)


spaces = st.sampled_from(sorted(SPACES))
seeds = st.integers(0, 2**30)


@given(spaces, seeds)
@settings(deadline=None, max_examples=32)
def test_state_that_is_loaded_comes_out_again_and_nothing_else_changes(name: str, seed: int) -> None:
    space, architecture, _ = draw(name, seed)
    subnet = space.freeze(architecture)
    with torch.no_grad():
        for tensor in [*subnet.parameters(), *subnet.buffers()]:
            tensor.add_(7)
    before = copy.deepcopy(space.state_dict())
    space.load_subnet_state_dict(architecture, subnet.state_dict())
    found, expected = space.subnet_state_dict(architecture), subnet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert changed(before, space) == elements(subnet)


@given(st.sampled_from(["rich", "mobile", "cell"]), seeds)
@settings(deadline=None, max_examples=12)
def test_trained_subnet_is_the_path_of_the_space_that_it_is_loaded_into(name: str, seed: int) -> None:
    space, architecture, x = draw(name, seed)
    subnet = space.freeze(architecture).train()
    optimizer = torch.optim.SGD(subnet.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        subnet(x).square().mean().backward()
        optimizer.step()
    space.eval()
    space.load_subnet_state_dict(architecture, subnet.state_dict())
    torch.testing.assert_close(run(space, architecture, x), subnet.eval()(x), rtol=1e-10, atol=1e-10)


@given(spaces, seeds)
@settings(deadline=None, max_examples=12)
def test_subnet_takes_the_weights_that_the_space_has_now(name: str, seed: int) -> None:
    space, architecture, x = draw(name, seed)
    subnet = space.freeze(architecture).eval()
    with torch.no_grad():
        for tensor in space.parameters():
            tensor.add_(torch.randn_like(tensor))
    subnet.load_state_dict(space.subnet_state_dict(architecture))
    torch.testing.assert_close(subnet(x), run(space.eval(), architecture, x), rtol=1e-10, atol=1e-10)


def test_state_dict_of_a_subnet_shares_nothing_with_the_space() -> None:
    space, architecture, _ = draw("rich", 0)
    before = copy.deepcopy(space.state_dict())
    for tensor in space.subnet_state_dict(architecture).values():
        tensor.zero_()
    assert changed(before, space) == 0


def test_kernels_go_back_to_the_centre_and_channels_to_the_front() -> None:
    kernel, width = ValueChoice([3, 5], label="k"), ValueChoice([1, 2], label="w")
    conv = Conv2d(1, width, kernel, padding=kernel // 2)
    space = ModelSpace(conv)
    nn.init.zeros_(conv.weight)
    space.load_subnet_state_dict({"k": 3, "w": 1}, {"weight": torch.ones(1, 1, 3, 3), "bias": torch.ones(1)})
    expected = torch.zeros(2, 1, 5, 5)
    expected[0, 0, 1:4, 1:4] = 1
    assert torch.equal(conv.weight, expected)


def test_types_and_memory_formats_may_differ() -> None:
    conv = Conv2d(4, ValueChoice([2, 4], label="w"), 3)
    space = ModelSpace(conv).bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = {"weight": torch.randn(2, 4, 3, 3), "bias": torch.randn(2)}
    space.load_subnet_state_dict({"w": 2}, state)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.weight[:2], state["weight"].bfloat16())


class Joined(Freezes, nn.Module):
    """Its subnet's weight is joined of several slices, as that of an attention's projections is."""

    def __init__(self) -> None:
        super().__init__()
        self.width = ValueChoice([1, 2], label="w")
        self.weight = nn.Parameter(torch.arange(12.0).reshape(6, 2))

    def frozen(self, freezer: Freezer) -> nn.Module:
        width = self.width.of(freezer.architecture)
        plain = nn.Linear(width, 3 * width, bias=False)
        plain.weight = freezer.part(self.weight, torch.cat([w[:width, :width] for w in self.weight.split(2)]))
        return plain


def test_slices_that_were_joined_go_back_to_their_places() -> None:
    joined = Joined()
    ModelSpace(joined).load_subnet_state_dict({"w": 1}, {"weight": -torch.ones(3, 1)})
    expected = torch.arange(12.0).reshape(6, 2)
    expected[::2, 0] = -1
    assert torch.equal(joined.weight, expected)


class Computed(Freezes, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = ValueChoice([1, 2], label="w")
        self.weight = nn.Parameter(torch.ones(3, 2))

    def frozen(self, freezer: Freezer) -> nn.Module:
        plain = nn.Linear(2, 1, bias=False)
        plain.weight = nn.Parameter(self.weight.detach().mean(0, keepdim=True))  # the middle row's number
        return plain


def test_what_freezing_computes_cannot_be_written_back_and_nothing_is_written() -> None:
    space = ModelSpace(nn.Sequential(nn.Linear(2, 2), Computed()))
    before = copy.deepcopy(space.state_dict())
    state = {name: tensor + 1 for name, tensor in space.subnet_state_dict({"w": 1}).items()}
    with pytest.raises(ValueError, match=r"'1\.weight' of the subnet is computed .* cannot be written back"):
        space.load_subnet_state_dict({"w": 1}, state)
    assert changed(before, space) == 0


def test_state_of_another_architecture_is_refused() -> None:
    width = ValueChoice([2, 4], label="w")
    space = ModelSpace(nn.Sequential(Linear(3, width), LayerChoice([nn.Identity(), nn.PReLU()], label="op")))
    state = space.subnet_state_dict({"w": 2, "op": 1})
    with pytest.raises(ValueError, match=r"'0\.weight' has the shape \(4, 3\) .*got \(2, 3\).*another"):
        space.load_subnet_state_dict({"w": 4, "op": 1}, state)
    with pytest.raises(ValueError, match=r"missing: none, unknown: \['1\.weight'\]"):
        space.load_subnet_state_dict({"w": 2, "op": 0}, state)
    with pytest.raises(ValueError, match=r"missing: \['1\.weight'\], unknown: none"):
        space.load_subnet_state_dict({"w": 2, "op": 1}, space.subnet_state_dict({"w": 2, "op": 0}))
    with pytest.raises(ValueError, match=r"only tensors can be written back .*'1\.weight' is a int"):
        space.load_subnet_state_dict({"w": 2, "op": 1}, {**state, "1.weight": 3})
