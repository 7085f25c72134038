"""Trains the network that `search.py` found from scratch, as the authors derive it, and tests it.

    python examples/enas/retrain.py --out runs/enas

The authors train a larger network of another make than the one that they search (`hwnas.spaces.ENASMacro`
and `ENASMicro` with ``derived=True``; melodyguan/enas, scripts/cifar10_macro_final.sh and
cifar10_micro_final.sh), on CIFAR-10, with SGD at 0.05, weight decay 2e-4, and in the micro space cutout and
drop path that rises to 0.4:

    retrain.py --channels 96 --epochs 310 --batch-size 100 --accelerator gpu                     (macro)
    retrain.py --channels 36 --depth 15 --epochs 630 --batch-size 144 --accelerator gpu          (micro)

A macro network keeps its depth; a micro one may be deeper. --searched-form trains the form that was searched.
Writes `subnet.pt`, `subnet.onnx` and `retrain.json`. --architecture FILE trains another network of the space
in the same way, into --into. Departures: one cosine in place of several with restarts, no auxiliary head,
the data's own augmentation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytorch_lightning as pl
import torch
from enas_space import make_space
from pytorch_lightning.loggers import CSVLogger

from hwnas.classification import Classification
from hwnas.data import describe, load_data, retrain_dataloader
from hwnas.export import accuracy, export_onnx
from hwnas.run_folder import read_json, write_json
from hwnas.spaces.drop_path import DropPath
from profilers import count_macs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/enas"), help="where search.py wrote")
parser.add_argument("--architecture", type=Path, help="in place of the one that was found")
parser.add_argument("--into", type=Path, help="where to write, in place of --out")
parser.add_argument("--searched-form", action="store_true", help="not the authors' derived network")
parser.add_argument("--channels", type=int, help="default: as searched")
parser.add_argument("--depth", type=int, help="of a micro network; default: as searched")
parser.add_argument("--drop-path", type=float, default=0.4, help="of a micro network's last cell, at the end")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--batches", type=int, help="of each epoch; default: all")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--smoke", action="store_true", help="two epochs of three batches: does it run?")
args = parser.parse_args()
if args.smoke:
    args.epochs, args.batch_size, args.batches = 2, 16, 3
into = args.into or args.out

searched = read_json(args.out / "search.json", "search")
name, seed = searched["space"], searched["seed"]
pl.seed_everything(seed, verbose=False)
folder = searched["data_folder"]
data = load_data(searched["data"], folder=folder, batch_size=args.batch_size, seed=seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
form = {"derived": not args.searched_form} | ({"drop_path": args.drop_path} if name == "micro" else {})
depth = searched["depth"] if args.depth is None or name == "macro" else args.depth
space = make_space(name, facts, args.channels or searched["channels"], depth, searched["nodes"], **form)
architecture = space.validate(read_json(args.architecture or args.out / "architecture.json", "architecture"))
subnet = space.freeze(architecture)
dropped = {module: module.probability for module in subnet.modules() if isinstance(module, DropPath)}


class RisingDropPath(pl.Callback):
    """From 0 in proportion to the steps."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        for module, probability in dropped.items():
            module.probability = probability * trainer.global_step / trainer.estimated_stepping_batches


trainer = pl.Trainer(
    max_epochs=args.epochs,
    limit_train_batches=args.batches,
    accelerator=args.accelerator,
    devices=args.devices,
    gradient_clip_val=5.0,
    callbacks=[RisingDropPath()],
    logger=CSVLogger(into, name="retrain", version=""),
    enable_checkpointing=False,
    log_every_n_steps=1,
)
module = Classification(
    subnet, facts.num_classes, lr=args.lr, schedule="cosine", weight_decay=2e-4, label_smoothing=0.0
)
trainer.fit(module, retrain_dataloader(data), data.val_dataloader())
data.setup("test")
(tested,) = trainer.test(module, data.test_dataloader(), verbose=False)
if trainer.is_global_zero:  # one process of several writes
    subnet.cpu().eval()
    example = torch.zeros(1, *facts.input_shape)
    torch.save(subnet.state_dict(), into / "subnet.pt")
    path = export_onnx(subnet, example, into / "subnet.onnx", metadata={"architecture": architecture})
    report = {
        "architecture": architecture,
        "test_accuracy": tested["test_acc"],
        "onnx_accuracy": accuracy(path, data.test_dataloader()),
        "macs": count_macs(subnet, [example]).headline,
        "params": sum(parameter.numel() for parameter in subnet.parameters()),
    }
    write_json(into / "retrain.json", {**report, "epochs": args.epochs})
    print(json.dumps({key: report[key] for key in report if key != "architecture"}, indent=1))
