"""From an architecture and a checkpoint on disk to an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.data import describe, load_data, retrain_dataloader
from hwnas.export import accuracy, export_onnx, parity
from hwnas.loading import load_space
from hwnas.recalibrate import recalibrate
from hwnas.run_folder import read_json
from hwnas.space import ModelSpace
from profilers.space import Architecture

_RECALIBRATION_BATCHES = 20


def export_from_checkpoint(
    architecture: Path,
    checkpoint: Path,
    out: Path,
    *,
    space: str,
    data: str | None = None,
    data_folder: str | None = None,
    input_shape: tuple[int, ...] = (1, 28, 28),
    num_classes: int = 10,
    dynamic_batch: bool = False,
) -> dict[str, Any]:
    """Writes the ONNX file of an architecture with a checkpoint's weights, and says how it agrees with torch.

    Args:
        architecture: a JSON file with one option for each choice.
        checkpoint: of Lightning or a plain state dict; of the subnet, or of the supernet, whose weights
            are inherited.
        out: the ONNX file.
        space: by name, or ``module:attribute``.
        data: recalibrates BatchNorm, gives real inputs to compare on, and tests the file; None: random
            inputs, and the checkpoint's BatchNorm statistics as they are.
        data_folder: where the data's files lie.
        input_shape, num_classes: where there is no data to say them.
        dynamic_batch: whether the batch stays open.

    Returns:
        ``file``, ``parity_max_abs_diff`` and, with data, ``test_accuracy``.

    Raises:
        ValueError: a damaged file, or weights that fit neither the subnet nor the space.
    """
    module = None if data is None else load_data(data, folder=data_folder)
    if module is not None:
        module.prepare_data()
        module.setup("fit")
        facts = describe(module)
        input_shape, num_classes = facts.input_shape, facts.num_classes
    found = load_space(space, num_classes, input_shape[0])
    chosen = found.validate(read_json(architecture, "architecture"))
    subnet = loaded_subnet(found, chosen, checkpoint)
    inputs = torch.randn(8, *input_shape, generator=torch.Generator().manual_seed(0))
    if module is not None:
        recalibrate(subnet, islice(retrain_dataloader(module), _RECALIBRATION_BATCHES))
        module.setup("test")
        inputs = next(iter(module.test_dataloader()))[0][:64]
    export_onnx(
        subnet,
        inputs[:1],
        out,
        dynamic_batch=dynamic_batch,
        metadata={"architecture": chosen, "space": space},
    )
    report = {"file": str(out), "parity_max_abs_diff": parity(subnet, out, [inputs])}
    if module is not None:
        report["test_accuracy"] = accuracy(out, module.test_dataloader())
    return report


def loaded_subnet(space: ModelSpace, architecture: Architecture, checkpoint: Path) -> nn.Module:
    """The subnet with a checkpoint's weights, wherever in the checkpoint its network stands.

    Raises:
        ValueError: the file is absent or damaged, or its weights fit neither the subnet nor the space.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise ValueError(f"'{checkpoint}' is no checkpoint that torch can load: {error}") from error
    state: Mapping[str, Tensor] = content.get("state_dict", content) if isinstance(content, dict) else {}
    networks: list[nn.Module] = [space.freeze(architecture), space]
    for network in networks:
        weights = _of_network(state, set(network.state_dict()))
        if weights is not None:
            try:
                network.load_state_dict(weights)
            except RuntimeError as error:  # equal names, other shapes
                raise ValueError(
                    f"the weights in '{checkpoint}' have other shapes than this architecture: {error}"
                ) from error
            return space.freeze(architecture) if network is space else network
    raise ValueError(
        f"the weights in '{checkpoint}' fit neither the subnet of this architecture nor its space: give "
        "the architecture that they were trained for, and --space as in the search"
    )


def _of_network(state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor] | None:
    """The entries of one network in a state dict that may hold it under a prefix (``network.``)."""
    some_name = min(names)
    for key in state:
        if key.endswith(some_name):
            prefix = key.removesuffix(some_name)
            found = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
            if set(found) == names:
                return found
    return None
