from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hwnas import ModelSpace
from hwnas.spaces import MobileNetV3
from hwnas.spaces.blocks import make_divisible
from hwnas.spaces.mobilenet_v3 import LARGE, PROXYLESS, Design
from hwnas.spaces.ofa_config import read_ofa_config
from profilers import count_macs
from tests.contracts.space import COUNTED

# Samples as `sample_active_subnet` returns them.
SAMPLES = [
    ("mbv3", LARGE, 1.0, {"ks": [3, 5, 7, 3] * 5, "e": [6, 3, 4, 3, 4] * 4, "d": [2, 3, 4, 3, 2]}),
    ("mbv3 wide", LARGE, 1.2, {"ks": 7, "e": [3, 4, 6, 6] * 5, "d": [4, 2, 2, 4, 3]}),
    ("proxyless", PROXYLESS, 1.3, {"ks": [7, 5, 3] * 7, "e": [3, 6, 4] * 7, "d": [2, 4, 3, 2, 4, 1]}),
]

# Multiply-adds and parameters at 224x224, counted on once-for-all's own classes (PyPI: ofa 0.1.0).
COUNTS = {
    "mbv3": (228_507_184, 4_063_520),
    "mbv3 wide": (531_151_704, 7_491_040),
    "proxyless": (532_393_976, 5_772_032),
}


def conv(width_in: int, width_out: int, kernel: int, activation: str, **others: Any) -> dict[str, Any]:
    return {
        "name": "ConvLayer",
        "kernel_size": kernel,
        "stride": 1,
        "dilation": 1,
        "groups": 1,
        "bias": False,
        "has_shuffle": False,
        "in_channels": width_in,
        "out_channels": width_out,
        "use_bn": True,
        "act_func": activation,
        "dropout_rate": 0,
        "ops_order": "weight_bn_act",
        **others,
    }


def block(i: int, o: int, k: int, s: int, mid: int | None, a: str, se: bool, e: Any) -> dict[str, Any]:
    shortcut = {"name": "IdentityLayer", "in_channels": [i], "out_channels": [o], "use_bn": False}
    return {
        "name": "MobileInvertedResidualBlock",
        "mobile_inverted_conv": {
            "name": "MBInvertedConvLayer",
            "in_channels": i,
            "out_channels": o,
            "kernel_size": k,
            "stride": s,
            "expand_ratio": e,
            "mid_channels": mid,
            "act_func": a,
            "use_se": se,
        },
        "shortcut": shortcut if s == 1 and i == o else None,
    }


def net_config(design: Design, stem: int, blocks: list[dict[str, Any]], head: list[int]) -> dict[str, Any]:
    """As once-for-all writes it to ``net.config``."""
    last = blocks[-1]["mobile_inverted_conv"]["out_channels"]
    ends: dict[str, Any] = {"feature_mix_layer": conv(last, head[0], 1, design.activation)}
    if len(head) == 2:
        mixed = conv(head[0], head[1], 1, design.activation, use_bn=False)
        ends = {"final_expand_layer": ends["feature_mix_layer"], "feature_mix_layer": mixed}
    return {
        "name": "MobileNetV3" if design is LARGE else "ProxylessNASNets",
        "bn": {"momentum": 0.1, "eps": 1e-5},
        "first_conv": conv(3, stem, 3, design.activation, stride=2),
        "blocks": blocks,
        **ends,
        "classifier": {"name": "LinearLayer", "in_features": head[-1], "out_features": 1000, "bias": True},
    }


def expanded(design: Design, width: float, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The ``net.config`` of a sample."""
    most = [max(stage.depths or (4,)) for stage in design.stages]
    ks, es = (sample[k] if isinstance(sample[k], list) else [sample[k]] * sum(most) for k in ("ks", "e"))
    stem, first = make_divisible(design.stem * width), make_divisible(design.first.width * width)
    blocks = [block(stem, first, 3, 1, None, design.first.activation, False, 1)]
    previous, place = first, 0
    for stage, depth, deepest in zip(design.stages, sample["d"], most, strict=True):
        own = make_divisible(stage.width * width)
        for index in range(depth):
            k, e = ks[place + index], es[place + index]
            mid = make_divisible(round(previous * e))
            stride = stage.stride if index == 0 else 1
            blocks.append(block(previous, own, k, stride, mid, stage.activation, stage.squeeze, e))
            previous = own
        place += deepest
    return net_config(design, stem, blocks, [make_divisible(c * width) for c in design.head])


@pytest.mark.parametrize(("design", "width", "sample"), [s[1:] for s in SAMPLES], ids=[s[0] for s in SAMPLES])
def test_a_sample_and_its_net_config_are_one_architecture(
    design: Design, width: float, sample: dict[str, Any], tmp_path: Path
) -> None:
    from_sample = read_ofa_config(sample, width=width)
    (tmp_path / "net.config").write_text(json.dumps(expanded(design, width, sample)))
    from_layers = read_ofa_config(tmp_path / "net.config")
    assert from_layers.architecture == from_sample.architecture
    assert from_layers.arguments["width"] == width
    assert [from_sample.architecture[f"stage{n + 1}.depth"] for n in range(5)] == sample["d"][:5]


@pytest.mark.parametrize(("name", "width", "sample"), [(s[0], *s[2:]) for s in SAMPLES])
def test_a_sample_has_the_counts_of_the_authors_code(name: str, width: float, sample: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = MobileNetV3.from_ofa_config(sample, width=width)
        macs = count_macs(network, [torch.empty(1, 3, 224, 224)]).headline
    assert (macs, sum(parameter.numel() for parameter in network.parameters())) == COUNTS[name]


def test_released_networks_are_read_with_their_counts() -> None:
    if not COUNTED.exists():
        pytest.skip(f"{COUNTED} is not there")
    known = {a["name"]: a for a in json.loads(COUNTED.read_text())["archs"] if a["name"].startswith("ofa-")}
    assert len(known) >= 5
    for name, counted in known.items():
        stem, *layers = counted["layers"]
        blocks = [
            block(
                e["i"],
                e["o"],
                e["k"],
                e["s"],
                e["mid"],
                e["a"].replace("hswish", "h_swish"),
                e["se"] > 0,
                None,
            )
            for e in layers
            if e["t"] == "mb"
        ]
        head = [e["o"] for e in layers if e["t"] == "conv"]
        design = LARGE if len(head) == 2 else PROXYLESS
        config = net_config(design, stem["o"], blocks, head) | {"image_size": counted["input_size"][2]}
        read = read_ofa_config(config)
        published = MobileNetV3.published[name.lower()]
        with torch.device("meta"):
            network = MobileNetV3.from_ofa_config(config)
            space = ModelSpace(MobileNetV3(**published.arguments))
        assert read.resolution == published.input_shape[1], name
        assert read.architecture == space.canonical(published.architecture), name
        assert sum(p.numel() for p in network.parameters()) == counted["measured"]["params"], name


def test_every_architecture_of_the_elastic_space_is_a_sample() -> None:
    draw = random.Random(0)
    sample = {key: [draw.choice(of) for _ in range(20)] for key, of in (("ks", (3, 5, 7)), ("e", (3, 4, 6)))}
    read = read_ofa_config({**sample, "d": 4, "r": [192]}, resolutions=(160, 192))
    kernels = [read.architecture[f"stage{n // 4 + 1}.layer{n % 4 + 1}.kernel"] for n in range(20)]
    assert kernels == sample["ks"]
    assert read.architecture["resolution"] == read.resolution == 192


def test_hand_made_layers_are_read_where_arguments_offer_them() -> None:
    config = expanded(LARGE, 1.0, SAMPLES[0][3])
    conv = config["blocks"][2]["mobile_inverted_conv"]
    conv["mid_channels"], conv["expand_ratio"] = 56, None  # of 24
    with pytest.raises(
        ValueError, match=r"layer 2 of stage 1 expands 24 channels to 56.*expansions=\(3, 4, 6"
    ):
        read_ofa_config(config)
    read = read_ofa_config(config, expansions=(2.33, 3, 4, 6))
    assert read.architecture["stage1.layer2.expansion"] == 2.33


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(name="OFAMobileNetV3"), "Of a supernet, give"),
        (
            lambda c: c["first_conv"].update(out_channels=24),
            "first_conv has out_channels=24, and the space 16",
        ),
        (lambda c: c["blocks"][3]["mobile_inverted_conv"].update(use_se=False), "use_se=False.*outside"),
        (lambda c: c["blocks"][4]["mobile_inverted_conv"].update(kernel_size=9), r"kernels=\(3, 5, 7, 9\)"),
        (
            lambda c: c["blocks"][2].update(shortcut=None),
            "each of which begins with a layer without shortcut",
        ),
        (lambda c: c["blocks"].insert(2, c["blocks"][2]), r"stage 1 has 3 layers.*\(2, 4\)"),
        (lambda c: c.pop("blocks"), "a configuration of once-for-all's has"),
    ],
)
def test_what_lies_outside_of_the_space_is_named(change: Any, said: str) -> None:
    config = expanded(LARGE, 1.0, {**SAMPLES[0][3], "d": [2, 4, 4, 4, 2]})
    change(config)
    with pytest.raises(ValueError, match=said):
        read_ofa_config(config, depths=(2, 4))


def test_a_network_that_is_read_runs() -> None:
    network = MobileNetV3.from_ofa_config(expanded(LARGE, 1.0, SAMPLES[0][3]), num_classes=5).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert count_macs(network, [torch.zeros(1, 3, 64, 64)]).headline > 1e7
