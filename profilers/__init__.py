"""What an architecture costs, before it is built; penalties and filters on that cost."""

from profilers.cost import Cost, CostTable
from profilers.fbnet_penalty import FBNetPenalty
from profilers.fit import fit_cost
from profilers.flops import FlopsProfiler, MacCount, count_macs
from profilers.latency import LatencyProfiler
from profilers.mixed_precision import MixedPrecisionProfiler
from profilers.nn_meter import NnMeterPredictor, NnMeterProfiler
from profilers.params import ParamsProfiler, count_parameters
from profilers.peak_memory import PeakMemory, PeakMemoryProfiler, peak_memory
from profilers.penalty import (
    ExpectationProfilerPenalty,
    LagrangianPenalty,
    Penalty,
    RangeProfilerFilter,
    SampleProfilerPenalty,
)
from profilers.profile import Meter, Profiler, build_cost, distinct_parts, parts_of
from profilers.program import minimise
from profilers.published import PublishedLatencyProfiler
from profilers.space import Architecture, Option, Part, Site, Space

__all__ = [
    "Architecture",
    "Cost",
    "CostTable",
    "ExpectationProfilerPenalty",
    "FBNetPenalty",
    "FlopsProfiler",
    "LagrangianPenalty",
    "LatencyProfiler",
    "MacCount",
    "Meter",
    "MixedPrecisionProfiler",
    "NnMeterPredictor",
    "NnMeterProfiler",
    "Option",
    "ParamsProfiler",
    "Part",
    "PeakMemory",
    "PeakMemoryProfiler",
    "Penalty",
    "Profiler",
    "PublishedLatencyProfiler",
    "RangeProfilerFilter",
    "SampleProfilerPenalty",
    "Site",
    "Space",
    "build_cost",
    "count_macs",
    "count_parameters",
    "distinct_parts",
    "fit_cost",
    "minimise",
    "parts_of",
    "peak_memory",
]
