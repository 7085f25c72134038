"""Whether a network computes under mixing weights what its paths compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hwnas.gate import Gate
from hwnas.space import ModelSpace
from hwnas.strategies.side_effects import kept_buffers, own_random_numbers
from profilers.space import Architecture

_TOLERANCE = 1e-3  # relative; rounding in float32 is far below, the errors that are looked for far above
_DRAWS = 2


def check_blends(space: ModelSpace, step: Callable[[], object], seed: int) -> None:
    """Raises ``ValueError`` where mixing weights that pick one path do not return what the path returns.

    Operations of `hwnas.nn` keep to it by themselves; what stands between them may not: under mixing weights
    it sees the largest width, and a concatenation, a reshape of channels or a mean over them goes wrong. It
    is looked at in the default architecture and a few drawn ones, in evaluation mode, and not at all where
    the network is random there or computes in less than 32 bits.

    Args:
        space: the space.
        step: calls the space once as in training; it is not let to the end.
        seed: of the draws.
    """
    values = [label for label in space.value_labels if len(space.options[label]) > 1]
    inputs = _inputs(space, step) if values else None
    if inputs is None:
        return
    generator = torch.Generator().manual_seed(seed)
    with _evaluating(space), torch.no_grad():
        for architecture in (space.default(), *(space.random(generator) for _ in range(_DRAWS))):
            path = _run(space, inputs, architecture, (), seed)
            off = _distance(path, _run(space, inputs, architecture, values, seed))
            again = _run(space, inputs, architecture, (), seed + 1)
            if off <= _TOLERANCE or _distance(path, again) > 0:
                continue
            each = {
                label: _distance(path, _run(space, inputs, architecture, (label,), seed)) for label in values
            }
            found = [label for label, distance in each.items() if distance > _TOLERANCE] or values
            raise ValueError(
                f"mixing weights that pick one option of {', '.join(map(repr, found))} must give what that "
                f"option alone gives; the network's output is off by {off:.1%}. They run the largest width, "
                "so that nothing between the operations of hwnas.nn may depend on the number of channels, as "
                "a concatenation, a reshape of channels or a mean over them does. Fix that width, "
                "choose between whole layers with a LayerChoice, or search with a strategy that runs one "
                "path (RandomOneShot, ENAS)"
            )


@final
class _CalledError(Exception):
    """The space was called, with ``inputs``."""

    def __init__(self, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> None:
        super().__init__()
        self.inputs = inputs


def _inputs(
    space: ModelSpace, step: Callable[[], object]
) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
    """What the step calls the space with; None where it does not."""

    def stop(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        raise _CalledError((inputs, keywords))

    watching = space.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        step()
    except _CalledError as called:
        return called.inputs
    finally:
        watching.remove()
    return None


def _run(
    space: ModelSpace,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    architecture: Architecture,
    mixed: Sequence[str],
    seed: int,
) -> list[Any]:
    gates = space.gates_of(architecture)
    device = next((parameter.device for parameter in space.parameters()), torch.device("cpu"))
    for label in mixed:
        options = len(space.options[label])
        weights = torch.zeros(options, device=device)
        weights[gates[label].picked[0]] = 1.0
        gates[label] = Gate(tuple(range(options)), weights)
    with own_random_numbers(seed), space.running(gates), kept_buffers(space):
        found: list[Any] = tree_leaves(space(*inputs[0], **inputs[1]))
        return found


def _distance(path: Sequence[Any], mixed: Sequence[Any]) -> float:
    """The greatest relative distance of two tensors; those of other shapes are nobody's inputs here."""
    pairs = [
        (a.double(), b.double())
        for a, b in zip(path, mixed, strict=False)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        if a.dtype in (torch.float32, torch.float64)
    ]
    return max((float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs), default=0.0)


@contextlib.contextmanager
def _evaluating(space: ModelSpace) -> Iterator[None]:
    modes = {module: module.training for module in space.modules()}
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if torch.cuda.is_available() else None
    try:
        space.eval()
        with exact or contextlib.nullcontext():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
