from __future__ import annotations

import copy
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import ChosenInputs, InputChoice, LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.freezing import Freezes, deep_copy
from hwnas.nn import BatchNorm2d, Conv2d, Linear
from hwnas.values import values_in


class MobileBlock(nn.Module):
    """Expansion, kernel and width are choices; the skip is an attribute that `forward` reads."""

    def __init__(self, width: Any, name: str) -> None:
        super().__init__()
        middle = width * ValueChoice([1, 2], label=f"{name}.expansion")
        kernel = ValueChoice([3, 5], label=f"{name}.kernel")
        self.scale = ValueChoice([0.5, 1.0], label=f"{name}.scale")
        self.body = nn.Sequential(
            Conv2d(width, middle, 1, bias=False),
            BatchNorm2d(middle),
            nn.ReLU(),
            Conv2d(middle, middle, kernel, padding=kernel // 2, groups=middle),
            Conv2d(middle, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + float(self.scale) * self.body(x)


class RichNetwork(nn.Module):
    """Every kind of choice: op, depth, coupled width, kernel, nested, shared label, inputs, plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.width = ValueChoice([4, 6, 8], label="width")
        self.settings = {"pool": [ValueChoice([1, 2], label="pool")], "name": "rich"}
        self.stem = nn.Sequential(Conv2d(3, self.width, 3, padding=1), BatchNorm2d(self.width), nn.ReLU())
        self.blocks = Repeat(lambda index: self.block(f"blocks.{index}"), (0, 2), label="depth")
        shared = ValueChoice([3, 5], label="shared")
        self.left = Conv2d(self.width, self.width, shared, padding="same", padding_mode="reflect")
        self.right = LayerChoice(
            [nn.Tanh(), Conv2d(self.width, self.width, shared, padding="same")], label="op"
        )
        self.edges = InputChoice(3, n_chosen=None, reduction="mean", label="edges")
        self.head = Linear(self.width * 4, 5)

    def block(self, name: str) -> nn.Module:
        inner = LayerChoice(
            {"mobile": MobileBlock(self.width, name), "relu": nn.ReLU()}, label=f"{name}.kind"
        )
        return nn.Sequential(inner, BatchNorm2d(self.width))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.blocks(self.stem(x))
        mixed = self.edges([stem, self.left(stem), self.right(stem)])
        assert mixed.shape[1] == int(self.width)
        size = 2 * int(self.settings["pool"][0])
        return torch.as_tensor(self.head(F.interpolate(F.adaptive_avg_pool2d(mixed, size), 2).flatten(1)))


@pytest.fixture(scope="module")
def rich() -> ModelSpace:
    torch.manual_seed(0)
    space = ModelSpace(RichNetwork()).double()
    for name, buffer in space.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return space


seeds = st.integers(0, 2**40)
shared_fixture = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def under_hwnas(thing: object) -> Iterator[str]:
    """Names of all hwnas objects among a module's attributes, however deep in containers."""
    if type(thing).__module__.startswith("hwnas") and type(thing) is not ChosenInputs:
        yield type(thing).__name__
    if isinstance(thing, nn.Module):
        thing = vars(thing)
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, list | tuple):
        for item in thing:
            yield from under_hwnas(item)


@given(seed=seeds, training=st.booleans())
@settings(shared_fixture, max_examples=60)
def test_frozen_subnet_equals_supernet_path(rich: ModelSpace, seed: int, training: bool) -> None:
    architecture = rich.random(torch.Generator().manual_seed(seed))
    subnet = rich.train(training).freeze(architecture)
    x = torch.randn(3, 3, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    with rich.running(rich.gates_of(architecture)):
        expected = rich(x)
    torch.testing.assert_close(subnet(x), expected, rtol=1e-12, atol=1e-12)
    assert type(subnet) is RichNetwork
    assert list(under_hwnas(subnet)) == []


@given(seed=seeds)
@settings(shared_fixture, max_examples=30)
def test_gradients_of_the_subnet_are_the_supernets_sliced(rich: ModelSpace, seed: int) -> None:
    """The supernet's gradient has the subnet's values, and zero for every weight the path does not use."""
    architecture = rich.random(torch.Generator().manual_seed(seed))
    subnet = rich.eval().freeze(architecture)
    x = torch.randn(2, 3, 9, 9, dtype=torch.double)
    rich.zero_grad(set_to_none=True)
    with rich.running(rich.gates_of(architecture)):
        rich(x).square().sum().backward()
    subnet(x).square().sum().backward()
    names = {
        # The names differ where a choice was: blocks.0.0.mobile.body.0 is blocks.0.0.body.0 in the subnet.
        name.removeprefix("network.").replace(".mobile.", ".").replace("right.1.", "right."): parameter
        for name, parameter in rich.named_parameters()
    }
    for name, parameter in subnet.named_parameters():
        whole, part = names[name].grad, parameter.grad
        if whole is None or part is None:
            assert whole is part  # not on the path: the input that it computes is not chosen
            continue
        cut = [
            slice((n - m) // 2, (n - m) // 2 + m) if axis > 1 else slice(m)
            for axis, (n, m) in enumerate(zip(whole.shape, part.shape, strict=True))
        ]
        torch.testing.assert_close(whole[tuple(cut)], part, rtol=1e-9, atol=1e-11)
        outside = whole.clone()
        outside[tuple(cut)] = 0
        assert outside.count_nonzero() == 0


def test_plain_numbers_stand_where_values_stood(rich: ModelSpace) -> None:
    subnet = rich.freeze({**rich.default(), "width": 6, "pool": 2})
    assert vars(subnet)["width"] == 6
    assert vars(subnet)["settings"] == {"pool": [2], "name": "rich"}
    assert type(subnet.width) is int


def test_weights_are_copied_not_shared(rich: ModelSpace) -> None:
    architecture = {**rich.default(), "depth": 2, "width": 8, "op": 1}
    storage = {tensor.untyped_storage().data_ptr() for tensor in rich.state_dict().values()}
    first, second = rich.freeze(architecture), rich.freeze(architecture)
    for subnet in (first, second):
        own = {tensor.untyped_storage().data_ptr() for tensor in subnet.state_dict().values()}
        assert not own & storage
        storage |= own
        # A slice that kept its whole storage would be saved in full.
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in subnet.state_dict().values())


def test_subnet_survives_the_space() -> None:
    space = ModelSpace(RichNetwork())
    subnet = space.freeze(space.default()).eval()
    x = torch.randn(2, 3, 9, 9)
    expected = subnet(x)
    with torch.no_grad():
        for tensor in [*space.parameters(), *space.buffers()]:
            tensor.zero_()
    assert torch.equal(subnet(x), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        features = ValueChoice([2, 4], label="features")
        self.op = LayerChoice([nn.Linear(4, 4), nn.ReLU()], label="op")
        self.plain = [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.first, self.second = self.plain
        self.second.weight = self.op[0].weight = self.first.weight  # type: ignore[assignment]
        self.wide, self.again = Linear(features, 4), Linear(features, 4)
        self.again.weight = self.wide.weight
        self.register_buffer("table", torch.arange(4))
        self.alias = self.table

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.op(self.first(x)))


@pytest.mark.parametrize("features", [2, 4])
def test_tied_weights_and_shared_objects_stay_tied(features: int) -> None:
    space = ModelSpace(Tied())
    subnet = space.freeze({"op": 0, "features": features})
    assert subnet.first.weight is subnet.second.weight is subnet.op.weight
    assert subnet.wide.weight is subnet.again.weight
    assert subnet.wide.weight.shape == (4, features)
    assert subnet.wide.bias is not subnet.again.bias
    assert subnet.plain[0] is subnet.first
    assert subnet.alias is subnet.table
    assert subnet.first.weight is not space.network.first.weight


def test_a_module_that_stands_twice_is_frozen_once() -> None:
    conv = Conv2d(ValueChoice([2, 3], label="c"), 3, 1)
    space = ModelSpace(nn.Sequential(conv, nn.Sequential(conv)))
    subnet = space.freeze({"c": 3})
    assert subnet[0] is subnet[1][0]  # type: ignore[index]  # Sequentials


def test_training_mode_and_requires_grad_are_kept_module_by_module() -> None:
    space = ModelSpace(RichNetwork()).train()
    network = space.network
    assert isinstance(network, RichNetwork)
    network.blocks[0].eval()  # a frozen BatchNorm inside a network that trains
    network.edges.eval()
    network.stem.requires_grad_(False)
    subnet = space.freeze({**space.default(), "depth": 2})
    assert subnet.training
    assert subnet.blocks.training
    assert not any(module.training for module in subnet.blocks[0].modules())
    assert all(module.training for module in subnet.blocks[1].modules())
    assert not subnet.edges.training
    assert not any(parameter.requires_grad for parameter in subnet.stem.parameters())
    assert all(parameter.requires_grad for parameter in subnet.head.parameters())
    assert not any(module.training for module in space.eval().freeze(space.default()).modules())


class Pickles(nn.Module):
    """Says itself how it is pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.copies = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "copies": self.copies + 1}


def test_a_deep_copy_is_what_deepcopy_makes() -> None:
    shared, listed = nn.Linear(2, 2), ["a"]
    network = nn.Sequential(shared, nn.BatchNorm1d(2), nn.Sequential(shared), Pickles(), nn.LSTM(2, 2))
    network.register_forward_hook(lambda *_: None)
    network.listed, network[1].listed, network[2].back = listed, listed, [network]  # type: ignore[assignment]
    network[1].add_module("none", None)
    network.eval()
    memo: dict[int, Any] = {id(t): t for t in (*network.parameters(), *network.buffers())}
    copied = deep_copy(network, memo)
    assert isinstance(copied, nn.Sequential)
    usual = copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})
    assert str(copied) == str(usual)
    for ours, theirs, original in zip(copied.modules(), usual.modules(), network.modules(), strict=True):
        assert ours is not original
        assert list(vars(ours)) == list(vars(theirs))
        assert [type(held) for held in vars(ours).values()] == [type(held) for held in vars(theirs).values()]
    assert copied[2][0] is copied[0]
    assert copied.listed is copied[1].listed is not listed
    assert copied[2].back[0] is copied
    assert copied[0].weight is shared.weight
    assert copied[3].copies == 1
    assert copied[1]._buffers is not network[1]._buffers
    assert len(copied._forward_hooks) == 1
    assert copied._forward_hooks is not network._forward_hooks
    assert not any(module.training for module in copied.modules())


def test_buffers_and_dtypes_are_kept() -> None:
    space = ModelSpace(
        nn.Sequential(Conv2d(3, ValueChoice([2, 4], label="w"), 1), nn.BatchNorm2d(2))
    ).bfloat16()
    subnet = space.freeze({"w": 2})
    assert [tensor.dtype for tensor in subnet.parameters()] == [torch.bfloat16] * 4
    assert subnet.state_dict()["1.num_batches_tracked"].dtype == torch.int64


def test_only_picked_options_are_copied() -> None:
    class Heavy(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Heavy:
            raise AssertionError("an option that is not picked was copied")

    space = ModelSpace(nn.Sequential(LayerChoice([nn.Identity(), Heavy(2, 2)], label="op")))
    assert isinstance(space.freeze({"op": 0})[0], nn.Identity)  # type: ignore[index]


def test_values_in_a_container_that_cannot_be_rebuilt_are_refused() -> None:
    Sizes = namedtuple("Sizes", "width")  # what a user may have
    network = nn.Sequential(LayerChoice([nn.Identity()], label="op"))
    network.sizes = Sizes(ValueChoice([1, 2], label="w"))
    with pytest.raises(TypeError, match="plain list, tuple or dict, or in a dataclass; got Sizes"):
        ModelSpace(network).freeze({"op": 0, "w": 1})


def test_nothing_that_freezes_is_left_where_choices_nest() -> None:
    inner = LayerChoice(
        [LayerChoice([nn.ReLU()], label="c"), Repeat(nn.Tanh(), (1, 2), label="d")], label="b"
    )
    subnet = ModelSpace(nn.Sequential(inner)).freeze({"b": 1, "c": 0, "d": 2})
    assert not any(isinstance(module, Freezes) for module in subnet.modules())
    assert str(subnet[0]) == str(nn.Sequential(nn.Tanh(), nn.Tanh()))  # type: ignore[index]


# ---- what leaves this process needs no hwnas

BLOCKED = (
    "import sys; sys.modules['hwnas'] = sys.modules['profilers'] = sys.modules['lookup_tables'] = None\n"
)


def run_where_hwnas_is_missing(folder: Path, script: str) -> None:
    """Runs a script in ``folder`` where ``import hwnas`` fails."""
    command = [sys.executable, "-c", BLOCKED + "import torch; torch.set_num_threads(1)\n" + script]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def exported(rich: ModelSpace, tmp_path: Path) -> tuple[nn.Module, Tensor, Path]:
    architecture = {**rich.default(), "depth": 1, "width": 6, "op": 1, "edges": (0, 2), "blocks.0.kernel": 5}
    subnet = rich.freeze(architecture).float().eval()
    x = torch.randn(2, 3, 9, 9)
    torch.save((x, subnet(x).detach()), tmp_path / "expected.pt")
    return subnet, x, tmp_path


def test_exported_program_and_state_run_where_hwnas_is_missing(
    exported: tuple[nn.Module, Tensor, Path],
) -> None:
    subnet, x, folder = exported
    torch.export.save(torch.export.export(subnet, (x,)), folder / "subnet.pt2")
    torch.save(subnet.state_dict(), folder / "state.pt")
    run_where_hwnas_is_missing(
        folder,
        """
x, expected = torch.load("expected.pt")
program = torch.export.load("subnet.pt2")
torch.testing.assert_close(program.module()(x), expected)
state = torch.load("state.pt")
program.module().load_state_dict(state)
""",
    )


def test_pickled_subnet_of_plain_classes_runs_where_hwnas_is_missing(tmp_path: Path) -> None:
    width = ValueChoice([4, 8], label="width")
    layers = LayerChoice([Conv2d(3, width, 3), nn.Conv2d(3, 8, 3)], label="op")
    space = ModelSpace(nn.Sequential(layers, Repeat(nn.ReLU(), (1, 2), label="d"), BatchNorm2d(width)))
    subnet = space.freeze({"op": 0, "width": 4, "d": 2}).eval()
    x = torch.randn(1, 3, 5, 5)
    torch.save((subnet, x, subnet(x).detach()), tmp_path / "subnet.pt")
    run_where_hwnas_is_missing(
        tmp_path,
        """
subnet, x, expected = torch.load("subnet.pt", weights_only=False)
torch.testing.assert_close(subnet(x), expected)
""",
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_file_runs_where_hwnas_is_missing(exported: tuple[nn.Module, Tensor, Path]) -> None:
    subnet, x, folder = exported
    torch.onnx.export(subnet, (x,), folder / "subnet.onnx", dynamo=True, external_data=False, verbose=False)
    np.savez(folder / "expected.npz", x=x.numpy(), y=subnet(x).detach().numpy())
    run_where_hwnas_is_missing(
        folder,
        """
import numpy, onnxruntime
stored = numpy.load("expected.npz")
session = onnxruntime.InferenceSession("subnet.onnx")
(output,) = session.run(None, {session.get_inputs()[0].name: stored["x"]})
numpy.testing.assert_allclose(output, stored["y"], rtol=1e-4, atol=1e-5)
""",
    )


# ---- dataclasses and sets


@dataclass(frozen=True)
class Sizes:
    width: Any
    kernels: list[Any]
    name: str = "sizes"

    @cached_property
    def doubled(self) -> Any:
        return self.width * 2


@dataclass(slots=True)
class Slotted:
    sizes: Sizes
    unset: int = field(init=False)


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Slotted(Sizes(ValueChoice([2, 4]), [ValueChoice([1, 3], label="kernel")]))
        self.same = self.config.sizes
        self.conv = Conv2d(3, self.config.sizes.doubled, self.config.sizes.kernels[0], padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, : int(self.config.sizes.width)] * int(self.config.sizes.kernels[0])


def test_values_in_dataclasses_are_found_named_and_frozen() -> None:
    space = ModelSpace(Configured()).double()
    assert dict(space.options) == {"config.sizes.width": (2, 4), "kernel": (1, 3)}
    architecture = {"config.sizes.width": 4, "kernel": 3}
    subnet = space.freeze(architecture)
    assert subnet.config.sizes == Sizes(4, [3])
    assert subnet.config.sizes.doubled == 8
    assert type(subnet.config) is Slotted
    assert not hasattr(subnet.config, "unset")
    assert subnet.same is subnet.config.sizes
    assert isinstance(space.network.config.sizes.width, ValueChoice)  # the space keeps its values
    x = torch.randn(1, 3, 5, 5, dtype=torch.double)
    with space.running(space.gates_of(architecture)):
        torch.testing.assert_close(subnet(x), space(x), rtol=1e-12, atol=1e-12)


def test_dataclass_without_values_is_copied_and_one_that_contains_itself_is_entered_once() -> None:
    @dataclass
    class Knot:
        items: list[Any]

    network = nn.Sequential(LayerChoice([nn.Identity()], label="op"))
    knot = Knot([ValueChoice([1, 2], label="w")])
    knot.items.append(knot)
    network.plain = Knot([torch.ones(1)])
    space = ModelSpace(network)
    subnet = space.freeze({"op": 0})
    assert subnet.plain.items[0] is not network.plain.items[0]
    assert [leaf.label for value in values_in(knot) for leaf in value.leaves()] == ["w"]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_values_in_a_set_are_refused_when_the_space_is_built(kind: Any) -> None:
    network = nn.Sequential(LayerChoice([nn.Identity()], label="op"))
    network.sizes = {"all": kind([(ValueChoice([1, 2], label="w"),)])}
    with pytest.raises(TypeError, match=r"found in lists, tuples, dictionaries and dataclasses; got the set"):
        ModelSpace(network)
    network.sizes = kind([1, 2])
    assert ModelSpace(network).freeze({"op": 0}).sizes == {1, 2}


# ---- hooks


class Recorder:
    """Hooks that write down what ran, and of which class it was."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def before(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda module, _: self.seen.append(f"{name} before"))

    def after(self, name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda module, *_: self.seen.append(f"{name} {type(module).__name__}"))


def test_hooks_go_with_choices_and_mixed_operations_in_their_order() -> None:
    conv = Conv2d(3, ValueChoice([3, 4], label="w"), 1)
    choice = LayerChoice([conv, nn.Identity()], label="op")
    repeat = Repeat(nn.ReLU(), (0, 1), label="depth")
    space = ModelSpace(nn.Sequential(choice, repeat))
    recorder = Recorder()
    for name, module in (("choice", choice), ("conv", conv), ("repeat", repeat)):
        recorder.before(name, module)
        recorder.after(name, module)
    architecture = {"op": 0, "w": 3, "depth": 1}
    with space.running(space.gates_of(architecture)):
        space(torch.ones(1, 3, 2, 2))
    expected = [name.split(" ")[0] for name in recorder.seen]
    assert expected == ["choice", "conv", "conv", "choice", "repeat", "repeat"]
    recorder.seen.clear()
    for _ in range(2):  # freezing leaves the space's hooks alone
        subnet = space.freeze(architecture)
    subnet(torch.ones(1, 3, 2, 2))
    assert [name.split(" ")[0] for name in recorder.seen] == expected
    assert recorder.seen[2:4] == ["conv Conv2d", "choice Conv2d"]
    assert recorder.seen[5] == "repeat Sequential"


def test_hooks_that_change_inputs_outputs_and_gradients_act_in_the_subnet() -> None:
    linear = Linear(ValueChoice([2, 4], label="w"), 3)
    linear.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    linear.register_forward_hook(lambda _, args, kwargs, out: out + 1, with_kwargs=True, always_call=True)
    linear.register_full_backward_hook(lambda *_: (torch.zeros(1, 2, dtype=torch.double),))
    space = ModelSpace(linear).double()
    x = torch.randn(1, 2, dtype=torch.double, requires_grad=True)
    with space.running(space.gates_of({"w": 2})):
        expected = space(x)
    found = space.freeze({"w": 2})(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.autograd.grad(found.sum(), x)[0].any()


def test_hook_that_is_a_method_is_that_of_the_subnet() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.linear = Linear(2, ValueChoice([1, 2], label="w"))
            self.linear.register_forward_hook(self.remember)

        def remember(self, *_: Any) -> None:
            self.seen += 1

        def forward(self, x: Tensor) -> Any:
            return self.linear(x)

    network = Remembers()
    subnet = ModelSpace(network).freeze({"w": 1})
    subnet(torch.ones(1, 2))
    assert (network.seen, subnet.seen) == (0, 1)
