"""DARTS: differentiable search of a normal and a reduction cell (arXiv 1806.09055), of first or second order.

    python examples/darts/search.py --data fashion-mnist --order 1 --out runs/darts
    python examples/darts/retrain.py --out runs/darts

The authors' recipe (quark0/darts, cnn/train_search.py) is 50 epochs of CIFAR-10, half of the training images
for the weights and half for the architecture, batches of 64, 16 channels and 8 cells, SGD at 0.025 with a
cosine to 0.001, weight decay 3e-4, gradients clipped at 5, and Adam at 3e-4 for the architecture:

    search.py --data cifar10 --data-folder data --channels 16 --cells 8 --epochs 50 --batch-size 64
        --arch-lr 3e-4 --order 2 --accelerator gpu

The defaults are a search of minutes on two cores. --max-macs, in multiply-adds of the network that is
searched, bounds the answer; so does --latency-filter, by a device's lookup table of what `retrain.py` trains
with the same --channels and --cells; a file that is absent is measured on this machine first. Departures: the
cosine ends at 0, and what has one dimension has no weight decay.
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
from hwnas.data import arch_dataloader, describe, load_data
from hwnas.latency_table import build_latency_table
from hwnas.run_folder import write_json
from hwnas.spaces import DARTSCells
from hwnas.strategies import DARTS
from lookup_tables import LookupTable, SessionSettings
from profilers import FlopsProfiler, LatencyProfiler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="fashion-mnist", help="by name, or my_module:my_datamodule")
parser.add_argument("--data-folder", help="where the data's files lie")
parser.add_argument("--out", type=Path, default=Path("runs/darts"))
parser.add_argument("--order", type=int, choices=[1, 2], default=1)
parser.add_argument("--max-macs", type=float, help="the most multiply-adds of the answer")
parser.add_argument("--latency-filter", type=Path, metavar="TABLE.json", help="of the device")
parser.add_argument("--max-latency", type=float, help="in ms by that table; default: amid the extremes")
parser.add_argument("--channels", type=int, default=8)
parser.add_argument("--cells", type=int, default=3)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--warmup-epochs", type=int, default=1, help="in which the architecture rests")
parser.add_argument("--batch-size", type=int, default=96)
parser.add_argument("--batches", type=int, help="of each epoch; default: all")
parser.add_argument("--lr", type=float, default=0.025)
parser.add_argument("--arch-lr", type=float, default=0.01, help="a short search needs more than the authors'")
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="digits, three batches: does it run?")
args = parser.parse_args()
if args.latency_filter is None and args.max_latency is not None:
    parser.error("--max-latency is by a device's table: give --latency-filter, too")
if args.smoke:
    args.data, args.channels, args.epochs, args.warmup_epochs = "digits", 4, 1, 0
    args.batch_size, args.batches = 16, 3

pl.seed_everything(args.seed, verbose=False)
data = load_data(args.data, folder=args.data_folder, batch_size=args.batch_size, seed=args.seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
sizes = facts.num_classes, facts.input_shape[0], args.channels, args.cells
space, example = ModelSpace(DARTSCells(*sizes)), torch.zeros(1, *facts.input_shape)
print(f"{space.size:.3g} networks")

limit = {}
if args.max_macs is not None:
    limit[FlopsProfiler(space, example)] = args.max_macs
if (path := args.latency_filter) is not None:
    trained = ModelSpace(DARTSCells(*sizes, pooling_norm=False))
    if not path.exists():
        settings, count = SessionSettings(), 3 if args.smoke else 32
        build_latency_table(
            trained, example, path, name="darts", settings=settings, method="profiled", subnets=count
        )
    latency = LatencyProfiler(trained, example, LookupTable.load(path), allow_other_device=True)
    limit[latency] = sum(latency.cost.bounds()) / 2 if args.max_latency is None else args.max_latency
    print(f"at most {limit[latency]:.4f} ms")

strategy = DARTS(
    args.arch_lr,
    args.order,
    arch_dataloader=arch_dataloader(data),
    warmup_epochs=args.warmup_epochs,
    seed=args.seed,
)
trainer = pl.Trainer(
    max_epochs=args.epochs,
    limit_train_batches=args.batches,
    limit_val_batches=args.batches,
    accelerator=args.accelerator,
    devices=args.devices,
    gradient_clip_val=5.0,
    callbacks=[strategy],
    logger=CSVLogger(args.out, name="search", version=""),
    enable_checkpointing=False,
    log_every_n_steps=1,
)
module = Classification(
    space, facts.num_classes, lr=args.lr, schedule="cosine", weight_decay=3e-4, label_smoothing=0.0
)
trainer.fit(module, datamodule=data)

architecture = strategy.architecture(max_cost=limit or None)
genotype = DARTSCells.genotype_of(architecture)
print(json.dumps(genotype))
write_json(args.out / "architecture.json", architecture)
kept = {name: getattr(args, name) for name in ("data", "data_folder", "order", "smoke", "seed")}
write_json(args.out / "search.json", {**kept, "genotype": genotype})
