"""ENAS: a controller learns to draw good paths of a shared network (arXiv 1802.03268), macro or micro space.

    python examples/enas/search.py --space macro --data fashion-mnist --out runs/enas
    python examples/enas/retrain.py --out runs/enas

The authors' recipes (melodyguan/enas, scripts/cifar10_macro_search.sh and cifar10_micro_search.sh) are on
CIFAR-10, with a controller that makes 50 (macro) or 30 (micro) updates after each epoch, each of 20 or 10
episodes, at a learning rate of 1e-3 or 3.5e-3:

    search.py --space macro --data cifar10 --data-folder data --channels 36 --depth 12 --epochs 310
        --batch-size 128 --updates 50 --episodes 20 --arch-lr 1e-3 --accelerator gpu
    search.py --space micro --data cifar10 --data-folder data --channels 20 --depth 6 --epochs 150
        --batch-size 160 --updates 30 --episodes 10 --arch-lr 3.5e-3 --accelerator gpu

--latency-filter bounds all that is drawn and returned, by a device's lookup table of the searched form; an
absent one is measured on this machine first. --min-latency keeps the search near that bound: weights that
were trained for minutes, not hours, rank small networks first. --depth is layers (macro), or cells besides
the two that reduce (micro); without it and --channels, the space has its small variant's. Departures: one
cosine in place of several with restarts, and no auxiliary head in the search.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from enas_space import make_space
from pytorch_lightning.loggers import CSVLogger

from hwnas.classification import Classification
from hwnas.data import arch_dataloader, describe, load_data
from hwnas.latency_table import build_latency_table
from hwnas.run_folder import write_json
from hwnas.strategies import ENAS
from lookup_tables import LookupTable, SessionSettings
from profilers import LatencyProfiler, RangeProfilerFilter

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--space", choices=["macro", "micro"], default="macro")
parser.add_argument("--data", default="fashion-mnist", help="by name, or my_module:my_datamodule")
parser.add_argument("--data-folder", help="where the data's files lie")
parser.add_argument("--out", type=Path, default=Path("runs/enas"))
parser.add_argument("--latency-filter", type=Path, metavar="TABLE.json", help="of the device")
parser.add_argument("--max-latency", type=float, help="in ms by that table; default: amid the extremes")
parser.add_argument("--min-latency", type=float, help="in ms: see above")
parser.add_argument("--channels", type=int, help="of all layers, or of the first cells' nodes")
parser.add_argument("--depth", type=int, help="layers, or cells besides the two that reduce")
parser.add_argument("--nodes", type=int, help="of a cell")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--warmup-epochs", type=int, default=1, help="in which the controller rests")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--batches", type=int, help="of each epoch; default: all")
parser.add_argument("--updates", type=int, default=30, help="of the controller, after an epoch")
parser.add_argument("--episodes", type=int, default=10, help="of an update")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--arch-lr", type=float, default=5e-3, help="a short search needs more than the authors'")
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="digits, three batches: does it run?")
args = parser.parse_args()
if args.latency_filter is None and (args.max_latency, args.min_latency) != (None, None):
    parser.error("--max-latency and --min-latency are by a device's table: give --latency-filter, too")
if args.smoke:
    args.data, args.channels, args.depth, args.nodes = "digits", 4, 3, 2
    args.epochs, args.warmup_epochs, args.batch_size, args.batches = 1, 0, 16, 3
    args.updates, args.episodes = 2, 2

pl.seed_everything(args.seed, verbose=False)
data = load_data(args.data, folder=args.data_folder, batch_size=args.batch_size, seed=args.seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
space = make_space(args.space, facts, args.channels, args.depth, args.nodes)
print(f"{space.size:.3g} networks")

limits = []
if (path := args.latency_filter) is not None:
    example, subnets = torch.zeros(1, *facts.input_shape), 3 if args.smoke else 32
    if not path.exists():
        name, settings = f"enas-{args.space}", SessionSettings()
        build_latency_table(
            space, example, path, name=name, settings=settings, method="profiled", subnets=subnets
        )
    latency = LatencyProfiler(space, example, LookupTable.load(path), allow_other_device=True)
    most = sum(latency.cost.bounds()) / 2 if args.max_latency is None else args.max_latency
    limits.append(RangeProfilerFilter(latency, args.min_latency, most))
    print(limits[0])

strategy = ENAS(
    args.arch_lr,
    args.episodes,
    args.updates,
    arch_dataloader=arch_dataloader(data),
    filter=limits,
    n_candidates=2 if args.smoke else 10,
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
    space, facts.num_classes, lr=args.lr, schedule="cosine", weight_decay=2e-4, label_smoothing=0.0
)
trainer.fit(module, datamodule=data)

architecture = strategy.architecture()
print(architecture)
write_json(args.out / "architecture.json", architecture)
names = ("space", "data", "data_folder", "channels", "depth", "nodes", "seed")
write_json(args.out / "search.json", {name: getattr(args, name) for name in names})
