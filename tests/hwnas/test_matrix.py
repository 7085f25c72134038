from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from hwnas import ModelSpace
from hwnas.classification import Classification
from hwnas.export import export_onnx
from profilers import FlopsProfiler, LagrangianPenalty, RangeProfilerFilter
from tests.hwnas.matrix import IMAGES, KINDS, refusal, table
from tests.hwnas.strategies.tiny import CLASSES, EVERY, STRATEGIES, fit

# Searches of four steps decide nothing, and say so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:[A-Za-z]+. (the answer|. of . layers|nothing is decided):UserWarning"
)

CELLS = [(name, kind) for kind in KINDS for name in EVERY]


@pytest.fixture(scope="module")
def exported() -> set[tuple[str, str]]:
    """The networks that were exported: a file does not depend on who found it."""
    return set()


@pytest.mark.parametrize(("name", "kind"), [cell for cell in CELLS if refusal(*cell) is None])
def test_a_search_derives_inside_its_budget_and_freezes_with_equal_outputs(
    name: str, kind: str, exported: set[tuple[str, str]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Classification(ModelSpace(KINDS[kind]()), CLASSES)
    space = module.network
    profiler = FlopsProfiler(space, IMAGES)
    low, high = profiler.cost.bounds()
    budget = low + 0.6 * (high - low)
    is_differentiable = name in STRATEGIES or name.startswith("darts")
    bound = (
        {"penalty": LagrangianPenalty(profiler, baseline=budget)}
        if is_differentiable
        else {"filter": RangeProfilerFilter(profiler, max=budget)}
    )
    strategy = EVERY[name](arc_learning_rate=0.1, **bound)
    before = [p.detach().clone() for p in module.parameters()]
    fit(strategy, module)
    assert any(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    architecture = strategy.architecture()
    assert profiler.profile(architecture) <= budget
    images = torch.randn(3, 1, 8, 8)
    subnet = space.eval().freeze(architecture)
    with space.running(space.gates_of(architecture)):
        expected = space(images)
    torch.testing.assert_close(subnet(images), expected)
    key = (kind, str(space.active(architecture)))
    if key not in exported:
        exported.add(key)
        export_onnx(subnet, images, tmp_path / "subnet.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "subnet.onnx", providers=["CPUExecutionProvider"])
        (scores,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_is_refused_is_refused_with_the_place_and_a_way_out() -> None:
    refused = {cell: reason for cell in CELLS if (reason := refusal(*cell)) is not None}
    assert {kind for _, kind in refused} == {"attention sizes"}
    assert {name for name, _ in refused} == {*STRATEGIES, "darts-second-order"}
    assert all("'attention.attention' cannot be searched with mixing weights" in r for r in refused.values())


def test_the_page_in_the_docs_is_what_the_code_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "support.md"
    assert page.read_text() == table(), "run: python -m tests.hwnas.matrix > docs/support.md"
