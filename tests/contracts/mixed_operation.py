"""What every mixed operation promises, as a test case for operations of your own, too."""

from __future__ import annotations

import itertools
import operator
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from hwnas import Gate, LayerChoice, ModelSpace, ValueChoice
from hwnas.nn import MixedOperation
from hwnas.nn.mixed import greatest
from hwnas.values import Expression, Value, as_value
from profilers import FlopsProfiler, ParamsProfiler, count_macs

Arguments = dict[str, Any]

# Sums of a few hundred products in double precision.
_EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Gradients of such sums, which are added up in another order.
_GRADIENT = {"rtol": 1e-11, "atol": 1e-11}

# Subclasses run one test each, as hypothesis notices.
_several = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.differing_executors])
_few = settings(_several, max_examples=5)


class MixedOperationContract(ABC):
    """What every mixed operation promises.

    Subclass it as ``Test…``, name the operation and its plain class, and say how they are built, what goes
    in, and which part of the weights a size takes. The tests then compare, in double precision:

    - a sampled path with a freshly built plain operation of the sliced weights, forward and backward,
    - the frozen operation with both,
    - one run under mixing weights with the weighted sum of all paths, with gradients, and gates that run two
      paths with the picked one,
    - what profilers say of a space with the operation, with what they say of its subnets.

    ``tests/hwnas/nn/test_own_operation.py`` is a short example.
    """

    operation: ClassVar[type[MixedOperation]]
    """The mixed operation."""

    plain: ClassVar[type[nn.Module]]
    """What it becomes."""

    draws: ClassVar[bool] = False
    """Whether it draws random numbers in training: its mixture is then compared in evaluation mode alone."""

    @abstractmethod
    def arguments(self) -> st.SearchStrategy[Arguments]:
        """What the operation is built with, some of it values; every outcome is valid for the plain one."""

    @abstractmethod
    def mixed_arguments(self) -> st.SearchStrategy[Arguments] | None:
        """As `arguments`, where it can be mixed. None: it never can.

        A choice that decides what goes in must not decide the width of what comes out: the output is masked
        where it is consumed, which is none of this operation's business.
        """

    @abstractmethod
    def refused_arguments(self) -> Sequence[Arguments]:
        """Some of `arguments` that `check_can_mix` refuses; none where everything can be mixed."""

    @abstractmethod
    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        """What goes in where the arguments are ``sizes``: doubles, or integers."""

    @abstractmethod
    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        """The plain operation's parameters and buffers at ``sizes``, cut from the operation's."""

    def output(self, result: Any) -> Tensor:
        """The tensor that is compared, of what the operation returns."""
        assert isinstance(result, Tensor)
        return result

    # ---- the promises

    @given(st.data())
    @_several
    def test_sampled_path_equals_freshly_built_operation(self, data: st.DataObject) -> None:
        arguments, is_training = data.draw(self.arguments()), data.draw(st.booleans())
        operation = self.built(arguments).train(is_training)
        space = ModelSpace(_Holder(operation))
        architecture = data.draw(architectures(space))
        sizes = sizes_at(arguments, architecture)
        plain = self.plain(**sizes).double().train(is_training)
        inputs = self.asking(self.inputs(sizes))
        # Buffers may change in a forward pass.
        state = {name: buffer.clone() for name, buffer in operation.named_buffers()}
        expected_state = self.weights({**dict(operation.named_parameters()), **state}, sizes)
        assert expected_state.keys() == plain.state_dict().keys()
        frozen = space.freeze(architecture).operation

        with space.running(space.gates_of(architecture)):
            output = self.run(space, inputs)
        expected = self.run(partial(functional_call, plain, expected_state), (inputs,))
        torch.testing.assert_close(output, expected, **_EXACT)
        wanted = [*filter(lambda tensor: tensor.requires_grad, inputs), *operation.parameters()]
        assert_equal_gradients(output, expected, wanted)
        now = self.weights({**dict(operation.named_parameters()), **dict(operation.named_buffers())}, sizes)
        torch.testing.assert_close(now, expected_state, **_EXACT)

        assert type(frozen) is self.plain
        assert not {*map(storage_of, frozen.state_dict().values())} & {
            *map(storage_of, operation.state_dict().values())
        }
        assert repr(frozen) == repr(plain)
        assert frozen.training is is_training
        torch.testing.assert_close(self.run(frozen, inputs), expected, **_EXACT)
        torch.testing.assert_close(dict(frozen.state_dict()), {n: t.detach() for n, t in now.items()})
        plain.load_state_dict(frozen.state_dict())

    @given(st.data())
    @_several
    def test_one_blended_run_equals_the_weighted_sum_of_the_sliced_paths(self, data: st.DataObject) -> None:
        strategy = self.mixed_arguments()
        if strategy is None:
            pytest.skip("never mixed")
        arguments = data.draw(strategy)
        operation = self.built(arguments).train(not self.draws and data.draw(st.booleans()))
        space = ModelSpace(_Holder(operation))
        space.check_can_mix()
        logits = {
            label: torch.randn(len(options), dtype=torch.double).requires_grad_()
            for label, options in space.options.items()
        }
        weights = {label: found.softmax(0) for label, found in logits.items()}
        every = list(every_architecture(space))
        inputs = self.asking(self.inputs(greatest_of(arguments, every)))

        with space.running({label: Gate(tuple(range(len(w))), w) for label, w in weights.items()}):
            blended = self.run(space, inputs)
        expected, presence = torch.zeros_like(blended), torch.zeros_like(blended)
        for architecture in every:
            chances = [weights[c][space.options[c].index(option)] for c, option in architecture.items()]
            chance = torch.stack(chances).prod()
            with space.running(space.gates_of(architecture)):
                path = self.run(space, self.cut(inputs, sizes_at(arguments, architecture)))
            expected = expected + chance * embedded(path, blended.shape)
            presence = presence + chance * embedded(torch.ones_like(path), blended.shape)
        masked = blended * presence  # as what consumes it does
        torch.testing.assert_close(masked, expected, **_EXACT)
        floating = [tensor for tensor in inputs if tensor.requires_grad]
        assert_equal_gradients(masked, expected, [*logits.values(), *floating, *operation.parameters()])

        # With its weights frozen it may go another way.
        operation.requires_grad_(False)
        with space.running({label: Gate(tuple(range(len(w))), w) for label, w in weights.items()}):
            again = self.run(space, inputs)
        torch.testing.assert_close(again, blended, **_EXACT)
        assert_equal_gradients(again * presence, masked, [*logits.values(), *floating])

    @given(st.data())
    @_several
    def test_two_paths_under_one_hot_weights_equal_the_picked_one(self, data: st.DataObject) -> None:
        strategy = self.mixed_arguments()
        if strategy is None:
            pytest.skip("never mixed")
        arguments = data.draw(strategy)
        space = ModelSpace(_Holder(self.built(arguments).eval()))
        space.check_can_mix()
        gates, picked, live = {}, {}, {}
        for label, options in space.options.items():
            two = data.draw(st.permutations(range(len(options))))[:2]
            one_hot = torch.zeros(len(options), dtype=torch.double)
            one_hot[two[0]] = 1.0
            gates[label] = Gate((two[0],), one_hot, run=tuple(two))
            picked[label], live[label] = options[two[0]], [options[index] for index in two]
        both = [dict(zip(live, found, strict=True)) for found in itertools.product(*live.values())]
        inputs = self.inputs(greatest_of(arguments, both))

        with space.running(gates):
            output = self.run(space, inputs)
        with space.running(space.gates_of(picked)):
            path = self.run(space, self.cut(inputs, sizes_at(arguments, picked)))
        torch.testing.assert_close(output[tuple(map(slice, path.shape))], path, **_EXACT)

    def test_what_cannot_be_blended_is_refused_by_name(self) -> None:
        for arguments in self.refused_arguments():
            space = ModelSpace(nn.Sequential(nn.Identity(), _Holder(self.built(arguments))))
            with pytest.raises(
                ValueError, match=r"'1.operation' cannot be searched with mixing weights: .*One"
            ):
                space.check_can_mix()

    @given(st.data())
    @_several
    def test_without_a_value_it_is_the_plain_operation(self, data: st.DataObject) -> None:
        arguments = data.draw(self.arguments())
        architecture = data.draw(architectures(ModelSpace(_Holder(self.built(arguments)))))
        sizes = sizes_at(arguments, architecture)
        operation, plain = self.built(sizes).eval(), self.plain(**sizes).double().eval()
        assert isinstance(operation, self.plain)
        plain.load_state_dict(operation.state_dict())
        inputs = self.inputs(sizes)
        torch.testing.assert_close(self.run(operation, inputs), self.run(plain, inputs), **_EXACT)

    @given(st.data())
    @_few
    def test_costs_in_a_space_are_those_of_its_subnets(self, data: st.DataObject) -> None:
        arguments = data.draw(self.arguments())
        space = ModelSpace(_Holder(self.built(arguments).float(), self.shapes_of(arguments)))
        given = self.inputs(greatest_of(arguments, list(every_architecture(space))))
        inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in given]
        macs, params = FlopsProfiler(space, *inputs), ParamsProfiler(space)
        for _ in range(4):
            architecture = data.draw(architectures(space))
            assert space.canonical(architecture) == architecture
            subnet = space.freeze(architecture)
            assert macs.profile(architecture) == count_macs(subnet, inputs).headline
            assert params.profile(architecture) == sum(p.numel() for p in subnet.parameters())

    @given(st.data())
    @_few
    def test_a_pickled_copy_runs_alike(self, data: st.DataObject) -> None:
        arguments = data.draw(self.arguments())
        space = ModelSpace(_Holder(self.built(arguments).eval()))
        architecture = data.draw(architectures(space))
        copied = pickle.loads(pickle.dumps(space))
        assert repr(copied) == repr(space)
        inputs = self.inputs(sizes_at(arguments, architecture))
        with space.running(space.gates_of(architecture)), copied.running(copied.gates_of(architecture)):
            torch.testing.assert_close(self.run(copied, inputs), self.run(space, inputs), **_EXACT)

    # ---- what the tests are written in

    def built(self, arguments: Arguments) -> MixedOperation:
        """The operation in double precision, with random weights and statistics."""
        torch.manual_seed(0)
        operation = self.operation(**arguments).double()
        with torch.no_grad():
            for tensor in operation.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 2.0)
        return operation

    def run(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        torch.manual_seed(0)
        return self.output(module(*inputs))

    def asking(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.requires_grad_() if t.is_floating_point() else t for t in inputs)

    def cut(self, inputs: Sequence[Tensor], sizes: Arguments) -> tuple[Tensor, ...]:
        """The front of large inputs that ``sizes`` take."""
        return cut_to(inputs, self.shapes(sizes))

    def shapes_of(self, arguments: Arguments) -> Value | None:
        """The inputs' shapes, as a value; None where they are the same for all."""
        sizes = as_value(tuple(arguments.values()))
        if not isinstance(sizes, Value):
            return None
        known = {found: self.shapes(dict(zip(arguments, found, strict=True))) for found in sizes.all()}
        return Expression("shapes", partial(operator.getitem, known), (sizes,))

    def shapes(self, sizes: Arguments) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tensor.shape) for tensor in self.inputs(sizes))


class _Holder(nn.Module):
    """Runs an operation; with ``shapes``, on the part of its inputs that the operation takes.

    Args:
        operation: the operation.
        shapes: of its inputs, by the arguments that are given, in their order.
    """

    def __init__(self, operation: nn.Module, shapes: Value | None = None) -> None:
        super().__init__()
        self.operation = operation
        # So that there is a choice whatever is drawn, and the operation is a site of its own.
        self.other = LayerChoice([nn.Identity()], label="other")
        self.shapes = shapes

    def forward(self, *inputs: Tensor) -> Any:
        if self.shapes is not None:
            inputs = cut_to(inputs, self.shapes.now() if isinstance(self.shapes, Value) else self.shapes)
        return self.operation(*inputs)


def cut_to(inputs: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    return tuple(x[tuple(map(slice, shape))] for x, shape in zip(inputs, shapes, strict=True))


def sizes_at(arguments: Arguments, architecture: Mapping[str, Any]) -> Arguments:
    """The arguments with plain numbers where values were."""
    given = {name: as_value(argument) for name, argument in arguments.items()}
    return {n: a.of(architecture) if isinstance(a, Value) else a for n, a in given.items()}


def greatest_of(arguments: Arguments, every: Sequence[Mapping[str, Any]]) -> Arguments:
    """The largest that each argument can be; those that are no numbers are the same everywhere."""
    chosen = [n for n, a in arguments.items() if isinstance(as_value(a), Value)]
    found = [sizes_at(arguments, architecture) for architecture in every]
    return {**found[0], **{name: greatest([sizes[name] for sizes in found]) for name in chosen}}


def every_architecture(space: ModelSpace) -> list[dict[str, Any]]:
    return [
        dict(zip(space.options, found, strict=True)) for found in itertools.product(*space.options.values())
    ]


def architectures(space: ModelSpace) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({label: st.sampled_from(o) for label, o in space.options.items()})


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def embedded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros after it, up to a shape."""
    pads = [(0, whole - part) for part, whole in zip(tensor.shape, shape, strict=True)]
    return nn.functional.pad(tensor, tuple(itertools.chain.from_iterable(reversed(pads))))


def assert_equal_gradients(output: Tensor, expected: Tensor, wanted: Sequence[Tensor]) -> None:
    asking = [tensor for tensor in wanted if tensor.requires_grad]
    if not asking or not output.requires_grad:
        assert output.requires_grad is expected.requires_grad
        return
    cotangent = torch.randn_like(expected)
    found, brute = (
        torch.autograd.grad(
            result, asking, cotangent, allow_unused=True, materialize_grads=True, retain_graph=True
        )
        for result in (output, expected)
    )
    torch.testing.assert_close(found, brute, **_GRADIENT)


def choice(draw: st.DrawFn, name: str, pool: Sequence[Any]) -> Any:
    """A `ValueChoice` over some of the pool, labelled by ``name``, or one of them."""
    options = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True))
    return ValueChoice(options, label=name) if len(options) > 1 else options[0]
