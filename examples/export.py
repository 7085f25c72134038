"""Export an architecture with the weights of a checkpoint to ONNX, and check the file against torch.

    python examples/export.py runs/search/architecture.json runs/search/checkpoints/train/last.ckpt \
        --data fashion-mnist --out subnet.onnx --max-latency-ms 0.4

The checkpoint may be the subnet's or the supernet's, whose weights are inherited. With ``--data`` BatchNorm
is recalibrated and the file is tested on real images; with ``--max-latency-ms`` it is measured here and
judged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hwnas.certificate import judge
from hwnas.subnet_export import export_from_checkpoint
from lookup_tables import SessionSettings, measure_latency

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("architecture", type=Path, help="architecture.json")
parser.add_argument("checkpoint", type=Path, help="of the subnet or the supernet")
parser.add_argument("--space", default="small-mobilenet", help="by name, or my_module:MyNetwork")
parser.add_argument("--data", help="fashion-mnist, digits, or my_module:my_datamodule")
parser.add_argument("--out", type=Path, default=Path("subnet.onnx"))
parser.add_argument("--dynamic-batch", action="store_true", help="leave the batch open")
parser.add_argument("--max-latency-ms", type=float, help="measure the file here and judge it")
arguments = parser.parse_args()

facts = export_from_checkpoint(
    arguments.architecture,
    arguments.checkpoint,
    arguments.out,
    space=arguments.space,
    data=arguments.data,
    dynamic_batch=arguments.dynamic_batch,
)
for name, fact in facts.items():
    print(f"{name:<22} {fact}")

if arguments.max_latency_ms is not None:
    reading = measure_latency(arguments.out, SessionSettings(threads=1))
    keeps, reason = judge(reading, arguments.max_latency_ms)
    print(f"{'budget':<22} {'kept' if keeps else 'not kept'}: {reason}")
    raise SystemExit(0 if keeps else 1)
