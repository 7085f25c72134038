"""Trains the cells that `search.py` found from scratch: drop path, auxiliary head, cosine; then tests them.

    python examples/darts/retrain.py --out runs/darts

The authors' recipe (quark0/darts, cnn/train.py) is 600 epochs of all of CIFAR-10's training images, batches
of 96, 36 channels and 20 cells, SGD at 0.025 with a cosine to 0, weight decay 3e-4, gradients clipped at 5,
cutout, an auxiliary head whose loss counts 0.4, and drop path that rises from 0 to 0.2:

    retrain.py --channels 36 --cells 20 --epochs 600 --batch-size 96 --accelerator gpu

Writes `subnet.pt`, `subnet.onnx` and `retrain.json`. --architecture FILE trains another network of the space
in the same way, into --into; --published darts-v2 one of the paper's. Departures: the data's own
augmentation, and what has one dimension has no weight decay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from hwnas import ModelSpace
from hwnas.classification import Classification
from hwnas.data import describe, load_data, retrain_dataloader
from hwnas.export import accuracy, export_onnx
from hwnas.run_folder import read_json, write_json
from hwnas.spaces import DARTSCells
from hwnas.spaces.drop_path import set_drop_path
from profilers import count_macs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/darts"), help="where search.py wrote")
parser.add_argument("--architecture", type=Path, help="in place of the one that was found")
parser.add_argument(
    "--published", choices=["darts-v1", "darts-v2"], help="in place of the one that was found"
)
parser.add_argument("--into", type=Path, help="where to write, in place of --out")
parser.add_argument("--channels", type=int, default=16)
parser.add_argument("--cells", type=int, default=6)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=96)
parser.add_argument("--batches", type=int, help="of each epoch; default: all")
parser.add_argument("--lr", type=float, default=0.025)
parser.add_argument("--drop-path", type=float, default=0.2, help="at the end")
parser.add_argument("--auxiliary-weight", type=float, default=0.4)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--smoke", action="store_true", help="two epochs of three batches: does it run?")
args = parser.parse_args()
if args.smoke:
    args.channels, args.cells, args.epochs, args.batch_size, args.batches = 4, 3, 2, 16, 3
into = args.into or args.out


class RisingDropPath(pl.Callback):
    """From 0 in proportion to the epochs, as in cnn/train.py."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        set_drop_path(pl_module, args.drop_path * trainer.current_epoch / args.epochs)


searched = read_json(args.out / "search.json", "search")
pl.seed_everything(searched["seed"], verbose=False)
folder, seed = searched["data_folder"], searched["seed"]
data = load_data(searched["data"], folder=folder, batch_size=args.batch_size, seed=seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
sizes = {"channels": args.channels, "cells": args.cells}
larger = DARTSCells(facts.num_classes, facts.input_shape[0], **sizes, pooling_norm=False, auxiliary=True)
space = ModelSpace(larger)
architecture = read_json(args.architecture or args.out / "architecture.json", "architecture")
if args.published:
    architecture = DARTSCells.published[args.published].architecture
architecture = space.validate(architecture)
subnet = space.freeze(architecture)

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
    subnet,
    facts.num_classes,
    lr=args.lr,
    schedule="cosine",
    weight_decay=3e-4,
    label_smoothing=0.0,
    auxiliary_weight=args.auxiliary_weight,
)
trainer.fit(module, retrain_dataloader(data), data.val_dataloader())
data.setup("test")
(tested,) = trainer.test(module, data.test_dataloader(), verbose=False)
if trainer.is_global_zero:  # one process of several writes
    subnet.cpu().eval()
    subnet.auxiliary = None  # it has done its work
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
    write_json(into / "retrain.json", {**report, **sizes, "epochs": args.epochs})
    print(json.dumps({name: report[name] for name in report if name != "architecture"}, indent=1))
