"""Single-path one-shot search (SPOS, arXiv 1904.00420), step 1 of 3: trains the supernet by uniform paths.

    python examples/spos/supernet.py --data fashion-mnist --out runs/spos
    python examples/spos/search.py --out runs/spos --max-macs 1.2e6
    python examples/spos/evaluation.py --out runs/spos

Each step trains one network, drawn uniformly from the space, or from those of at most --max-macs
multiply-adds. Blocks and their channels are searched together; --search blocks leaves the channels as they
were published.

The authors' recipe (paper, section 4; megvii-model/SinglePathOneShot) is 150,000 steps of ImageNet, 120
epochs, at batches of 1024, SGD at 0.5 falling to 0 in a line, weight decay 4e-5 and label smoothing 0.1:

    supernet.py --data imagenet-folder --data-folder imagenet --epochs 120 --batch-size 128 --lr 0.5
        --accelerator gpu --devices 8 --strategy ddp_find_unused_parameters_true

where batches are of each device. Images under 64x64 are searched in the space's small variant. Departure:
BatchNorm has a scale and a shift in the supernet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from spos_space import make_space

from hwnas.classification import Classification
from hwnas.data import describe, load_data
from hwnas.run_folder import write_json
from hwnas.strategies import RandomOneShot
from profilers import FlopsProfiler, RangeProfilerFilter

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="fashion-mnist", help="by name, or my_module:my_datamodule")
parser.add_argument("--data-folder", help="where the data's files lie")
parser.add_argument("--out", type=Path, default=Path("runs/spos"))
parser.add_argument("--search", choices=["both", "blocks"], default="both")
parser.add_argument("--max-macs", type=float, help="the most that a trained path may have")
parser.add_argument("--epochs", type=int, default=15)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--batches", type=int, help="of each epoch; default: all")
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--strategy", default="auto", help="Lightning's, for several devices")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="digits, two layers, one epoch: does it run?")
args = parser.parse_args()
if args.smoke:
    args.data, args.epochs, args.batch_size = "digits", 1, 64

pl.seed_everything(args.seed, verbose=False)
data = load_data(args.data, folder=args.data_folder, batch_size=args.batch_size, seed=args.seed)
data.prepare_data()
data.setup("fit")
facts = describe(data)
space = make_space(facts, args.search, args.smoke)
print(f"{space.size:,} networks")

within = None
if args.max_macs is not None:
    within = RangeProfilerFilter(FlopsProfiler(space, torch.zeros(1, *facts.input_shape)), max=args.max_macs)


def to_zero(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


trainer = pl.Trainer(
    max_epochs=args.epochs,
    limit_train_batches=args.batches,
    accelerator=args.accelerator,
    devices=args.devices,
    strategy=args.strategy,
    callbacks=[RandomOneShot(filter=within, seed=args.seed)],
    logger=CSVLogger(args.out, name="supernet", version=""),
    enable_checkpointing=False,
    log_every_n_steps=1,
)
module = Classification(space, facts.num_classes, lr=args.lr, schedule=to_zero, weight_decay=4e-5)
trainer.fit(module, datamodule=data)
if not trainer.is_global_zero:
    raise SystemExit  # one process of several writes
torch.save(space.cpu().state_dict(), args.out / "supernet.pt")
kept = {name: getattr(args, name) for name in ("data", "data_folder", "search", "smoke", "seed")}
write_json(args.out / "supernet.json", kept)
