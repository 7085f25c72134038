"""What a kind of choice promises, as a test case that others can subclass.

::

    from tests.contracts.choice import ChoiceContract

    class TestMyChoice(ChoiceContract):
        def make_space(self):
            return ModelSpace(MyChoice([nn.Linear(4, 4), nn.Identity()], label="mine"))

        def make_inputs(self):
            return (torch.randn(2, 4),)
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwnas import Gate, ModelSpace
from hwnas.freezing import Freezes
from profilers import FlopsProfiler, ParamsProfiler, count_macs
from profilers.space import Architecture

_LARGEST = 2000  # combinations of options: more take too long


class ChoiceContract(ABC):
    """Subclass it as ``Test…`` and give it a small space in which the choice stands.

    Spaces are made anew for each test and run in float64, in evaluation mode. Layers should be linear
    (without activation functions), so that the mixture of all paths is their expectation exactly; two
    layers of one shape need other weights, and no choice stands in the network twice.
    """

    mixes = True
    """Whether the choice can be searched with mixing weights."""

    mixture_is_expectation = True
    """Whether that mixture is the paths' expectation; not where what is mixed and how both follow from one
    choice, as in a cell's loose ends."""

    @abstractmethod
    def make_space(self) -> ModelSpace:
        """A space of at most 2,000 combinations of options; it can be pickled."""

    @abstractmethod
    def make_inputs(self) -> tuple[Any, ...]:
        """What its network is called with; tensors that it can be profiled on."""

    # ---- what it promises

    def test_subnet_equals_the_path_of_every_architecture(self) -> None:
        space, inputs = self._ready()
        for architecture in space.grid():
            for training in (False, True):
                subnet = space.train(training).freeze(architecture)
                assert not any(isinstance(module, Freezes) for module in subnet.modules())
                assert all(module.training == training for module in subnet.modules())
                # Evaluated both, or the first pass would move statistics before the second.
                expected = _path(copy.deepcopy(space), architecture, inputs)
                _assert_close(subnet(*inputs), expected)

    def test_canonical_architectures_are_the_different_networks(self) -> None:
        space, inputs = self._ready()
        seen = {}
        for architecture in _every(space):
            canonical = space.canonical(architecture)
            assert space.canonical(canonical) == canonical
            seen[json.dumps(canonical)] = canonical
            _assert_close(_path(space, architecture, inputs), _path(space, canonical, inputs))
        grid = [json.dumps(architecture) for architecture in space.grid()]
        assert len(grid) == len(seen) == space.size
        assert set(grid) == seen.keys()

    def test_random_architectures_are_canonical(self) -> None:
        space, _ = self._ready()
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            architecture = space.random(generator)
            assert space.canonical(architecture) == architecture

    def test_what_is_not_chosen_runs_nothing(self) -> None:
        space, inputs = self._ready()
        for architecture in space.grid():
            subnet = space.freeze(architecture)
            in_subnet, on_path = _watched(subnet), _watched(space)
            subnet(*inputs)
            _path(space, architecture, inputs)
            assert len(on_path) == len(in_subnet)

    def test_architectures_survive_json(self) -> None:
        space, _ = self._ready()
        for architecture in space.grid():
            assert space.validate(json.loads(json.dumps(architecture))) == architecture

    def test_space_survives_copying_and_pickling(self) -> None:
        space, inputs = self._ready()
        for again in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
            assert again.options == space.options
            for architecture in itertools.islice(space.grid(), 10):
                _assert_close(_path(again, architecture, inputs), _path(space, architecture, inputs))

    def test_cost_of_every_architecture_is_what_the_meter_says_of_its_subnet(self) -> None:
        space, inputs = self._ready()
        macs, params = FlopsProfiler(space, *inputs), ParamsProfiler(space)
        for architecture in space.grid():
            subnet = space.freeze(architecture)
            assert macs.profile(architecture) == count_macs(subnet, inputs).headline
            assert params.profile(architecture) == sum(p.numel() for p in subnet.parameters())

    def test_state_of_every_subnet_goes_back_to_where_it_came_from(self) -> None:
        space, inputs = self._ready()
        for architecture in space.grid():
            subnet = space.freeze(architecture)
            with torch.no_grad():
                for tensor in subnet.parameters():
                    tensor.add_(torch.randn_like(tensor))
            space.load_subnet_state_dict(architecture, subnet.state_dict())
            _assert_close(_path(space, architecture, inputs), subnet(*inputs))
            found = space.subnet_state_dict(architecture)
            assert found.keys() == subnet.state_dict().keys()

    def test_hooks_on_the_space_act_in_every_subnet(self) -> None:
        space, inputs = self._ready()
        for module in space.network.modules():
            if isinstance(module, Freezes):
                module.register_forward_hook(_doubled)
        for architecture in space.grid():
            _assert_close(space.freeze(architecture)(*inputs), _path(space, architecture, inputs))

    def test_mixture_is_the_expectation_of_the_paths(self) -> None:
        space, inputs = self._ready()
        if not self.mixes:
            with pytest.raises(ValueError, match="cannot be searched with mixing weights"):
                space.check_can_mix()
            return
        space.check_can_mix()
        weights = {
            label: torch.rand(len(options), dtype=torch.double).softmax(0).requires_grad_()
            for label, options in space.options.items()
        }
        gates = {label: Gate(tuple(range(len(w))), w) for label, w in weights.items()}
        with space.running(gates):
            mixed = space(*inputs)
        wanted = [w for w in weights.values() if len(w) > 1]  # one option alone is no mixture
        if not self.mixture_is_expectation:
            found = torch.autograd.grad(mixed.square().sum(), wanted)
            assert all(bool(gradient.any()) for gradient in found)
            return
        expected = torch.zeros_like(mixed)
        for architecture in _every(space):
            chances = [weights[n][space.options[n].index(option)] for n, option in architecture.items()]
            expected = expected + math.prod(chances[1:], start=chances[0]) * _path(
                space, architecture, inputs
            )
        _assert_close(mixed, expected)
        found = torch.autograd.grad(mixed.square().sum(), wanted, retain_graph=True)
        for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
            # To mixing weights: their sum is always 1, so that a constant means nothing.
            torch.testing.assert_close(ours - ours.mean(), theirs - theirs.mean(), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("paths", ["all", "two"])
    def test_binary_gates_run_the_picked_path_with_a_gradient_to_the_logits(self, paths: str) -> None:
        space, inputs = self._ready()
        if not self.mixes:
            return
        generator = torch.Generator().manual_seed(0)
        for architecture in itertools.islice(space.grid(), 20):
            gates, logits = {}, {}
            for label, options in space.options.items():
                picked = options.index(architecture[label])
                logits[label] = torch.randn(
                    len(options), dtype=torch.double, generator=generator
                ).requires_grad_()
                probabilities = logits[label].softmax(0)
                one_hot = torch.zeros_like(probabilities)
                one_hot[picked] = 1.0
                straight = one_hot + (probabilities - probabilities.detach())
                other = (picked + 1) % len(options)
                run = None if paths == "all" else tuple(sorted({picked, other}))
                gates[label] = Gate((picked,), straight, run)
            with space.running(gates):
                output = space(*inputs)
            _assert_close(output, _path(space, architecture, inputs))
            active = [logits[n] for n in space.active(architecture) if len(logits[n]) > 1]
            found = torch.autograd.grad(output.square().sum(), active, allow_unused=True)
            assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)

    # ---- helpers

    def _ready(self) -> tuple[ModelSpace, tuple[Any, ...]]:
        torch.manual_seed(0)
        space = self.make_space().double().eval()
        assert math.prod(len(options) for options in space.options.values()) <= _LARGEST
        inputs = _double(self.make_inputs())
        return space, inputs


def _double(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.double() if thing.is_floating_point() else thing
    return type(thing)(_double(item) for item in thing) if isinstance(thing, list | tuple) else thing


def _every(space: ModelSpace) -> list[Architecture]:
    """Every combination of options, canonical or not."""
    return [
        dict(zip(space.options, chosen, strict=True)) for chosen in itertools.product(*space.options.values())
    ]


def _path(space: ModelSpace, architecture: Architecture, inputs: tuple[Any, ...]) -> Any:
    with space.running(space.gates_of(architecture)):
        return space(*inputs)


def _assert_close(found: Any, expected: Any) -> None:
    # float64: only the order of sums may differ
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _doubled(_: nn.Module, __: Any, output: Any) -> Any:
    return output * 2 if isinstance(output, Tensor) else output


def _watched(network: nn.Module) -> list[nn.Module]:
    """Gets every module with parameters of its own that runs, each time it runs."""
    ran: list[nn.Module] = []
    for module in network.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    return ran
