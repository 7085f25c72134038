"""A subnet as an ONNX file: written, checked, compared with torch, and labelled with its facts."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwnas.engines.openvino import opened
from lookup_tables.session import Runtime
from lookup_tables.whole_file import write_whole

METADATA_PREFIX = "hwnas."


def export_onnx(
    subnet: nn.Module,
    example_input: Tensor,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a plain network as one ONNX file, with BatchNorm folded and no trace of this machine in it.

    Operators are named after the modules that they come from (``layers.0.expand.1/Conv``: folded into its
    convolution, BatchNorm leaves it its own name). The file appears whole or not at all.

    Args:
        subnet: what ``space.freeze`` returned; exported in evaluation mode, its own mode is kept.
        example_input: shape ``(N, ...)``; its batch is the file's, unless that is dynamic.
        path: where the file goes; folders are made.
        dynamic_batch: the first dimension is left open. The network is then traced with a batch of two:
            one would be taken for a constant in reshapes.
        metadata: facts to store in the file, as `write_metadata` does.

    Raises:
        ValueError: torch cannot export the network, or the exported batch is not dynamic as was asked.
    """
    path = Path(path)
    was_training = subnet.training
    shapes = None
    if dynamic_batch:
        example_input = torch.cat([example_input[:1]] * 2)
        shapes = ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad(), quiet_export():
            program = torch.onnx.export(
                subnet.eval(),
                (example_input,),
                input_names=["input"],
                output_names=["output"],
                dynamo=True,
                external_data=False,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"torch cannot export {type(subnet).__name__} for an input of shape "
            f"{tuple(example_input.shape)}: {error}"
        ) from error
    finally:
        subnet.train(was_training)
    assert program is not None  # dynamo=True returns a program
    model = program.model_proto
    _name_by_module(model)
    _strip(model)
    _add_metadata(model, metadata or {})
    onnx.checker.check_model(model, full_check=True)
    if dynamic_batch and not _takes_any_batch(model, example_input):
        raise ValueError(
            f"the batch of {type(subnet).__name__} is baked into its graph (a reshape with a fixed first "
            "dimension?); use -1 for it there, or export with a fixed batch"
        )
    write_whole(path, model.SerializeToString())
    return path


def parity(
    subnet: nn.Module, path: str | Path, inputs: Iterable[Tensor], runtime: Runtime = "onnxruntime"
) -> float:
    """The largest absolute difference between torch and a file's outputs for ``inputs``.

    It is NaN where one of them is. Raises ``ValueError`` where there is no batch.
    """
    outputs = _outputs(path, runtime)
    device = next((parameter.device for parameter in subnet.parameters()), torch.device("cpu"))
    was_training = subnet.training
    try:
        subnet.eval()
        with torch.no_grad():
            differences = [
                np.abs(subnet(batch.to(device)).cpu().numpy() - outputs(batch)).max() for batch in inputs
            ]
    finally:
        subnet.train(was_training)
    if not differences:
        raise ValueError("torch and a file are compared on at least one batch; got none")
    return float(np.max(differences))  # not max(), which passes over NaN


def accuracy(
    path: str | Path, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime = "onnxruntime"
) -> float:
    """The share of right answers of a classifier's file, in 0..1."""
    outputs = _outputs(path, runtime)
    right = total = 0
    for images, targets in batches:
        right += int((outputs(images).argmax(axis=1) == targets.numpy()).sum())
        total += len(targets)
    if not total:
        raise ValueError("accuracy needs at least one batch; got none")
    return right / total


def _outputs(path: str | Path, runtime: Runtime) -> Callable[[Tensor], NDArray[Any]]:
    """What a runtime computes of a file, for a batch of any size."""
    if runtime == "openvino":
        return opened(Path(path))
    return partial(run, load_session(path))


def run(session: onnxruntime.InferenceSession, inputs: Tensor) -> NDArray[Any]:
    """The output for a batch of any size, in parts where the file's batch is fixed."""
    given = session.get_inputs()[0]
    size = given.shape[0] if isinstance(given.shape[0], int) else len(inputs)
    outputs = []
    for part in torch.split(inputs, size):
        # The last part is filled up by repeating, and the surplus dropped.
        filled = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
        (output,) = session.run(None, {given.name: filled.cpu().numpy()})
        outputs.append(output[: len(part)])
    return np.concatenate(outputs)


def load_session(path: str | Path) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Raises:
        ValueError: the file is absent, truncated, or no ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no ONNX file at '{path}'")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no public base class
        raise ValueError(f"'{path}' is no ONNX file that ONNX Runtime can load: {error}") from error


def write_metadata(path: str | Path, facts: Mapping[str, Any]) -> None:
    """Stores facts in a file's ``metadata_props`` as JSON under ``hwnas.<name>``; old ones are replaced."""
    path = Path(path)
    model = _load(path)
    _add_metadata(model, facts)
    write_whole(path, model.SerializeToString())


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The facts that `write_metadata` stored, in an ONNX file or in one made of it by `hwnas.mobile.to_ort`.

    Raises:
        ValueError: the file is absent, truncated, or no model.
    """
    path = Path(path)
    if path.suffix == ".ort":
        found = load_session(path).get_modelmeta().custom_metadata_map
    else:
        found = {entry.key: entry.value for entry in _load(path).metadata_props}
    return {
        key.removeprefix(METADATA_PREFIX): json.loads(fact)
        for key, fact in found.items()
        if key.startswith(METADATA_PREFIX)
    }


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keeps back what the exporter says of its own insides: missing torchvision, its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ValueError(f"no ONNX file at '{path}'")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and the checker's errors share no base class
        raise ValueError(f"'{path}' is damaged or no ONNX file: {error}") from error
    return model


def _takes_any_batch(model: onnx.ModelProto, example_input: Tensor) -> bool:
    """Whether three inputs give three outputs: the graph was traced with two."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    inputs = torch.cat([example_input[:1]] * 3).cpu().numpy()
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        outputs = session.run(None, {session.get_inputs()[0].name: inputs})
    except Exception:  # ONNX Runtime's errors share no public base class
        return False
    return all(len(output) == len(inputs) for output in outputs)


def _name_by_module(model: onnx.ModelProto) -> None:
    """Names every operator ``<module>/<operator>``, with a number where that is taken."""
    taken: set[str] = set()
    for node in model.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        # From the network ('') inwards; the last is the call itself.
        path = ast.literal_eval(scopes[0]) if scopes else []
        place = path[-2] if len(path) > 1 else ""
        name = f"{place}/{node.op_type}"
        numbered = (f"{name}_{n}" for n in itertools.count(1))
        node.name = name if name not in taken else next(other for other in numbered if other not in taken)
        taken.add(node.name)


def _strip(model: onnx.ModelProto) -> None:
    """Removes source paths, stack traces and names of our classes, which the exporter notes everywhere."""
    graph = model.graph
    del model.metadata_props[:]
    del graph.metadata_props[:]
    for thing in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del thing.metadata_props[:]
        thing.doc_string = ""


def _add_metadata(model: onnx.ModelProto, facts: Mapping[str, Any]) -> None:
    kept = {entry.key: entry.value for entry in model.metadata_props}
    added = {METADATA_PREFIX + name: json.dumps(fact) for name, fact in facts.items()}
    onnx.helper.set_model_props(model, {**kept, **added})
