"""What phones run: a file in INT8, ONNX Runtime's mobile format, and what is said of both beforehand."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from hwnas.data import retrain_dataloader
from hwnas.export import load_session
from lookup_tables.quantise import quantise
from lookup_tables.whole_file import write_whole

_CALIBRATION_BATCHES = 4  # of training images, for the ranges of INT8


def quantise_on(data: LightningDataModule, path: str | Path, places: Sequence[str] | None = None) -> Path:
    """`quantise_file` in place, with a few batches of training images."""
    images = (batch[0] for batch in retrain_dataloader(data))
    return quantise_file(path, path, islice(images, _CALIBRATION_BATCHES), places)


def quantise_file(
    path: str | Path, out: str | Path, images: Iterable[Tensor], places: Sequence[str] | None = None
) -> Path:
    """Writes the INT8 file of an ONNX file that `export_onnx` wrote (`lookup_tables.quantise`).

    Args:
        path: the file in fp32, of one input.
        out: the file in INT8; it may be the same. Facts in the metadata are kept.
        images: batches of real inputs, of the training split: they give the range of every activation.
        places: names of the subnet's modules; what runs inside them is quantised. None: all.

    Raises:
        ValueError: no ONNX file, or no images.
    """
    load_session(path)  # tells of a file that is none
    content = Path(path).read_bytes()
    graph = onnx.load_from_string(content).graph
    nodes = None if places is None else nodes_in(graph, places)
    given = graph.input[0]
    size = given.type.tensor_type.shape.dim[0].dim_value
    batches = (
        {given.name: part.cpu().numpy()}
        for batch in images
        for part in (torch.split(batch, size) if size else [batch])
        if not size or len(part) == size
    )
    write_whole(Path(out), quantise(content, batches, nodes))
    return Path(out)


def nodes_in(graph: onnx.GraphProto, places: Sequence[str]) -> list[str]:
    """The operators inside modules, by the names that `export_onnx` gives them; in a skip there are none."""
    names = [node.name for node in graph.node]
    return [name for name in names if any(is_inside(name.split("/")[0], place) for place in places)]


def is_inside(module: str, place: str) -> bool:
    """Whether a module's name is that of a place, or lies below it; '' is the whole network.

    >>> is_inside("layers.1.expand", "layers.1"), is_inside("layers.10", "layers.1"), is_inside("stem", "")
    (True, False, True)
    """
    return not place or module == place or module.startswith((f"{place}.", f"{place}:"))


def to_ort(path: str | Path, out: str | Path) -> Path:
    """Writes a file in ONNX Runtime's mobile format (``.ort``), optimised to the end and for any device.

    What ``onnxruntime.tools.convert_onnx_models_to_ort`` does with fixed optimisations and no target
    platform, without its output and its settings of the root logger. The layout that x86 alone has is left
    out, so the file runs on phones, and on x86 one in fp32 is slower than its ONNX file.

    Args:
        path: the ONNX file, whose metadata is kept.
        out: the new file, whose name ends in ``.ort``.

    Raises:
        ValueError: no ONNX file, or a name that ends otherwise.
    """
    if Path(out).suffix != ".ort":
        raise ValueError(f"a file in ONNX Runtime's mobile format must be named *.ort; got '{out}'")
    load_session(path)  # tells of a file that is none
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "0")  # activations are unsigned
    with tempfile.TemporaryDirectory(prefix="hwnas-") as folder:
        made = Path(folder, "model.ort")
        options.optimized_model_filepath = str(made)
        onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
        )
        write_whole(Path(out), made.read_bytes())
    return Path(out)


def mobile_usability(path: str | Path) -> str:
    """ONNX Runtime's report on an ONNX file: which of its operators the phones' accelerators take over.

    By ``onnxruntime.tools.check_onnx_model_mobile_usability``. It reads the file and runs nothing: what a
    phone takes is told by a measurement on it alone.
    """
    from onnxruntime.tools.mobile_helpers.usability_checker import analyze_model

    with _logged() as (logger, lines):
        try_others = analyze_model(Path(path), skip_optimize=False, logger=logger)
    advice = "measure with NNAPI or CoreML beside the CPU" if try_others else "run it on the CPU"
    return "\n".join([*lines, f"Advice: {advice}."])


@contextlib.contextmanager
def _logged() -> Iterator[tuple[logging.Logger, list[str]]]:
    """A logger whose lines are kept and go nowhere else."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: Any) -> None:
            lines.append(record.getMessage())

    logger = logging.Logger("mobile usability", logging.INFO)
    logger.addHandler(Keep())
    yield logger, lines
