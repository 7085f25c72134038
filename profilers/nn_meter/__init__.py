"""nn-Meter's predictors of latency, audited, and without its pickles."""

from profilers.nn_meter.importing import import_predictor
from profilers.nn_meter.pickles import RefusedPickleError
from profilers.nn_meter.predictor import Coverage, Gap, NnMeterPredictor, UncoveredError
from profilers.nn_meter.profiler import NnMeterProfiler

__all__ = [
    "Coverage",
    "Gap",
    "NnMeterPredictor",
    "NnMeterProfiler",
    "RefusedPickleError",
    "UncoveredError",
    "import_predictor",
]
