"""What an architecture is worth by the weights that it inherits from a trained supernet."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torchmetrics import Metric

from hwnas.recalibrate import recalibrate
from hwnas.space import ModelSpace
from profilers.space import Architecture


@final
class SupernetEvaluator:
    """Freezes an architecture with the supernet's weights, recalibrates it, and measures it.

    This is the second step of single-path one-shot search (Guo et al., arXiv 1904.00420, section 3.3):
    BatchNorm statistics are recalculated on training data for every candidate. The space is not changed. One
    architecture has one value: batches are taken in the order in which they come, so give them unshuffled.

    An executor of processes gets a copy of the space with each evaluation, unless the evaluator is made in
    the workers, by a function at the top of a module that keeps it.

    Args:
        space: with trained weights.
        calibration: batches ``(inputs, ...)`` of training data; a list or a data loader.
        validation: batches ``(inputs, targets)``, not those of the test set.
        metrics: by name, each called with the network's outputs and the targets.

    Raises:
        TypeError: batches that can be gone through only once.
        ValueError: no metric.

    >>> from torch import nn
    >>> from torchmetrics.classification import MulticlassAccuracy
    >>> from hwnas import LayerChoice
    >>> layers = [nn.Linear(3, 2), nn.Linear(3, 2, bias=False)]
    >>> space = ModelSpace(nn.Sequential(LayerChoice(layers, label="op")))
    >>> batches = [(torch.rand(8, 3), torch.randint(2, (8,)))]
    >>> evaluate = SupernetEvaluator(space, batches, batches, {"accuracy": MulticlassAccuracy(2)})
    >>> list(evaluate({"op": 1}))
    ['accuracy']
    """

    def __init__(
        self,
        space: ModelSpace,
        calibration: Iterable[Any],
        validation: Iterable[Any],
        metrics: Mapping[str, Metric],
    ) -> None:
        for name, batches in (("calibration", calibration), ("validation", validation)):
            if isinstance(batches, Iterator):
                raise TypeError(
                    f"{name} batches are gone through once for each architecture: give a list or a data "
                    f"loader, not an iterator ({type(batches).__name__})"
                )
        if not metrics:
            raise ValueError("a supernet is evaluated by at least one metric, such as torchmetrics' Accuracy")
        self.space = space
        self.calibration = calibration
        self.validation = validation
        self.metrics = dict(metrics)

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """The metrics of one architecture by name.

        Raises:
            ValueError: the architecture is none of the space, or there is no batch.
        """
        subnet = self.space.freeze(architecture)
        device = next((parameter.device for parameter in subnet.parameters()), torch.device("cpu"))
        recalibrate(subnet, self.calibration, lambda batch: subnet(_inputs(batch).to(device))).eval()
        metrics = {name: copy.deepcopy(metric).to(device) for name, metric in self.metrics.items()}
        count = 0
        with torch.inference_mode():
            for inputs, targets in self.validation:
                count += 1
                outputs = subnet(inputs.to(device))
                for metric in metrics.values():
                    metric.update(outputs, targets.to(device))
        if not count:
            raise ValueError("an architecture needs at least one validation batch to be evaluated; got none")
        return {name: float(metric.compute()) for name, metric in metrics.items()}


def _inputs(batch: Any) -> torch.Tensor:  # a batch is whatever the loader's collate function made
    inputs: torch.Tensor = batch[0] if isinstance(batch, list | tuple) else batch
    return inputs
