"""ProxylessNAS: path-binarised search of a mobile network for a latency on a device (arXiv 1812.00332).

    python examples/proxyless/search.py --data fashion-mnist --out runs/proxyless
    python examples/proxyless/retrain.py --out runs/proxyless

Latency comes from a lookup table: --device TABLE.json of any device, as `hwnas table build` and `hwnas table
import` write it; without one, this machine is measured. --ref-latency is in milliseconds. The losses are of
the authors' code (mit-han-lab/proxylessnas, search/nas_manager.py), with CE the cross entropy:

    mul#log      alpha * CE * (log E / log ref) ^ beta     E: expected latency, ref: --ref-latency,
    add#linear   CE + lambda * (E - ref) / ref             in us: logarithms are positive under a ms

The authors' recipe is 120 epochs of ImageNet after 40 of warm-up, batches of 256, SGD at 0.025 with a
cosine, weight decay 4e-5, label smoothing 0.1, and Adam at 0.001 without momentum for the architecture:

    search.py --data imagenet-folder --data-folder imagenet --epochs 160 --warmup-epochs 40 --batch-size 64
        --lr 0.025 --arch-lr 0.001 --device pixel1.json --ref-latency 80 --accelerator gpu --devices 4
        --strategy ddp_find_unused_parameters_true

Batches are of each device. Images under 64x64 get the space's small variant. Departures: an architecture
step goes before each weight step, not before every fifth; the answer is the most probable network within
--ref-latency, exactly.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytorch_lightning as pl
import torch
from proxyless_space import make_space
from pytorch_lightning.loggers import CSVLogger

from hwnas.classification import Classification
from hwnas.data import arch_dataloader, describe, load_data
from hwnas.latency_table import build_latency_table
from hwnas.run_folder import write_json
from hwnas.strategies import Proxyless
from lookup_tables import LookupTable, SessionSettings
from profilers import ExpectationProfilerPenalty, FBNetPenalty, LatencyProfiler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="fashion-mnist", help="by name, or my_module:my_datamodule")
parser.add_argument("--data-folder", help="where the data's files lie")
parser.add_argument("--out", type=Path, default=Path("runs/proxyless"))
parser.add_argument("--device", type=Path, help="a latency table; default: this machine is measured")
parser.add_argument("--ref-latency", type=float, help="in ms; default: amid the cheapest and the dearest")
parser.add_argument("--grad-reg-loss-type", choices=["mul#log", "add#linear"], default="mul#log")
parser.add_argument("--grad-reg-loss-alpha", type=float, default=0.2)
parser.add_argument("--grad-reg-loss-beta", type=float, default=0.3)
parser.add_argument("--grad-reg-loss-lambda", type=float, default=0.1)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--warmup-epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--batches", type=int, help="of each epoch; default: all")
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--arch-lr", type=float, default=0.01)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--strategy", default="auto", help="Lightning's, for several devices")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="digits, three layers, two epochs: does it run?")
args = parser.parse_args()
if args.smoke:
    args.data, args.epochs, args.warmup_epochs, args.batch_size = "digits", 2, 1, 64

pl.seed_everything(args.seed, verbose=False)
data = load_data(args.data, folder=args.data_folder, batch_size=args.batch_size, seed=args.seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
space = make_space(facts, args.smoke)
example = torch.zeros(1, *facts.input_shape)

path = args.out / "latency_table.json"
if args.device is not None:
    LookupTable.load(args.device).save(path)
else:
    count = 3 if args.smoke else 32
    build_latency_table(space, example, path, name="proxylessnas", settings=SessionSettings(), subnets=count)
latency = LatencyProfiler(space, example, LookupTable.load(path), allow_other_device=args.device is not None)
low, high = latency.cost.bounds()
reference = (low + high) / 2 if args.ref_latency is None else args.ref_latency
print(f"reference {reference:.4f} ms; the space spans {low:.4f} to {high:.4f} ms")

if args.grad_reg_loss_type == "add#linear":
    penalty = ExpectationProfilerPenalty(latency, reference, scale=args.grad_reg_loss_lambda)
else:  # FBNet's penalty, with the logarithm of the reference in its factor
    alpha = args.grad_reg_loss_alpha / math.log(1000 * reference) ** args.grad_reg_loss_beta
    penalty = FBNetPenalty(latency, reference, alpha, args.grad_reg_loss_beta)

strategy = Proxyless(
    arc_learning_rate=args.arch_lr,
    penalty=penalty,
    arch_dataloader=arch_dataloader(data),
    warmup_epochs=args.warmup_epochs,
    seed=args.seed,
)
trainer = pl.Trainer(
    max_epochs=args.epochs,
    limit_train_batches=args.batches,
    accelerator=args.accelerator,
    devices=args.devices,
    strategy=args.strategy,
    callbacks=[strategy],
    logger=CSVLogger(args.out, name="search", version=""),
    enable_checkpointing=False,
    log_every_n_steps=1,
)
module = Classification(space, facts.num_classes, lr=args.lr, schedule="cosine", weight_decay=4e-5)
trainer.fit(module, datamodule=data)

architecture = strategy.architecture()
print(f"{latency.profile(architecture):.4f} ms by the table: {architecture}")
write_json(args.out / "architecture.json", architecture)
kept = {name: getattr(args, name) for name in ("data", "data_folder", "smoke", "seed")}
write_json(args.out / "search.json", {**kept, "budget_ms": reference})
