"""Reads configurations of once-for-all's networks as architectures of `MobileNetV3`'s space."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from hwnas.space import ModelSpace
from hwnas.spaces.blocks import make_divisible
from hwnas.spaces.mobilenet_v3 import LARGE, PROXYLESS, Design, MobileNetV3, Stage
from profilers.space import Architecture

_DESIGNS = {"MobileNetV3": LARGE, "ProxylessNASNets": PROXYLESS}

# What once-for-all's classes assume where a configuration is silent.
_MBCONV: Mapping[str, Any] = {
    "kernel_size": 3,
    "stride": 1,
    "expand_ratio": 6,
    "mid_channels": None,
    "act_func": "relu6",
    "use_se": False,
    "groups": None,
}
_CONV: Mapping[str, Any] = {
    "kernel_size": 3,
    "stride": 1,
    "groups": 1,
    "bias": False,
    "use_bn": True,
    "act_func": "relu",
}


@final
@dataclass(frozen=True)
class OFANetwork:
    """A network of once-for-all's, as an architecture.

    Attributes:
        architecture: its options in the space of ``MobileNetV3(**arguments)``.
        arguments: of the class, where they follow from the configuration.
        resolution: side of the images, where the configuration says it.
    """

    architecture: Architecture
    arguments: Mapping[str, Any]
    resolution: int | None


@final
@dataclass(frozen=True)
class _Layer:
    kernel: int
    expansion: float


def read_ofa_config(config: str | os.PathLike[str] | Mapping[str, Any], **arguments: Any) -> OFANetwork:
    """The architecture that a configuration of once-for-all's describes.

    Two forms are read (mit-han-lab/once-for-all):

    - a network's ``net.config`` (``networks/mobilenet_v3.py`` and ``proxyless_nets.py``, property
      ``config``): ``first_conv``, ``blocks`` and so on, layer by layer. Its width multiplier follows from
      its last convolution;
    - what is sampled from a supernet (``elastic_nn/networks``, ``sample_active_subnet``): ``ks`` and ``e``
      for all layers, those that do not run included, and ``d`` for all stages; each a list or one number
      for all. The width multiplier is in ``arguments``, or 1. Lists of 21 layers are of ``PROXYLESS``.

    The resolution is what stands as ``r``, ``resolution`` or ``image_size`` (as in ``run.config``).

    Args:
        config: the dictionary, or a JSON file of it.
        arguments: of `MobileNetV3`, where they are not its defaults and do not follow: ``width`` of a
            sampled network, ``expansions`` of one that is made by hand, ``resolutions``.

    Raises:
        ValueError: a network that is not in the space, or a dictionary of neither form.

    >>> read = read_ofa_config({"ks": 5, "e": 4, "d": [2, 2, 3, 2, 4], "r": [160]})
    >>> read.architecture["stage3.depth"], read.architecture["stage3.layer1.kernel"], read.resolution
    (3, 5, 160)
    """
    found: Mapping[str, Any] = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    if "blocks" in found and "first_conv" in found:
        follows, stages = _read_layers(found, arguments)
    elif {"ks", "e", "d"} <= found.keys():
        follows, stages = _read_sample(found, arguments)
    else:
        raise ValueError(
            "a configuration of once-for-all's has first_conv, blocks, ... (net.config) or ks, e and d "
            f"(a sampled network); got a dictionary of {sorted(map(str, found))}"
        )
    given = {**follows, **arguments}
    with torch.device("meta"):
        space = ModelSpace(MobileNetV3(**given))
    wanted: Architecture = {}
    for number, layers in enumerate(stages, start=1):
        wanted[f"stage{number}.depth"] = len(layers)
        for index, layer in enumerate(layers, start=1):
            wanted[f"stage{number}.layer{index}.kernel"] = layer.kernel
            wanted[f"stage{number}.layer{index}.expansion"] = layer.expansion
    resolution = _resolution(found)
    if "resolution" in space.options and resolution is not None:
        wanted["resolution"] = resolution
    # What has one option in the space is no choice of it.
    chosen = {label: option for label, option in wanted.items() if label in space.options}
    return OFANetwork(space.canonical({**space.default(), **chosen}), given, resolution)


def _resolution(config: Mapping[str, Any]) -> int | None:
    found = next((config[name] for name in ("r", "resolution", "image_size") if config.get(name)), None)
    return int(found[0] if isinstance(found, Sequence) else found) if found is not None else None


# ---- a sampled network


def _read_sample(
    config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], list[list[_Layer]]]:
    is_proxyless = any(isinstance(config[key], Sequence) and len(config[key]) == 21 for key in ("ks", "e"))
    follows = {"design": PROXYLESS} if is_proxyless else {}
    options = _Options({**follows, **arguments})
    most = [max(options.depths(stage)) for stage in options.design.stages]
    kernels, expansions = _listed(config["ks"], sum(most), "ks"), _listed(config["e"], sum(most), "e")
    depths = config["d"]
    if isinstance(depths, Sequence) and len(depths) < len(most):
        # The last stage of some supernets has one layer, and d is silent about it.
        depths = [*depths, *(n for n in most[len(depths) :] if n == 1)]
    stages = []
    for number, (depth, stage) in enumerate(
        zip(_listed(depths, len(most), "d"), options.design.stages, strict=True), start=1
    ):
        start = sum(most[: number - 1])
        depth = min(depth, most[number - 1])  # as once-for-all has it
        options.check_depth(depth, stage, number)
        found = zip(kernels[start : start + depth], expansions[start : start + depth], strict=True)
        layers = [_Layer(int(kernel), expansion) for kernel, expansion in found]
        for index, layer in enumerate(layers, start=1):
            options.check(layer, f"layer {index} of stage {number}")
        stages.append(layers)
    return follows, stages


def _listed(given: Any, count: int, name: str) -> list[Any]:
    found = list(given) if isinstance(given, Sequence) else [given] * count
    if len(found) != count:
        raise ValueError(
            f"{name} must be one number, or {count} of them for this design and these depths; got {found}"
        )
    return found


# ---- a network layer by layer


def _read_layers(
    config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], list[list[_Layer]]]:
    design = arguments.get("design", _DESIGNS.get(config.get("name", "")))
    if design is None:
        raise ValueError(
            f"networks of once-for-all's {' and '.join(_DESIGNS)} are read; got one of "
            f"{config.get('name')!r}. Of a supernet, give the configuration of one network "
            "(get_active_net_config), or what was sampled (ks, e, d)"
        )
    last = config["feature_mix_layer"]
    follows = {
        "design": design,
        "width": round(last["out_channels"] / design.head[-1], 2),
        "num_classes": config["classifier"]["out_features"],
        "in_channels": config["first_conv"]["in_channels"],
        "dropout": config["classifier"].get("dropout_rate", 0),
    }
    options = _Options({**follows, **arguments})
    _check_ends(config, options)
    blocks = [block for block in map(_Block, config["blocks"]) if not block.is_skipped]
    first = design.first
    blocks[0].check("the first layer", first, first.stride, options.scaled(first.width))
    if (blocks[0].kernel, blocks[0].hidden) != (3, blocks[0].in_channels):
        raise ValueError(
            "the first layer must have a kernel of 3 and not expand; got a kernel of "
            f"{blocks[0].kernel} and {blocks[0].hidden} channels of {blocks[0].in_channels}"
        )
    chains: list[list[_Block]] = []
    for block in blocks[1:]:
        if not block.is_residual or not chains:
            chains.append([])
        chains[-1].append(block)
    if len(chains) != len(design.stages):
        raise ValueError(
            f"the space has {len(design.stages)} stages, each of which begins with a layer without shortcut; "
            f"got {len(chains)}, of {[len(chain) for chain in chains]} layers"
        )
    stages = []
    for number, (chain, stage) in enumerate(zip(chains, design.stages, strict=True), start=1):
        options.check_depth(len(chain), stage, number)
        layers = []
        for index, block in enumerate(chain, start=1):
            place = f"layer {index} of stage {number}"
            block.check(place, stage, stage.stride if index == 1 else 1, options.scaled(stage.width))
            layer = _Layer(block.kernel, options.expansion(block, place))
            options.check(layer, place)
            layers.append(layer)
        stages.append(layers)
    return follows, stages


class _Options:
    """What the space offers that the arguments stand for."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.design: Design = arguments.get("design", LARGE)
        self.width: float = arguments.get("width", 1.0)
        self.kernels: Sequence[int] = arguments.get("kernels", (3, 5, 7))
        self.expansions: Sequence[float] = arguments.get("expansions", (3, 4, 6))
        self._depths: Sequence[int] = arguments.get("depths", (2, 3, 4))

    def scaled(self, width: int) -> int:
        return make_divisible(width * self.width)

    def depths(self, stage: Stage) -> Sequence[int]:
        return stage.depths or self._depths

    def expansion(self, block: _Block, place: str) -> float:
        for option in self.expansions:
            if make_divisible(block.in_channels * option) == block.hidden:
                return option
        ratio = round(block.hidden / block.in_channels, 2)
        raise ValueError(
            f"{place} expands {block.in_channels} channels to {block.hidden}, and the expansions of the "
            f"space are {tuple(self.expansions)}: give expansions={(*self.expansions, ratio)}"
        )

    def check(self, layer: _Layer, place: str) -> None:
        if layer.kernel not in self.kernels:
            raise ValueError(
                f"{place} has a kernel of {layer.kernel}, and the kernels of the space are "
                f"{tuple(self.kernels)}: give kernels={(*self.kernels, layer.kernel)}"
            )
        if layer.expansion not in self.expansions:
            raise ValueError(
                f"{place} has an expansion of {layer.expansion}, and the expansions of the space are "
                f"{tuple(self.expansions)}: give expansions={(*self.expansions, layer.expansion)}"
            )

    def check_depth(self, depth: int, stage: Stage, number: int) -> None:
        offered = self.depths(stage)
        if depth not in offered:
            raise ValueError(
                f"stage {number} has {depth} layers, and the depths of the space are {tuple(offered)}: "
                f"give depths={(*offered, depth)}"
            )


class _Block:
    """One inverted residual of a configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        conv = config.get("conv", config.get("mobile_inverted_conv"))
        self.is_skipped = conv is None or conv.get("name") == "ZeroLayer"  # its shortcut alone is left
        if self.is_skipped:
            return
        self._conv = {**_MBCONV, **conv}
        self.in_channels: int = conv["in_channels"]
        self.out_channels: int = conv["out_channels"]
        self.kernel: int = self._conv["kernel_size"]
        hidden = self._conv["mid_channels"]
        # Python's round, as there.
        self.hidden: int = hidden or round(self.in_channels * self._conv["expand_ratio"])
        shortcut = config.get("shortcut")
        self.is_residual = shortcut is not None and shortcut.get("name") != "ZeroLayer"

    def check(self, place: str, stage: Stage, stride: int, width: int) -> None:
        """Raises ``ValueError`` where the layer is not one of the stage."""
        wanted = {
            "out_channels": width,
            "stride": stride,
            "act_func": stage.activation,
            "use_se": stage.squeeze,
            "groups": None,
        }
        _check(place, self._conv, wanted)
        can_add = self._conv["stride"] == 1 and self.in_channels == self.out_channels
        if self.is_residual != can_add:
            raise ValueError(
                f"{place} must have a shortcut just where it keeps the shape; it has "
                f"{'one' if self.is_residual else 'none'} from {self.in_channels} to {self.out_channels} "
                f"channels at stride {self._conv['stride']}"
            )


def _check_ends(config: Mapping[str, Any], options: _Options) -> None:
    """Raises ``ValueError`` where what stands before and after the blocks is not that of the space."""
    design = options.design
    point = {"kernel_size": 1, "stride": 1, "groups": 1, "bias": False, "act_func": design.activation}
    stem = {"kernel_size": 3, "stride": design.stem_stride, "groups": 1, "bias": design.stem_bias}
    scaled = {"out_channels": options.scaled(design.stem), "act_func": design.activation, "use_bn": True}
    _check("first_conv", {**_CONV, **config["first_conv"]}, {**stem, **scaled})
    names = ["final_expand_layer", "feature_mix_layer"][-len(design.head) :]
    for index, (name, width) in enumerate(zip(names, design.head, strict=True)):
        wanted = {**point, "out_channels": options.scaled(width), "use_bn": index == 0}
        _check(name, {**_CONV, **config[name]}, wanted)


def _check(place: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(
                f"{place} has {key}={found[key]!r}, and the space {value!r}: the network lies outside of it. "
                "Another width or design is an argument (width=..., design=...)"
            )
