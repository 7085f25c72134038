"""A subnet's weights, written back to where they came from in the supernet."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.freezing import Freezer
from profilers.space import Option


def load_subnet_weights(
    network: nn.Module, architecture: Mapping[str, Option], state: Mapping[str, Any]
) -> None:
    """Writes ``state`` into the tensors of ``network`` that the subnet of an architecture was cut from.

    A copy of the network is frozen in which every element is a mark of its own: the marks in that subnet
    say where each element comes from, in whatever way freezing cuts and joins tensors.

    Raises:
        ValueError: other names or shapes than the subnet's, or a tensor whose elements were computed.
    """
    tensors = list({id(t): t for t in (*network.parameters(), *network.buffers())}.values())
    marks = _marks(sum(tensor.numel() for tensor in tensors))
    sizes = [tensor.numel() for tensor in tensors]
    memo: dict[int, Any] = {}
    for tensor, own in zip(tensors, torch.split(marks, sizes), strict=True):
        shaped = own.reshape(tensor.shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shaped, requires_grad=False) if is_parameter else shaped
    marked = Freezer(architecture)(copy.deepcopy(network, memo)).state_dict()
    _check_names_and_shapes(marked, state)
    places = {name: _places(name, found.flatten(), marks) for name, found in marked.items()}
    ends = torch.tensor(sizes).cumsum(0)
    with torch.no_grad():
        for name, place in places.items():
            values = state[name].detach().flatten()
            owners = torch.searchsorted(ends, place, right=True)
            for owner in owners.bincount().nonzero().flatten().tolist():
                is_here = owners == owner
                tensor = tensors[owner]
                index = place[is_here] - (int(ends[owner]) - sizes[owner])
                tensor.put_(index.to(tensor.device), values[is_here.to(values.device)].to(tensor))


def _marks(count: int) -> Tensor:
    """For each element its number, with a random fraction: what is computed from marks is none."""
    fractions = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.arange(count, dtype=torch.float64) + 0.25 + 0.5 * fractions


def _places(name: str, found: Tensor, marks: Tensor) -> Tensor:
    """The numbers of the elements that carry these marks."""
    place = found.long().clamp(0, max(len(marks) - 1, 0))
    if not torch.equal(marks[place], found):
        raise ValueError(
            f"'{name}' of the subnet is computed from the space's weights, not cut out of them: "
            "it cannot be written back"
        )
    return place


def _check_names_and_shapes(expected: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        raise ValueError(
            "a subnet's state has the names of the architecture's subnet; "
            f"missing: {missing or 'none'}, unknown: {unknown or 'none'}. Is it another architecture's?"
        )
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor) or not isinstance(state[name], Tensor):
            raise ValueError(
                f"only tensors can be written back to a space; '{name}' is a {type(state[name]).__name__}"
            )
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"'{name}' has the shape {tuple(tensor.shape)} in the architecture's subnet; got "
                f"{tuple(state[name].shape)}. Is it another architecture's?"
            )
