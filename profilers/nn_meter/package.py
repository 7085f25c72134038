"""nn-Meter itself: the only file that imports it, and what is put right between it and us.

Of nn-Meter 2.0 (Zhang et al., "nn-Meter", MobiSys 2021, doi 10.1145/3458864.3467882) this uses the reader of
ONNX graphs (``ir_converter``), the detection of kernels by fusion rules (``kernel_detector``), the features
of a kernel and its name (``predictor.prediction``), and the register of predictors (``predictors.yaml``).

Not used: its torch path, which torch 2.x broke; its loading, which downloads on its own and runs pickles.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import types
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, final

import onnx
import platformdirs

_PACKAGE = "nn_meter"
# nn-Meter's modules that keep the path of its configuration in a variable.
_CONFIGURED = (
    "nn_meter.utils.config_manager",
    "nn_meter.predictor.utils",
    "nn_meter.utils.nn_meter_cli.registry",
)
# Operators under names that nn-Meter does not know, or that it knows and gives no kind.
_NAMES = {"HardSwish": "hswish", "MatMul": "fc"}


def default_folder() -> Path:
    """Where predictors and nn-Meter's configuration are kept where nothing else is said."""
    return Path(platformdirs.user_data_dir("hwnas")) / "nn-meter"


@final
@dataclass(frozen=True)
class DetectedKernel:
    """Operators that run as one.

    Attributes:
        operators: their kinds, such as ``"conv-relu"``.
        predictor: name of the predictor for it, such as ``"conv-bn-relu"``.
        features: what the predictor takes; None: nn-Meter has no features for it and counts 0 ms.
        nodes: names of its nodes in the ONNX graph.
    """

    operators: str
    predictor: str
    features: tuple[float, ...] | None
    nodes: tuple[str, ...]


@final
class Detector:
    """Detects the kernels of ONNX graphs by a device's fusion rules.

    Args:
        rules: nn-Meter's ``fusion_rules.json``.
        folder: of nn-Meter's configuration.
    """

    def __init__(self, rules: Path, folder: Path) -> None:
        _imported(folder)
        self._converter = _module("ir_converter.onnx_converter").OnnxConverter
        self._detector = _module("kernel_detector").KernelDetector(str(rules))

    def kernels(self, model: onnx.ModelProto, refused: Collection[str] = ()) -> list[DetectedKernel]:
        """In topological order.

        Args:
            model: its nodes have names.
            refused: names of nodes that nn-Meter shall not look at: their kernels have no features.
        """
        graph = _with_inputs(self._converter(model).convert(), model)
        self._detector.load_graph(graph)
        blocks = self._detector.bbs
        found = []
        for kernel in self._detector.get_kernels():
            block = blocks[int(kernel["name"].rpartition("#")[2])]
            nodes = tuple(name for fused in block for name in fused.split(";"))
            features = None if any(name in refused for name in nodes) else _features(kernel)
            found.append(DetectedKernel(kernel["op"], _predictor_of(kernel["op"]), features, nodes))
        return found


def register(folder: Path, name: str, kernels: list[str], location: Path) -> None:
    """Enters a predictor into nn-Meter's register, in place of one of the same name."""
    _imported(folder)
    registry = _module("utils.nn_meter_cli.registry")
    _quietly(registry.unregister_predictor, name, None)
    facts = {
        "name": name,
        "version": 1.0,
        "category": "hwnas",
        "package_location": str(location.resolve()),
        "kernel_predictors": kernels,
    }
    meta = location / "nn_meter.yaml"
    meta.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    _quietly(registry.register_predictor, str(meta))


def registered(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Every predictor in nn-Meter's register, by name: with its ``download`` or its ``package_location``."""
    _imported(folder)
    listed: list[dict[str, Any]] = _quietly(_module("predictor").list_latency_predictors)
    return {facts["name"]: facts for facts in listed}


def _quietly(call: Any, *arguments: Any) -> Any:
    logger = logging.getLogger("nn-Meter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return call(*arguments)
    finally:
        logger.setLevel(level)


# ---- graphs


def _with_inputs(graph: dict[str, Any], model: onnx.ModelProto) -> dict[str, Any]:
    """nn-Meter's graph with a node for each input, and with the kinds that its detector mistakes put right.

    Its detector drops a node that stands alone, and its time with it; and it takes a dense convolution of
    one channel, whose groups are as many as its channels, for a depthwise one.
    """
    by_name = {node.name: node for node in model.graph.node}
    for name, node in graph.items():
        if not node["attr"]:  # it gave up, and would fail later
            node["attr"] = {"attr": {}, "input_shape": [[0]], "output_shape": [[0]]}
        attributes = node["attr"]["attr"]
        if attributes.get("group") == 1:
            del attributes["group"]
        node["attr"]["type"] = _NAMES.get(by_name[name].op_type, by_name[name].op_type)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input
    }
    for value, shape in shapes.items():
        name = f"input {value}"
        readers = [node.name for node in model.graph.node if value in node.input and node.name in graph]
        given = {"type": "Placeholder", "attr": {}, "input_shape": [shape], "output_shape": [shape]}
        graph[name] = {"attr": given, "inbounds": [], "outbounds": readers}
        for reader in readers:
            graph[reader]["inbounds"].append(name)
    return graph


def _features(kernel: dict[str, Any]) -> tuple[float, ...] | None:
    found = _module("predictor.prediction.extract_feature").get_predict_features([kernel])
    if not found:
        return None
    ((_, features),) = found[0].items()
    return tuple(float(number) for number in features)


def _predictor_of(operators: str) -> str:
    merged = _module("predictor.prediction.predict_by_kernel").merge_conv_kernels(operators)
    name: str = _module("predictor.prediction.utils").get_kernel_name(merged)
    return name


# ---- the import


def _module(name: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _imported(folder: Path) -> None:
    """Imports nn-Meter, and has it keep its configuration in a folder of ours."""
    configuration = folder / "config"
    if _PACKAGE not in sys.modules:
        try:
            with _stand_in(), _at_home_in(folder), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its dependencies, about themselves
                importlib.import_module(_PACKAGE)
                importlib.import_module(_CONFIGURED[-1])
        except ImportError as error:
            raise ValueError(
                f"nn-Meter cannot be imported ({error}); install it: pip install 'hwnas[nn-meter]'"
            ) from error
        logging.getLogger("nn-Meter").setLevel(logging.ERROR)  # it tells every step on standard output
    for name in _CONFIGURED:
        vars(importlib.import_module(name))["__user_config_folder__"] = str(configuration)
    if not (configuration / "predictors.yaml").exists():
        _module("utils").create_user_configs()


@contextmanager
def _at_home_in(folder: Path) -> Iterator[None]:
    """While it is imported, nn-Meter writes into ``~/.nn_meter``: that is the folder."""
    expanded = os.path.expanduser

    def ours(path: Any) -> Any:
        if isinstance(path, str) and path.startswith("~/.nn_meter/"):
            return str(folder / path.removeprefix("~/.nn_meter/"))
        return expanded(path)

    os.path.expanduser = ours
    try:
        yield
    finally:
        os.path.expanduser = expanded


@contextmanager
def _stand_in() -> Iterator[None]:
    """While it is imported, what nn-Meter needs of ``pkg_resources``, which setuptools 82 does not have."""
    stand_in = types.ModuleType("pkg_resources")
    vars(stand_in).update(
        require=lambda name: [metadata.distribution(name)],
        resource_listdir=lambda package, path: [
            p.name for p in resources.files(package).joinpath(path).iterdir()
        ],
        resource_filename=lambda package, path: str(resources.files(package).joinpath(path)),
    )
    before = sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        if before is None:
            del sys.modules["pkg_resources"]
        else:
            sys.modules["pkg_resources"] = before
