"""Sites are found by running; what they execute is what the frozen subnet executes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas import InputChoice, LayerChoice, ModelSpace, Repeat, ValueChoice
from hwnas.nn import BatchNorm2d, Conv2d, Linear
from lookup_tables.graph import executed_graph


class Rich(nn.Module):
    """Op, depth, coupled widths, nested and shared choices, resolution, inputs, and functions in forward."""

    def __init__(self) -> None:
        super().__init__()
        width = ValueChoice([4, 6, 8], label="width")
        hidden = width * ValueChoice([1, 2], label="ratio")
        self.side = ValueChoice([6, 8], label="side")
        self.stem = Conv2d(1, width, 3, padding=1)
        self.norm = BatchNorm2d(width)
        self.block = nn.Sequential(Conv2d(width, hidden, 1), nn.ReLU(), Conv2d(hidden, width, 1))
        self.stages = Repeat(
            lambda index: LayerChoice(
                {
                    "conv": Conv2d(width, width, 3, padding=1),
                    "skip": nn.Identity(),
                    "nest": LayerChoice([nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)], label=f"pool{index}"),
                },
                label=f"op{index}",
            ),
            depth=(1, 3),
            label="depth",
        )
        self.inputs = InputChoice(3, n_chosen=2, reduction="sum", label="inputs")
        self.head = Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, size=(int(self.side), int(self.side)))
        first = F.relu(self.norm(self.stem(images)))
        second = first + self.block(first)
        third = self.stages(second)
        mixed: Tensor = self.inputs([first, second, third])
        scores: Tensor = self.head(mixed.mean((2, 3)))
        return scores


EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def space() -> ModelSpace:
    torch.manual_seed(0)
    return ModelSpace(Rich())


@pytest.fixture(scope="module")
def sites(space):
    return space.sites(EXAMPLE)


def weight_positions(module: nn.Module, inputs) -> int:
    """Multiply-adds of convolutions and linear layers, counted by hooks."""
    counted = []

    def count(layer, given, output):
        counted.append(layer.weight[0].numel() * output.numel())

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def test_sum_over_sites_equals_the_frozen_subnet(space, sites):
    generator = torch.Generator().manual_seed(1)
    for _ in range(25):
        architecture = space.random(generator)
        parts = [part for site in sites if (part := site.part(architecture)) is not None]
        total = sum(weight_positions(part.module, part.inputs) for part in parts)
        subnet = space.freeze(architecture).eval()
        assert total == weight_positions(subnet, [EXAMPLE])


def test_every_function_of_forward_is_a_site(space, sites):
    names = {site.name for site in sites}
    assert {"interpolate", "relu", "add", "mean", "inputs:add"} <= names


def test_number_of_executed_operators_is_that_of_the_subnet(space, sites):
    generator = torch.Generator().manual_seed(2)

    def operators(module, inputs):
        from lookup_tables.graph import _Recorder

        recorder = _Recorder(inputs)
        with torch.no_grad(), recorder:
            module(*inputs)
        return len(recorder.lines)

    for _ in range(10):
        architecture = space.random(generator)
        parts = [part for site in sites if (part := site.part(architecture)) is not None]
        subnet = space.freeze(architecture).eval().to("meta")
        assert sum(operators(p.module, p.inputs) for p in parts) == operators(subnet, [EXAMPLE.to("meta")])


def test_labels_of_a_site_are_its_path_its_own_and_what_shapes_its_input(space, sites):
    labels = {site.name: set(site.labels) for site in sites}
    assert labels["stem"] == {"side", "width"}
    assert labels["block"] == {"side", "width", "ratio"}
    assert labels["stages.1.conv"] == {"depth", "op1", "side", "width"}
    assert labels["stages.2.nest.0"] == {"depth", "op2", "pool2", "side", "width"}


def test_part_reads_only_the_labels_of_its_site(space, sites):
    architecture = space.default()
    for site in sites:
        site.part({label: architecture[label] for label in site.labels})


def test_skip_is_free_and_equal_blocks_have_equal_keys(space, sites):
    architecture = {**space.default(), "depth": 3, "op0": "conv", "op1": "conv", "op2": "skip"}
    parts = {site.name: site.part(architecture) for site in sites}
    assert parts["stages.2.skip"].is_free
    assert parts["stages.0.conv"].key == parts["stages.1.conv"].key
    assert parts["stages.0.conv"].key != parts["stem"].key


def test_part_names_say_what_and_at_which_shape(space, sites):
    (stem,) = (site for site in sites if site.name == "stem")
    assert stem.part(space.default()).name.startswith("Conv2d(1, 4, kernel_size=(3, 3)")
    assert stem.part(space.default()).name.endswith("at 1x1x6x6")


def test_survey_leaves_the_space_as_it_is(space):
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    space.train()
    space.sites(EXAMPLE)
    assert space.training
    assert all(torch.equal(before[name], tensor) for name, tensor in space.state_dict().items())
    assert space(EXAMPLE).device.type == "cpu"


def test_parameter_sites_hold_each_parameter_once(space):
    generator = torch.Generator().manual_seed(3)
    sites = space.parameter_sites()
    for _ in range(10):
        architecture = space.random(generator)
        parts = [part for site in sites if (part := site.part(architecture)) is not None]
        held = sum(p.numel() for part in parts for p in part.module.parameters())
        assert held == sum(p.numel() for p in space.freeze(architecture).parameters())


def test_module_called_twice_is_two_sites():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Conv2d(2, 2, 3, padding=1)
            self.between = LayerChoice([nn.MaxPool2d(2), nn.Identity()], label="between")

        def forward(self, x):
            return self.shared(self.between(self.shared(x)))

    found = {site.name: site for site in ModelSpace(Twice()).sites(torch.zeros(1, 2, 8, 8))}
    assert set(found["shared"].labels) == set()
    assert set(found["shared#1"].labels) == {"between"}
    assert found["shared#1"].part({"between": 0}).inputs[0].shape == (1, 2, 4, 4)


def test_module_shared_by_two_branches_runs_only_where_its_branch_is_taken():
    conv = nn.Conv2d(2, 2, 1)
    space = ModelSpace(nn.Sequential(LayerChoice([conv, nn.Sequential(conv, nn.ReLU())], label="op")))
    sites = space.sites(torch.zeros(1, 2, 4, 4))
    for option in (0, 1):
        parts = [p for site in sites if (p := site.part({"op": option})) is not None]
        assert len(parts) == 1


def test_keyword_and_plain_arguments_stay_with_the_site():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale, shift=None):
            return self.linear(x) * scale + (0 if shift is None else shift)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled = Scaled()
            self.op = LayerChoice([nn.ReLU(), nn.Identity()], label="op")

        def forward(self, x):
            return self.op(self.scaled(x, 2.0, shift=x))

    (site,) = (s for s in ModelSpace(Net()).sites(torch.zeros(1, 4)) if s.name == "scaled")
    part = site.part({})
    assert len(part.inputs) == 2
    assert executed_graph(part.module, part.inputs).key == part.key


def test_shapes_decided_by_anything_else_than_choices_are_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.op = LayerChoice([nn.ReLU(), nn.Identity()], label="op")
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            self.calls += 1
            x = self.op(x)
            return self.pool(x) if self.calls % 2 else self.pool(x[:, :, :4])

    with pytest.raises(RuntimeError, match=r"'(pool|getitem)'.*decided by the choices alone"):
        ModelSpace(Fickle()).sites(torch.zeros(1, 1, 8, 8))


def test_tensors_that_forward_makes_follow_the_survey_to_its_device():
    class Positions(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[-1])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = Positions()
            self.op = LayerChoice([nn.ReLU(), nn.Identity()], label="op")

        def forward(self, x):
            return self.op(self.positions(x)) * torch.ones(x.shape[-1])

    space = ModelSpace(Net())
    (site,) = (found for found in space.sites(torch.zeros(1, 4)) if found.name == "positions")
    assert not site.part({}).is_free


def test_shapes_that_are_changed_in_place_are_of_that_run_alone():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.op = LayerChoice([nn.ReLU(), nn.Identity()], label="op")
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = self.conv(x)
            x = x.unsqueeze_(0).squeeze(0)  # of a module,
            x = self.op(x)
            x = x.unsqueeze_(0).squeeze(0)  # of a choice,
            x = x * 2
            x = x.unsqueeze_(0).squeeze(0)  # of a function
            return self.head(x)

    sites = ModelSpace(Reshaping()).sites(torch.zeros(1, 3, 8, 8))
    assert {tuple(site.part({"op": 0}).inputs[0].shape) for site in sites if site.name == "head"} == {
        (1, 4, 8, 8)
    }


def test_wrong_example_input_is_named():
    space = ModelSpace(Rich())
    with pytest.raises(ValueError, match=r"does not run on inputs of shapes \[\(1, 3, 8, 8\)\]"):
        space.sites(torch.zeros(1, 3, 8, 8))
