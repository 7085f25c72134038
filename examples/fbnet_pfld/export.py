"""Exports the trained landmark network as `subnet.onnx`, measures it here, and writes its certificate.

    python examples/fbnet_pfld/export.py --data data/106points --out runs/fbnet_pfld

Prints, in the columns of NNI's table (docs/source/nas/exploration_strategy.rst there), the size of the file,
its latency on this machine with ONNX Runtime at one thread, and its own error (NME) on the test
images; beside them the budget, what the table predicted, and how far the file is from torch. `hwnas verify`
measures the file again. The auxiliary network for the pose is no part of it. What `search.py --smoke` left is
exported likewise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from faces import POINTS, Faces

from hwnas import ModelSpace
from hwnas.certificate import certify
from hwnas.export import export_onnx, load_session, run
from hwnas.landmarks import NormalisedMeanError
from hwnas.run_folder import read_json
from hwnas.spaces import PFLD
from lookup_tables import LookupTable
from profilers import LatencyProfiler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path("data/106points"))
parser.add_argument("--out", type=Path, default=Path("runs/fbnet_pfld"), help="where search.py wrote")
parser.add_argument("--into", type=Path, help="where retrain.py wrote, if not there")
args = parser.parse_args()
into = args.into or args.out

searched = read_json(args.out / "search.json", "search")
make, size = (PFLD.small, 28) if searched["small"] else (PFLD, 112)
space = ModelSpace(make(num_classes=2 * POINTS, in_channels=3, pose=True))
example = torch.zeros(1, 3, size, size)
architecture = space.validate(read_json(into / "retrain.json", "report")["architecture"])
latency = LatencyProfiler(space, example, LookupTable.load(args.out / "latency_table.json"))
data = Faces(args.data, size, batch_size=64, synthetic=0, seed=searched["seed"])
data.setup()

subnet = space.freeze(architecture)
subnet.load_state_dict(torch.load(into / "subnet.pt", weights_only=True))
subnet.pose = None
path = export_onnx(subnet.eval(), example, into / "subnet.onnx")

session, error = load_session(path), NormalisedMeanError(POINTS)
for images, targets in data.test_dataloader():
    error.update(torch.from_numpy(run(session, images)), targets)
test_nme = float(error.compute())
certificate = certify(
    path,
    subnet,
    latency,
    architecture,
    budget_ms=searched["budget_ms"],
    inputs=[next(iter(data.test_dataloader()))[0]],
    facts={"test_nme": test_nme},
    space="pfld",
    data=str(args.data),
    strategy="gumbel-darts",
    seed=searched["seed"],
    say=print,
)
print(
    f"{'file':<12} {path}, {path.stat().st_size / 1000:.0f} KB, {certificate.macs / 1e6:.2f} M multiply-adds"
)
print(
    f"{'latency':<12} {certificate.measured_ms:.4f} ms, noise floor {certificate.noise_floor_percent:.2f} %"
)
print(f"{'predicted':<12} {certificate.predicted_ms:.4f} ms, budget {certificate.budget_ms:.4f} ms")
print(f"{'NME':<12} {100 * test_nme:.2f} %, the file's own, on the test images of '{args.data}'")
print(f"{'parity':<12} {certificate.parity_max_abs_diff:.2g} from torch at most")
print(f"{'certificate':<12} {'passed' if certificate.passed else 'not passed'}: {certificate.reason}")
