"""SPOS, step 3 of 3: trains the network that was found from scratch, tests it, exports it, and measures it.

    python examples/spos/evaluation.py --out runs/spos

The authors' recipe (megvii-model/SinglePathOneShot, src/Evaluation/template/train.py) is 300,000 steps of
ImageNet, 240 epochs, at batches of 1024, SGD at 0.5 falling to 0 in a line, weight decay 4e-5 and label
smoothing 0.1: give --epochs 240 --batch-size 128 --lr 0.5 --accelerator gpu --devices 8. Writes `subnet.pt`,
`subnet.onnx` (with its certificate, where the search had a latency) and `evaluation.json`. With
--architecture FILE another network of the space is trained, into --into.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from spos_space import make_space

from hwnas.certificate import certify, patient_reading
from hwnas.classification import Classification
from hwnas.data import describe, load_data, retrain_dataloader
from hwnas.export import accuracy, export_onnx, parity
from hwnas.run_folder import read_json, write_json
from lookup_tables import LookupTable, SessionSettings
from profilers import LatencyProfiler, count_macs, count_parameters

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/spos"), help="where search.py wrote")
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

trained = read_json(args.out / "supernet.json", "supernet")
seed = trained["seed"]
pl.seed_everything(seed, verbose=False)
data = load_data(trained["data"], folder=trained["data_folder"], batch_size=args.batch_size, seed=seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
space = make_space(facts, trained["search"], trained["smoke"])
example = torch.zeros(1, *facts.input_shape)
architecture = space.validate(read_json(args.architecture or args.out / "architecture.json", "architecture"))


def to_zero(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


subnet = space.freeze(architecture)  # its weights are new: the supernet's are not loaded here
trainer = pl.Trainer(
    max_epochs=args.epochs,
    limit_train_batches=args.batches,
    accelerator=args.accelerator,
    devices=args.devices,
    logger=CSVLogger(into, name="evaluation", version=""),
    enable_checkpointing=False,
    log_every_n_steps=1,
)
module = Classification(subnet, facts.num_classes, lr=args.lr, schedule=to_zero, weight_decay=4e-5)
trainer.fit(module, retrain_dataloader(data), data.val_dataloader())
data.setup("test")
(tested,) = trainer.test(module, data.test_dataloader(), verbose=False)
if not trainer.is_global_zero:
    raise SystemExit  # one process of several writes
subnet.cpu().eval()
torch.save(subnet.state_dict(), into / "subnet.pt")

path = export_onnx(subnet, example, into / "subnet.onnx", metadata={"architecture": architecture})
file_accuracy, batch = accuracy(path, data.test_dataloader()), next(iter(data.test_dataloader()))[0]
searched = read_json(args.out / "search.json", "search")
if searched["latency_table"] is None:
    reading = patient_reading(path, SessionSettings(), print)
    measured = {"measured_ms": reading.p10_ms, "noise_floor_percent": reading.noise_floor_percent}
else:
    table = LookupTable.load(Path(searched["latency_table"]))
    certificate = certify(
        path,
        subnet,
        LatencyProfiler(space, example, table, allow_other_device=True),
        architecture,
        searched["max_latency_ms"],
        [batch],
        test_accuracy=file_accuracy,
        space="shufflenet-v2",
        data=trained["data"],
        strategy="spos",
        seed=seed,
        say=print,
    )
    kept = ("measured_ms", "noise_floor_percent", "budget_ms", "predicted_ms", "passed", "reason")
    measured = {name: getattr(certificate, name) for name in kept}
report = {
    "architecture": architecture,
    "test_accuracy": tested["test_acc"],
    "file_accuracy": file_accuracy,
    "parity_max_abs_diff": parity(subnet, path, [batch]),
    **measured,
    "macs": count_macs(subnet, [example]).headline,
    "params": count_parameters(subnet),
    "epochs": args.epochs,
}
write_json(into / "evaluation.json", report)
print(json.dumps(report, indent=1))
