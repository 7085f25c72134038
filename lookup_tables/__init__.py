"""Latency tables of devices: what an entry is, how it is measured, stored and checked."""

from lookup_tables.android import AdbDevice
from lookup_tables.assembly import PartCall, Wiring
from lookup_tables.build import build_table
from lookup_tables.bundle import OtherDevice, build_table_on, import_bundle, write_bundle
from lookup_tables.device import DeviceFingerprint, fingerprint
from lookup_tables.export import to_onnx
from lookup_tables.graph import ExecutedGraph, executed_graph
from lookup_tables.measure import LatencyReading, Measurement, measure, measure_latency
from lookup_tables.progress import Progress
from lookup_tables.published import BlockTable, OperatorTable
from lookup_tables.remote import SshDevice
from lookup_tables.session import SessionSettings
from lookup_tables.sources import EntrySource, Method, Networks, SubnetSource
from lookup_tables.table import Accuracy, Calibration, Entry, LookupTable, MissingEntryError, Subnet
from lookup_tables.validate import Validation, difference, held_out, validate_table

__all__ = [
    "Accuracy",
    "AdbDevice",
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
    "OtherDevice",
    "PartCall",
    "Progress",
    "SessionSettings",
    "SshDevice",
    "Subnet",
    "SubnetSource",
    "Validation",
    "Wiring",
    "build_table",
    "build_table_on",
    "difference",
    "executed_graph",
    "fingerprint",
    "held_out",
    "import_bundle",
    "measure",
    "measure_latency",
    "to_onnx",
    "validate_table",
    "write_bundle",
]
