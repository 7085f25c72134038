from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import Gate, ModelSpace, ValueChoice
from hwnas.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm, LayerNorm
from tests.contracts.mixed_operation import Arguments, MixedOperationContract, choice


class BatchNormContract(MixedOperationContract, ABC):
    """Promises in any number of dimensions."""

    sides: tuple[int, ...]

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            momentum = draw(st.sampled_from([0.1, None, ValueChoice([0.1, 0.3], label="momentum")]))
            return {
                "num_features": choice(draw, "width", [2, 5, 8]),
                "eps": choice(draw, "eps", [1e-5, 1e-3]),
                "momentum": momentum,
                "affine": draw(st.booleans()),
                "track_running_stats": draw(st.booleans()),
            }

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            return {
                "num_features": choice(draw, "width", [2, 5, 8]),
                "affine": draw(st.booleans()),
                "track_running_stats": draw(st.booleans()),
            }

        return drawn()

    def refused_arguments(self) -> Sequence[Arguments]:
        return [
            {"num_features": 4, "eps": ValueChoice([1e-5, 1e-3], label="c")},
            {"num_features": 4, "momentum": ValueChoice([0.1, 0.3], label="c")},
            {"num_features": ValueChoice([4, 8], label="c"), "statistics": "per_width"},
        ]

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        return (torch.randn(4, sizes["num_features"], *self.sides, dtype=torch.double),)

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        return {name: t[: sizes["num_features"]] if t.ndim else t for name, t in state.items()}


class TestBatchNorm1d(BatchNormContract):
    operation, plain, sides = BatchNorm1d, nn.BatchNorm1d, ()


class TestBatchNorm1dOfSequences(BatchNormContract):
    operation, plain, sides = BatchNorm1d, nn.BatchNorm1d, (6,)


class TestBatchNorm2d(BatchNormContract):
    operation, plain, sides = BatchNorm2d, nn.BatchNorm2d, (3, 4)


class TestBatchNorm3d(BatchNormContract):
    operation, plain, sides = BatchNorm3d, nn.BatchNorm3d, (3, 2, 2)


def test_widths_share_their_statistics_and_leave_the_others_alone() -> None:
    norm = BatchNorm2d(ValueChoice([2, 5], label="width"))
    space = ModelSpace(norm)
    with space.running(space.gates_of({"width": 2})):
        space(torch.randn(4, 2, 3, 3) + 5)
    assert norm.running_mean is not None
    assert (norm.running_mean[:2] > 0.2).all()
    assert (norm.running_mean[2:] == 0).all()
    assert space.freeze({"width": 5}).running_mean.tolist() == norm.running_mean.tolist()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_every_width_with_statistics_of_its_own_is_as_if_trained_alone(momentum: float | None) -> None:
    widths = ValueChoice([2, 5, 8], label="width")
    norm = BatchNorm2d(widths, momentum=momentum, statistics="per_width").double()
    space = ModelSpace(norm)
    alone = {width: nn.BatchNorm2d(width, momentum=momentum).double() for width in widths.options}
    for width in (2, 8, 2, 8, 2):  # 5 is never trained
        x = torch.randn(4, width, 3, 3, dtype=torch.double) + width
        with space.running(space.gates_of({"width": width})):
            torch.testing.assert_close(space(x), alone[width](x))
    space.eval()
    for width, plain in alone.items():
        x = torch.randn(4, width, 3, 3, dtype=torch.double)
        with space.running(space.gates_of({"width": width})):
            torch.testing.assert_close(space(x), plain.eval()(x))
        torch.testing.assert_close(space.freeze({"width": width}).state_dict(), plain.state_dict())


def test_statistics_of_every_width_are_saved_and_reset() -> None:
    space = ModelSpace(BatchNorm2d(ValueChoice([2, 4], label="width"), statistics="per_width"))
    other = ModelSpace(BatchNorm2d(ValueChoice([2, 4], label="width"), statistics="per_width"))
    x = torch.randn(4, 2, 3, 3) + 5
    space(x)
    other.load_state_dict(space.state_dict())
    torch.testing.assert_close(space.eval()(x), other.eval()(x))
    other.network.reset_running_stats()  # type: ignore[operator]
    assert other.freeze({"width": 2}).running_mean.tolist() == [0, 0]
    assert other.freeze({"width": 2}).running_var.tolist() == [1, 1]
    assert int(other.freeze({"width": 2}).num_batches_tracked) == 0


def test_unknown_kind_of_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="statistics must be 'shared' or 'per_width'; got 'own'"):
        BatchNorm2d(4, statistics="own")  # type: ignore[arg-type]


def test_input_of_the_wrong_rank_is_refused_as_torch_does() -> None:
    space = ModelSpace(BatchNorm2d(ValueChoice([2, 4], label="width")))
    with pytest.raises(ValueError, match="expected 4D input"):
        space(torch.randn(2, 2))


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="of newer torch")
@pytest.mark.parametrize(
    "norm",
    [
        BatchNorm2d(ValueChoice([2, 4], label="width"), bias=False),
        GroupNorm(2, ValueChoice([2, 4], label="width"), bias=False),
    ],
)
def test_norm_without_bias_freezes_to_one_without(norm: Any) -> None:
    space = ModelSpace(norm).eval()
    subnet = space.freeze({"width": 2})
    assert subnet.bias is None
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(subnet(x), space(x))


class TestLayerNorm(MixedOperationContract):
    operation, plain = LayerNorm, nn.LayerNorm

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            width = choice(draw, "width", [2, 5, 8])
            shapes = [width, (width, 3), (3, width), (choice(draw, "height", [2, 4]), width)]
            shapes.append(choice(draw, "shape", [(2, 3), (4, 3), (3, 5)]))
            return {
                "normalized_shape": draw(st.sampled_from(shapes)),
                "eps": choice(draw, "eps", [1e-5, 1e-3]),
                "elementwise_affine": draw(st.sampled_from([True, True, False])),
                "bias": draw(st.booleans()),
            }

        return drawn()

    def mixed_arguments(self) -> None:
        return None

    def refused_arguments(self) -> Sequence[Arguments]:
        return [
            {"normalized_shape": ValueChoice([4, 8], label="c")},
            {"normalized_shape": [3, ValueChoice([4, 8], label="c")]},
            {"normalized_shape": 8, "eps": ValueChoice([1e-5, 1e-3], label="c")},
        ]

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        shape = sizes["normalized_shape"]
        return (torch.randn(2, 3, *(shape if isinstance(shape, tuple) else (shape,)), dtype=torch.double),)

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        shape = sizes["normalized_shape"]
        cut = tuple(map(slice, shape if isinstance(shape, tuple) else (shape,)))
        return {name: tensor[cut] for name, tensor in state.items()}


def test_width_of_one_option_can_be_normalised_under_mixing_weights() -> None:
    space = ModelSpace(LayerNorm(ValueChoice([4], label="width")))
    space.check_can_mix()
    x = torch.randn(2, 4)
    with space.running({"width": Gate((0,), torch.ones(1))}):
        torch.testing.assert_close(space(x), nn.LayerNorm(4)(x))


class TestGroupNorm(MixedOperationContract):
    operation, plain = GroupNorm, nn.GroupNorm

    def arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            width = choice(draw, "width", [4, 8, 12])
            return {
                "num_groups": draw(
                    st.sampled_from([1, 4, choice(draw, "groups", [1, 2, 4]), width // 2, width])
                ),
                "num_channels": width,
                "eps": choice(draw, "eps", [1e-5, 1e-3]),
                "affine": draw(st.booleans()),
            }

        return drawn()

    def mixed_arguments(self) -> st.SearchStrategy[Arguments]:
        @st.composite
        def drawn(draw: st.DrawFn) -> Arguments:
            width = choice(draw, "width", [4, 8, 12])
            return {
                "num_groups": draw(st.sampled_from([width // 4, width // 2, width])),
                "num_channels": width,
                "affine": draw(st.booleans()),
            }

        return drawn()

    def refused_arguments(self) -> Sequence[Arguments]:
        return [
            {"num_groups": 2, "num_channels": ValueChoice([4, 8], label="c")},
            {"num_groups": ValueChoice([2, 4], label="c"), "num_channels": 8},
            {"num_groups": 2, "num_channels": 8, "eps": ValueChoice([1e-5, 1e-3], label="c")},
        ]

    def inputs(self, sizes: Arguments) -> tuple[Tensor, ...]:
        return (torch.randn(2, sizes["num_channels"], 3, 2, dtype=torch.double),)

    def weights(self, state: Mapping[str, Tensor], sizes: Arguments) -> dict[str, Tensor]:
        return {name: tensor[: sizes["num_channels"]] for name, tensor in state.items()}


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by num_groups in every .* of options; got 6 and 4"):
        GroupNorm(4, ValueChoice([6, 8], label="width"))


def test_running_averages_over_all_batches_can_be_mixed() -> None:
    width = ValueChoice([2, 4], label="width")
    space = ModelSpace(nn.Sequential(BatchNorm1d(width, momentum=None)))
    plain, inputs = nn.BatchNorm1d(4, momentum=None), torch.randn(3, 8, 4)
    with space.running({"width": Gate((0, 1), torch.tensor([0.5, 0.5]))}):
        for batch in inputs:
            assert torch.equal(space(batch), plain(batch))
    assert torch.equal(space.network[0].running_mean, plain.running_mean)
