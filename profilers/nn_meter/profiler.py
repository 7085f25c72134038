"""Latency by nn-Meter's predictors of kernels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor, nn

from lookup_tables import to_onnx
from profilers.nn_meter.predictor import Coverage, NnMeterPredictor, Reading, uncovered
from profilers.profile import Profiler, distinct_parts, tabulated
from profilers.space import Option, Space


@final
class NnMeterProfiler(Profiler):
    """What a network takes on the predictor's device, in milliseconds: nn-Meter's kernels, summed.

    Each distinct part of the space is exported and its kernels are detected alone, so that what the device
    fuses across the border of two sites is counted apart: `border_error` says how much that is. Where every
    site ends as its kernels do (convolution, BatchNorm, activation and sum in one module), it is 0.

    Every kernel is audited first. nn-Meter alone counts what it has no predictor for as 0 ms, ignores the
    batch and the width of images, and takes grouped and dilated convolutions for dense ones.

    Args:
        space: the space.
        example_input: of the shape that a deployed network gets; a batch of one.
        predictor: of the device.
        allow_partial: leave out kernels that are not covered, with a warning that says how much that is, in
            place of the error; `coverage` says it for an architecture.

    Raises:
        UncoveredError: nn-Meter cannot tell the time of some layer; it is named, with the reason.

    Warns:
        UserWarning: the numbers are partial.
    """

    def __init__(
        self,
        space: Space,
        example_input: Tensor | Sequence[Tensor],
        predictor: NnMeterPredictor,
        allow_partial: bool = False,
    ) -> None:
        self.predictor = predictor
        self._inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        self._allow_partial = allow_partial
        self._sites = list(space.sites(*self._inputs))
        parts = distinct_parts(space, self._sites)
        models = to_onnx({key: (part.module, part.inputs) for key, part in parts.items()})
        self._readings: Mapping[str, Reading] = predictor.read(models)
        gaps = {parts[key].name: reading for key, reading in self._readings.items() if reading.gaps}
        if gaps:
            error = uncovered(predictor.name, gaps)
            if not allow_partial:
                raise error
            share = sum((reading.coverage for reading in self._readings.values()), Coverage())
            warnings.warn(f"latencies are partial; of all parts, {share}. {error}", stacklevel=2)
        known = {key: reading.ms for key, reading in self._readings.items()}
        super().__init__(tabulated(space, self._sites, known, "ms", predictor.constant_ms))

    def coverage(self, architecture: Mapping[str, Option]) -> Coverage:
        """How much of an architecture its latency leaves out."""
        parts = (site.part(architecture) for site in self._sites)
        found = (self._readings[p.key].coverage for p in parts if p is not None and not p.is_free)
        return sum(found, Coverage())

    def border_error(self, architecture: Mapping[str, Option], network: nn.Module) -> float:
        """How far the sum over sites is from nn-Meter's number for the whole network, relative to that.

        Args:
            architecture: of the network.
            network: what ``space.freeze(architecture)`` returned.
        """
        inputs = tuple(tensor.to("meta") for tensor in self._inputs)
        whole = self.predictor.predict_ms(network.to("meta").eval(), inputs, self._allow_partial)
        return self.profile(architecture) / whole - 1.0
