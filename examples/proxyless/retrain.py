"""Trains the network that `search.py` found from scratch, tests it, exports it, and certifies its latency.

    python examples/proxyless/retrain.py --out runs/proxyless

The authors' recipe (mit-han-lab/proxylessnas, search/imagenet_run_exp.py) is 300 epochs of ImageNet at
batches of 256, SGD at 0.05 with a cosine, weight decay 4e-5 and label smoothing 0.1: give --epochs 300
--batch-size 256 --lr 0.05 --accelerator gpu. Writes `subnet.pt`, `subnet.onnx` with its certificate, and
`retrain.json`. With --architecture FILE another network of the space is trained in the same way, into
--into.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytorch_lightning as pl
import torch
from proxyless_space import make_space
from pytorch_lightning.loggers import CSVLogger

from hwnas.certificate import certify
from hwnas.classification import Classification
from hwnas.data import describe, load_data, retrain_dataloader
from hwnas.export import accuracy, export_onnx
from hwnas.run_folder import read_json, write_json
from lookup_tables import LookupTable
from profilers import LatencyProfiler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/proxyless"), help="where search.py wrote")
parser.add_argument("--architecture", type=Path, help="in place of the one that was found")
parser.add_argument("--into", type=Path, help="where to write, in place of --out")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--batches", type=int, help="of each epoch; default: all")
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--smoke", action="store_true", help="one epoch: does it run?")
args = parser.parse_args()
if args.smoke:
    args.epochs = 1
into = args.into or args.out

searched = read_json(args.out / "search.json", "search")
seed = searched["seed"]
pl.seed_everything(seed, verbose=False)
data = load_data(searched["data"], folder=searched["data_folder"], batch_size=args.batch_size, seed=seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
space = make_space(facts, searched["smoke"])
example = torch.zeros(1, *facts.input_shape)
architecture = space.validate(read_json(args.architecture or args.out / "architecture.json", "architecture"))

subnet = space.freeze(architecture)  # its weights are new: the supernet's were not kept
trainer = pl.Trainer(
    max_epochs=args.epochs,
    limit_train_batches=args.batches,
    accelerator=args.accelerator,
    devices=args.devices,
    logger=CSVLogger(into, name="retrain", version=""),
    enable_checkpointing=False,
    log_every_n_steps=1,
)
module = Classification(subnet, facts.num_classes, lr=args.lr, schedule="cosine", weight_decay=4e-5)
trainer.fit(module, retrain_dataloader(data), data.val_dataloader())
data.setup("test")
(tested,) = trainer.test(module, data.test_dataloader(), verbose=False)
if not trainer.is_global_zero:
    raise SystemExit  # one process of several writes
subnet.cpu().eval()
torch.save(subnet.state_dict(), into / "subnet.pt")

path = export_onnx(subnet, example, into / "subnet.onnx")
table = LookupTable.load(args.out / "latency_table.json")
certificate = certify(
    path,
    subnet,
    LatencyProfiler(space, example, table, allow_other_device=True),
    architecture,
    budget_ms=searched["budget_ms"],
    inputs=[next(iter(data.test_dataloader()))[0]],
    test_accuracy=accuracy(path, data.test_dataloader()),
    space="proxylessnas",
    data=searched["data"],
    strategy="proxyless",
    seed=seed,
    say=print,
)
report = {
    "architecture": architecture,
    "test_accuracy": tested["test_acc"],
    "measured_ms": certificate.measured_ms,
    "predicted_ms": certificate.predicted_ms,
    "budget_ms": certificate.budget_ms,
    "passed": certificate.passed,
    "macs": certificate.macs,
    "params": certificate.params,
    "epochs": args.epochs,
}
write_json(into / "retrain.json", report)
print(json.dumps(report, indent=1))
print(f"certificate: {'passed' if certificate.passed else 'not passed'}: {certificate.reason}")
