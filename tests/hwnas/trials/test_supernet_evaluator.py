from __future__ import annotations

import copy

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from hwnas import ModelSpace
from hwnas.recalibrate import recalibrate
from hwnas.trials import RegularizedEvolution, SupernetEvaluator, search
from tests.hwnas.tiny_space import TinyNet

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches(count: int, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            2 + 3 * torch.randn(16, 1, 28, 28, generator=generator),
            torch.randint(4, (16,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.fixture
def space() -> ModelSpace:
    torch.manual_seed(0)
    return ModelSpace(TinyNet(num_classes=4))


def accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(4, average="micro")


def test_value_is_that_of_the_recalibrated_subnet(space: ModelSpace) -> None:
    evaluate = SupernetEvaluator(space, batches(3, 0), batches(4, 1), {"accuracy": accuracy()})
    recalibrated, plain = [], []
    for seed in range(4):
        architecture = space.random(torch.Generator().manual_seed(seed))
        right = {True: 0, False: 0}
        for is_recalibrated in right:
            subnet = space.freeze(architecture)
            if is_recalibrated:
                recalibrate(subnet, batches(3, 0))
            subnet.eval()
            with torch.no_grad():
                for images, targets in batches(4, 1):
                    right[is_recalibrated] += int((subnet(images).argmax(1) == targets).sum())
        assert evaluate(architecture) == {"accuracy": pytest.approx(right[True] / 64)}
        recalibrated.append(right[True])
        plain.append(right[False])
    assert recalibrated != plain


def test_evaluation_leaves_the_space_and_the_metrics_as_they_were(space: ModelSpace) -> None:
    before, mode = copy.deepcopy(space.state_dict()), space.training
    metric = accuracy()
    evaluate = SupernetEvaluator(space, batches(2, 0), batches(2, 1), {"accuracy": metric})
    first = evaluate(space.default())
    assert evaluate(space.default()) == first
    assert space.training == mode
    assert not metric.update_called
    for name, value in space.state_dict().items():
        assert torch.equal(value, before[name])


def test_search_over_a_supernet(space: ModelSpace) -> None:
    evaluate = SupernetEvaluator(space, batches(1, 0), batches(2, 1), {"accuracy": accuracy()})
    found = search(space, evaluate, RegularizedEvolution(4, 2), {"accuracy": "max"}, trials=8)
    assert len(found.finished) == 8
    assert found.best.metrics == evaluate(found.best.architecture)


def test_batches_that_come_only_once_are_refused(space: ModelSpace) -> None:
    with pytest.raises(TypeError, match="calibration batches are gone through once for each"):
        SupernetEvaluator(space, iter(batches(1, 0)), batches(1, 1), {"accuracy": accuracy()})
    with pytest.raises(TypeError, match="validation batches"):
        SupernetEvaluator(space, batches(1, 0), iter(batches(1, 1)), {"accuracy": accuracy()})


def test_nothing_to_measure_with_is_refused(space: ModelSpace) -> None:
    with pytest.raises(ValueError, match="at least one metric"):
        SupernetEvaluator(space, batches(1, 0), batches(1, 1), {})
    with pytest.raises(ValueError, match="at least one validation batch"):
        SupernetEvaluator(space, batches(1, 0), [], {"accuracy": accuracy()})(space.default())
