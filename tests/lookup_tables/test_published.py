from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hwnas import LayerChoice, ModelSpace
from lookup_tables.operators import executed_operators
from lookup_tables.published import BlockTable, OperatorTable, block_key
from profilers import PublishedLatencyProfiler


class Block(nn.Module):
    """An inverted residual, with squeeze-excite and hard-swish where asked."""

    def __init__(
        self, into: int, out: int, kernel: int, ratio: int, stride: int, fancy: bool = False
    ) -> None:
        super().__init__()
        hidden = into * ratio
        activation = nn.Hardswish() if fancy else nn.ReLU6()
        self.expand = nn.Sequential(
            nn.Conv2d(into, hidden, 1, bias=False), nn.BatchNorm2d(hidden), activation
        )
        self.depth = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(hidden, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, hidden, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.has_skip = stride == 1 and into == out
        self.fancy = fancy

    def forward(self, images: Tensor) -> Tensor:
        features = self.depth(self.expand(images))
        if self.fancy:
            features = features * self.squeeze(features)
        projected: Tensor = self.project(features)
        return images + projected if self.has_skip else projected


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.linear(images.mean((2, 3)))
        return scores


def key_of(module: nn.Module, shape: tuple[int, ...], with_activation: bool = False) -> str:
    images = torch.empty(shape, device="meta")
    return block_key(executed_operators(module.to("meta").eval(), [images]), shape, with_activation)


@pytest.mark.parametrize(
    ("module", "shape", "with_activation", "key"),
    [
        # The first is a key of mobile_trim.yaml as it is quoted in mit-han-lab/once-for-all, issue 37.
        (
            Block(192, 320, 5, 6, 1),
            (1, 192, 7, 7),
            False,
            "expanded_conv-input:7x7x192-output:7x7x320-expand:6-kernel:5-stride:1-idskip:0",
        ),
        (
            Block(32, 32, 3, 3, 1),
            (1, 32, 56, 56),
            False,
            "expanded_conv-input:56x56x32-output:56x56x32-expand:3-kernel:3-stride:1-idskip:1",
        ),
        (
            Block(32, 32, 5, 3, 1, fancy=True),
            (1, 32, 40, 40),
            True,
            "expanded_conv-input:40x40x32-output:40x40x32-expand:96-kernel:5-stride:1-idskip:1-se:1-hs:1",
        ),
        (
            Block(16, 24, 3, 4, 2),
            (1, 16, 8, 8),
            True,
            "expanded_conv-input:8x8x16-output:4x4x24-expand:64-kernel:3-stride:2-idskip:0-se:0-hs:0",
        ),
        (nn.Conv2d(3, 32, 3, 2, 1), (1, 3, 224, 224), False, "Conv-input:224x224x3-output:112x112x32"),
        (nn.Conv2d(320, 1280, 1), (1, 320, 7, 7), False, "Conv_1-input:7x7x320-output:7x7x1280"),
        (nn.Conv2d(960, 1280, 1), (1, 960, 1, 1), False, "Conv_2-input:1x1x960-output:1x1x1280"),
        (nn.AdaptiveAvgPool2d(1), (1, 960, 7, 7), False, "AvgPool2D-input:7x7x960-output:1x1x960"),
        (Head(), (1, 16, 7, 7), False, "Logits-input:7x7x16-output:10"),
        (nn.Linear(1280, 1000), (1, 1280), False, "Logits-input:1x1x1280-output:1000"),
    ],
)
def test_a_block_has_the_key_that_its_authors_give_it(
    module: nn.Module, shape: tuple[int, ...], with_activation: bool, key: str
) -> None:
    assert key_of(module, shape, with_activation) == key


def test_what_no_table_of_blocks_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inverted residuals.*got softmax|got _softmax"):
        key_of(nn.Softmax(1), (1, 4, 2, 2))


@pytest.mark.parametrize(
    ("module", "batch", "says"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), 2, "batches of one image; got a batch of 2"),
        (nn.Conv2d(4, 8, 3, padding=2, dilation=2), 1, r"no dilated convolutions; got dilation \(2, 2\)"),
        (nn.ConvTranspose2d(4, 8, 3), 1, "no transposed convolutions"),
    ],
)
def test_what_a_key_does_not_tell_apart_is_refused_by_both_tables(
    module: nn.Module, batch: int, says: str
) -> None:
    images = torch.empty(batch, 4, 8, 8, device="meta")
    for table in (BlockTable("blocks", {}), OperatorTable("operators", {})):
        with pytest.raises(ValueError, match=says):
            table.time_us(module.to("meta").eval(), [images])


def space() -> ModelSpace:
    choice = {"k3": Block(16, 16, 3, 3, 1), "k5": Block(16, 16, 5, 6, 1), "skip": nn.Identity()}
    return ModelSpace(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), LayerChoice(choice, label="block"), Head()))


IMAGES = torch.zeros(1, 3, 16, 16)
BLOCKS = """
Conv-input:16x16x3-output:8x8x16: {count: 10, mean: 1.5, var: 0.1}
expanded_conv-input:8x8x16-output:8x8x16-expand:3-kernel:3-stride:1-idskip:1:
  count: 154
  mean: 2.25
  var: 0.19
expanded_conv-input:8x8x16-output:8x8x16-expand:6-kernel:5-stride:1-idskip:1: {mean: 5}
Logits-input:8x8x16-output:10: {count: 3, mean: 0.25, var: 0.0}
"""


def test_blocks_add_up_to_a_network(tmp_path: Path) -> None:
    path = tmp_path / "mobile.yaml"
    path.write_text(BLOCKS)
    latency = PublishedLatencyProfiler(space(), IMAGES, BlockTable.load(path))
    found = {option: latency.profile({"block": option}) for option in ("k3", "k5", "skip")}
    assert found == pytest.approx({"k3": 4.0, "k5": 6.75, "skip": 1.75})
    assert latency.unit == "ms"


def test_a_missing_block_is_an_error_or_given_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mobile.yaml"
    path.write_text("\n".join(line for line in BLOCKS.splitlines() if not line.startswith("Logits")))
    with pytest.raises(
        ValueError, match=r"does not have 1 of 4 parts.*'mobile.yaml' has no 'Logits-input:8x8x16"
    ):
        PublishedLatencyProfiler(space(), IMAGES, BlockTable.load(path))
    name = next(
        part.name
        for site in space().sites(IMAGES)
        if (part := site.part({"block": "k3"})) is not None and "Head" in part.name
    )
    latency = PublishedLatencyProfiler(space(), IMAGES, BlockTable.load(path), extra_us={name: 500.0})
    assert latency.profile({"block": "skip"}) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("!!python/object/apply:os.system ['touch {marker}']", "Python objects is not loaded"),
        ("a: !!python/name:os.system", "Python objects is not loaded"),
        ("[1, 2]", "must map block keys"),
        ("a: 3", "must have a record with a mean"),
        ("a: {mean: 0}", "must be a time above 0, got 0"),
        ("a: {mean: .inf}", "must be a time above 0, got inf"),
        ("a: {count: 3}", "must be a time above 0, got None"),
        ("a: {mean: 1, count: 0}", "a count of at least 1"),
        ("a: [", "no table of plain YAML"),
        ("[" * 5000, "no table of plain YAML"),
        ("a: 2001-99-99", "no table of plain YAML"),
        ("a: {mean: 1, var: .nan}", "a variance of at least 0"),
        ("a: {mean: 1" + "0" * 400 + "}", "must be a time above 0"),
        # Written out it would be 9 ** 12 letters.
        (
            "a: &a0 [x]\n" + "".join(f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12)),
            "must have a record",
        ),
    ],
)
def test_what_is_no_table_is_refused_and_nothing_in_it_runs(text: str, error: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "table.yaml"
    path.write_text(text.replace("{marker}", str(marker)))
    with pytest.raises(ValueError, match=error):
        BlockTable.load(path)
    assert not marker.exists()


def record(op: str, shapes: list[list[int]], us: float, stride: int = 1, device: str = "S8") -> str:
    arguments = [f'name: "stride"\ni: {stride}\n', 'name: "order"\ns: "NHWC"\n']
    given = {
        "op_type": op,
        "op_args": arguments,
        "input_shapes": shapes,
        "input_dtypes": [3],
        "device": device,
    }
    return json.dumps({**given, "runtime_us_p10": us, "runtime_us_p50": us, "runtime_us_p90": us})


def test_operators_add_up_to_a_network(tmp_path: Path) -> None:
    path = tmp_path / "S8.json"
    records = [
        record("Int8ConvRelu", [[1, 16, 16, 3], [16, 3, 3, 3], [16]], 960.0, stride=2),
        record("Int8ConvRelu", [[1, 16, 16, 3], [16, 3, 3, 3], [16]], 5.0, stride=1),
        record("Int8ConvRelu", [[1, 8, 8, 16], [48, 1, 1, 16], [48]], 100.0),
        record("Int8ConvRelu", [[1, 8, 8, 16], [48, 1, 1, 16], [48]], 140.0),  # measured twice: the mean
        record("Int8ConvRelu", [[1, 8, 8, 48], [48, 3, 3, 1], [48]], 30.0),
        record("Conv", [[1, 48, 8, 8], [16, 48, 1, 1], [16]], 70.0),  # of fp32: channels first
        record("Int8Add", [[1, 8, 8, 16], [1, 8, 8, 16]], 8.0),
        record("Int8AveragePool", [[1, 8, 8, 16]], 4.0),
        record("Int8FC", [[1, 16], [10, 16], [10]], 2.0),
        record("Int8Quantize", [[1, 8, 8, 16]], 9.0),
        record("Int8FC", [[1, 16], [10, 16], [10]], 99.0, device="other"),
    ]
    path.write_text("\n".join(records))
    with pytest.raises(ValueError, match=r"records of \['S8', 'other'\]"):
        OperatorTable.load(path)
    table = OperatorTable.load(path, device="S8")
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        LayerChoice({"k3": Block(16, 16, 3, 3, 1), "skip": nn.Identity()}, label="block"),
        Head(),
    )
    latency = PublishedLatencyProfiler(ModelSpace(network), IMAGES, table)
    assert latency.profile({"block": "skip"}) == pytest.approx(0.960 + 0.006)
    assert latency.profile({"block": "k3"}) == pytest.approx(0.966 + 0.120 + 0.030 + 0.070 + 0.008)
    with pytest.raises(ValueError, match=r"no convolution of \[\(1, 8, 8, 16\), \(96, 1, 1, 16\)\]"):
        PublishedLatencyProfiler(space(), IMAGES, table)


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "S8.json"
    path.write_text("")
    with pytest.raises(ValueError, match="no record of a known operator"):
        OperatorTable.load(path)
    path.write_text(record("Int8Add", [[1, 2]], 1.0) + "\n{}")
    with pytest.raises(ValueError, match="line 2 is no operator record"):
        OperatorTable.load(path)
    for shapes in ([], [[]], [[1, 8]]):
        path.write_text(record("Int8FC", shapes, 1.0))  # type: ignore[arg-type]  # the last has no weights
        with pytest.raises(ValueError, match="line 1 is no operator record"):
            OperatorTable.load(path)
    path.write_text(record("Int8Add", [[1, 2], [1, 2]], -1.0))
    with pytest.raises(ValueError, match="line 1: runtime_us_p50 must be a time above 0"):
        OperatorTable.load(path)
    with pytest.raises(ValueError, match="cannot read"):
        OperatorTable.load(tmp_path / "absent.json")
