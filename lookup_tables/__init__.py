"""Latency tables of devices: what an entry is, how it is measured, stored and checked."""

from lookup_tables.assembly import PartCall, Wiring
from lookup_tables.build import EntrySource, Method, Networks, SubnetSource, build_table, validate_table
from lookup_tables.device import DeviceFingerprint, fingerprint
from lookup_tables.export import to_onnx
from lookup_tables.graph import ExecutedGraph, executed_graph
from lookup_tables.measure import LatencyReading, Measurement, measure, measure_latency
from lookup_tables.published import BlockTable, OperatorTable
from lookup_tables.session import SessionSettings
from lookup_tables.table import Accuracy, Calibration, Entry, LookupTable, MissingEntryError, Subnet

__all__ = [
    "Accuracy",
    "BlockTable",
    "Calibration",
    "DeviceFingerprint",
    "Entry",
    "EntrySource",
    "ExecutedGraph",
    "LatencyReading",
    "LookupTable",
    "Measurement",
    "Method",
    "MissingEntryError",
    "Networks",
    "OperatorTable",
    "PartCall",
    "SessionSettings",
    "Subnet",
    "SubnetSource",
    "Wiring",
    "build_table",
    "executed_graph",
    "fingerprint",
    "measure",
    "measure_latency",
    "to_onnx",
    "validate_table",
]
