"""Export an architecture with the weights of a checkpoint to ONNX, and check the file against torch.

    python examples/export.py runs/search/architecture.json runs/search/checkpoints/train/last.ckpt \
        --data fashion-mnist --out subnet.onnx --max-latency-ms 0.4

The checkpoint may be the subnet's or the supernet's, whose weights are inherited. With ``--data`` BatchNorm
is recalibrated and the file is tested on real images; with ``--max-latency-ms`` it is measured here and
judged, against what the latency table of ``--device`` predicts, if there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hwnas.subnet_export import export_from_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("architecture", type=Path, help="architecture.json")
parser.add_argument("checkpoint", type=Path, help="of the subnet or the supernet")
parser.add_argument("--space", default="small-mobilenet", help="by name, or my_module:MyNetwork")
parser.add_argument("--data", help="fashion-mnist, digits, or my_module:my_datamodule")
parser.add_argument("--out", type=Path, default=Path("subnet.onnx"))
parser.add_argument("--dynamic-batch", action="store_true", help="leave the batch open")
parser.add_argument("--max-latency-ms", type=float, help="measure the file here and judge it")
parser.add_argument("--device", type=Path, help="a latency table: what it predicts is told, too")
arguments = parser.parse_args()

exported = export_from_checkpoint(
    arguments.architecture,
    arguments.checkpoint,
    arguments.out,
    space=arguments.space,
    data=arguments.data,
    dynamic_batch=arguments.dynamic_batch,
    max_latency_ms=arguments.max_latency_ms,
    device_table=arguments.device,
)
print(f"{'file':<22} {exported.file}")
print(f"{'parity with torch':<22} {exported.parity_max_abs_diff:.2g}")
if exported.test_accuracy is not None:
    print(f"{'test accuracy':<22} {exported.test_accuracy:.4f}")
certificate = exported.certificate
if certificate is not None:
    print(f"{'predicted ms':<22} {certificate.predicted_ms or 'nothing: no --device'}")
    print(f"{'budget':<22} {'kept' if certificate.passed else 'not kept'}: {certificate.reason}")
    raise SystemExit(0 if certificate.passed else 1)
