from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hwnas.space import ModelSpace
from hwnas.spaces import SPACES, SmallMobileNet
from profilers.flops import FlopsProfiler, _headlines, count_macs
from profilers.profile import distinct_parts
from profilers.space import Part
from tests.contracts.meter import MeterContract


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


def mobilenet_v2() -> nn.Sequential:
    """Table 2 of arXiv 1801.04381, without the residual additions, which have no MACs."""
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    layers, channels = conv_bn(3, 32, 3, 2), 32
    for expansion, outputs, repeats, stride in [*rows, (6, 320, 1, 1)]:
        for index in range(repeats):
            hidden = channels * expansion
            layers += conv_bn(channels, hidden, 1) if expansion > 1 else []
            layers += conv_bn(hidden, hidden, 3, stride if index == 0 else 1, groups=hidden)
            layers += conv_bn(hidden, outputs, 1)[:2]
            channels = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *conv_bn(320, 1280, 1), *head)


def test_mobilenet_v2_has_the_published_count() -> None:
    with torch.device("meta"):
        network, images = mobilenet_v2(), torch.empty(1, 3, 224, 224)
    count = count_macs(network, [images])
    assert count.headline == 300_774_272
    assert count.uncounted == {}
    assert count.detail["batch_norm"] > count.detail["hardtanh"] > 5e6


PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published_archs.json"


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"no published architectures at {PUBLISHED}")
def test_layers_of_published_networks_add_up_to_their_counts() -> None:
    tables = [arch for arch in json.loads(PUBLISHED.read_text())["archs"] if "layer_table" in arch]
    assert tables
    known: dict[str, int] = {}
    for arch in tables:
        for row in arch["layer_table"]:
            known.setdefault(str(row), layer_macs(row))
        assert sum(known[str(row)] for row in arch["layer_table"]) == arch["measured"]["macs"], arch["name"]


def layer_macs(row: list[Any]) -> int:
    """A row is [in, out, "fc", bias] or [in, out, kernel, stride, dilation, groups, bias, height, width]."""
    inputs, outputs = row[:2]
    with torch.device("meta"):
        if "fc" in row:
            return count_macs(nn.Linear(inputs, outputs), [torch.empty(1, inputs)]).headline
        kernel, stride, dilation, groups, _, *sizes = row[2:]
        layer = nn.Conv2d(inputs, outputs, kernel, stride, dilation=dilation, groups=groups, bias=False)
        needed = [(size - 1) * stride + dilation * (kernel - 1) + 1 for size in sizes]
        return count_macs(layer, [torch.empty(1, inputs, *needed)]).headline


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch = torch.einsum("bij, bkj -> bik", x, x) + torch.einsum("...ij,...kj->...ik", x, x)
        chain = torch.einsum("bij,bjk,bkl->bil", batch, batch, batch)
        return torch.bmm(chain, x) @ x[0].t() + torch.baddbmm(chain, batch, chain)


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 9)),
    "conv1d": (nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "same padding": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 9, 9)),
    "linear": (
        nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3, bias=False)),
        (2, 7, 8),
    ),
    "attention": (Attention(), (2, 6, 8)),
    "transformer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 6, 8)),
    "products": (Products(), (3, 4, 5)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_torch_counts_two_flops_for_each_mac(name: str) -> None:
    module, shape = NETWORKS[name]
    given = torch.zeros(shape)
    # Dense attention: torch's counter does not know the fused kernel of the CPU.
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module.train()(given)
    count = count_macs(module, [given])
    assert 2 * count.headline == counter.get_total_flops()
    assert not count.uncounted


def test_a_product_with_a_vector_is_counted() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x[0, 0]  # torch's own counter does not see this one

    assert count_macs(Product(), [torch.zeros(3, 4, 5)]).headline == 3 * 4 * 5


@pytest.mark.parametrize("equation", ["i,ij,j->", "i,ij,j", "ij,jk,kl", "ij,jk,kl->l"])
def test_an_einsum_of_three_is_counted_by_pairs(equation: str) -> None:
    class Chain(nn.Module):
        def forward(self, *factors: Tensor) -> Tensor:
            return torch.einsum(equation, *factors)

    sizes = dict(zip("ijkl", (3, 4, 5, 6), strict=True))
    terms = equation.partition("->")[0].split(",")
    factors = [torch.zeros([sizes[axis] for axis in term]) for term in terms]
    with FlopCounterMode(display=False) as counter:
        Chain()(*factors)
    assert 2 * count_macs(Chain(), factors).headline == counter.get_total_flops()


def test_an_operation_that_cannot_be_copied_is_counted() -> None:
    class Gram(nn.Module):
        transposed = staticmethod(torch.Tensor.T.__get__)  # as a survey of a space hands it over

        def forward(self, matrix: Tensor) -> Tensor:
            return matrix @ self.transposed(matrix)

    assert count_macs(Gram(), [torch.empty(3, 4, device="meta")]).headline == 3 * 4 * 3


def test_a_deep_python_stack_does_not_slow_the_count() -> None:
    module = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()] * 3)
    image = torch.zeros(1, 4, 4, 4)

    def seconds(depth: int) -> float:
        if depth:
            return seconds(depth - 1)
        started = time.process_time()
        count_macs(module, [image])
        return time.process_time() - started

    seconds(0)
    shallow, deep = zip(*((seconds(0), seconds(500)) for _ in range(9)), strict=True)
    # A trace records the stack at every node: 500 frames more would take it several times as long.
    assert statistics.median(deep) < 2 * statistics.median(shallow)


def test_what_is_measured_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    weight, mean = module[0].weight, module[1].running_mean.clone()
    count_macs(module, [torch.ones(1, 1, 5, 5)])
    assert module.training
    assert module[0].weight is weight
    assert weight.requires_grad
    assert torch.equal(module[1].running_mean, mean)
    assert torch.backends.mha.get_fastpath_enabled()


def test_operators_that_nothing_counts_are_reported(space: Any) -> None:
    sites = space.sites(torch.zeros(1, 1, 6, 6))
    given = (torch.empty(3, 1, 4, device="meta"),)
    sites[0]._part = lambda width: Part(
        f"LSTM {width}", f"{width}", nn.LSTM(4, width).to("meta"), given, False
    )
    space.sites = lambda *inputs: sites
    with pytest.warns(UserWarning, match=r"aten::lstm \(in LSTM 4\)"):
        profiler = FlopsProfiler(space, torch.zeros(1, 1, 6, 6))
    architecture = profiler.cost.minimum()
    assert profiler.detail(architecture).uncounted == {"aten::lstm": 1}


@pytest.fixture(scope="module")
def mobile() -> ModelSpace:
    return ModelSpace(SmallMobileNet())


def test_the_cost_of_the_default_space_is_that_of_its_frozen_networks(mobile: ModelSpace) -> None:
    images = torch.zeros(1, 1, 28, 28)
    started = time.process_time()
    profiler = FlopsProfiler(mobile, images)
    took = time.process_time() - started
    assert took < 10  # under 2 s alone on a core; other work beside it makes CPU time longer
    generator = torch.Generator().manual_seed(0)
    for architecture in (mobile.default(), *(mobile.random(generator) for _ in range(5))):
        counted = count_macs(mobile.freeze(architecture), [images])
        assert profiler.profile(architecture) == counted.headline
        assert profiler.detail(architecture) == counted


@pytest.mark.parametrize("name", sorted(SPACES))
def test_what_runs_on_meta_has_the_macs_of_its_trace(name: str) -> None:
    space = ModelSpace(SPACES[name].small())
    example = torch.zeros(1, 1, 28, 28)
    parts = list(distinct_parts(space, space.sites(example)).values())
    assert parts
    chosen = parts[:: max(1, len(parts) // 12)]
    known = _headlines([(part.module, part.inputs) for part in chosen])
    assert [count.headline for count in known] == [
        count_macs(part.module, part.inputs).headline for part in chosen
    ]


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Any:
        return self.function(*given)


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nn.Conv2d(4, 8, 3, 2, groups=2, dilation=2), [(2, 4, 9, 7)]),
        (nn.Conv2d(4, 8, 3, padding="same"), [(1, 4, 9, 7)]),
        (nn.Conv1d(4, 8, 3), [(1, 4, 9)]),
        (nn.ConvTranspose2d(4, 8, 3, 2), [(2, 4, 5, 6)]),
        (nn.Linear(4, 8), [(2, 3, 4)]),
        (nn.Linear(4, 8, bias=False), [(4,)]),
        (nn.LSTM(4, 8, batch_first=True), [(2, 3, 4)]),
        (nn.MultiheadAttention(8, 2, batch_first=True), [(2, 3, 8)] * 3),
        (Function(F.scaled_dot_product_attention), [(2, 2, 3, 4)] * 3),
        (Function(lambda a, b: torch.einsum("i,j->ij", a, b)), [(4,), (5,)]),
        (Function(lambda a, b: torch.einsum("bij,bjk->bik", a, b)), [(2, 3, 4), (2, 4, 5)]),
        (Function(torch.dot), [(4,), (4,)]),
        (Function(torch.mv), [(3, 4), (4,)]),
        (Function(lambda a, b: a @ b), [(2, 3, 4), (4, 5)]),
        (Function(lambda a, b: torch.baddbmm(torch.zeros(1), a, b)), [(2, 3, 4), (2, 4, 5)]),
        (Function(torch.fft.fft), [(2, 4)]),
    ],
    ids=lambda given: "" if isinstance(given, list) else type(given).__name__,
)
def test_shapes_on_meta_say_what_a_trace_says_or_nothing(module: nn.Module, shapes: list[Any]) -> None:
    inputs = [torch.zeros(shape, device="meta") for shape in shapes]
    (found,) = _headlines([(module.to("meta"), inputs)])
    traced = count_macs(module, inputs)
    assert (found.headline, found.uncounted) == (traced.headline, traced.uncounted)


def test_detail_is_plain_data(mobile: ModelSpace) -> None:
    count = count_macs(mobile.freeze(mobile.default()), [torch.zeros(1, 1, 28, 28)])
    assert json.loads(json.dumps(count.detail)) == count.detail


def test_counting_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_macs(Attention(), [torch.zeros(2, 6, 8)])


class TestContract(MeterContract):
    unit = "MAC"

    def profiler(self, space: ModelSpace, inputs: tuple[Tensor, ...]) -> FlopsProfiler:
        return FlopsProfiler(space, *inputs)

    def truth(self, space: ModelSpace, inputs: tuple[Tensor, ...], architecture: dict[str, Any]) -> float:
        return count_macs(space.freeze(architecture), inputs).headline
