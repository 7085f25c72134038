"""Trains the network that `search.py` found on from the supernet's weights (fine-tuning), and tests it.

    python examples/fbnet_pfld/retrain.py --data data/106points --out runs/fbnet_pfld

The recipe of NNI's example (microsoft/nni, examples/nas/legacy/oneshot/pfld/retrain.py): the weights that the
supernet has for the chosen blocks, then training on all but the selection; there 300 epochs at batches of 256
(give --epochs 300 --batch-size 256), here AdamW with one cycle and the wing loss. Writes `subnet.pt` and
`retrain.json`. With --architecture FILE another network of the space is trained in the same way, into --into.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

import pytorch_lightning as pl
import torch
from faces import POINTS, Faces
from pytorch_lightning.loggers import CSVLogger

from hwnas import ModelSpace
from hwnas.landmarks import Landmarks
from hwnas.recalibrate import recalibrate
from hwnas.run_folder import read_json, write_json
from hwnas.spaces import PFLD

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path("data/106points"))
parser.add_argument("--out", type=Path, default=Path("runs/fbnet_pfld"), help="where search.py wrote")
parser.add_argument("--architecture", type=Path, help="in place of the one that was found")
parser.add_argument("--into", type=Path, help="where to write, in place of --out")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--smoke", action="store_true", help="one epoch: does it run?")
args = parser.parse_args()
if args.smoke:
    args.epochs, args.batch_size = 1, 8
into = args.into or args.out

searched = read_json(args.out / "search.json", "search")
pl.seed_everything(searched["seed"], verbose=False)
make, size = (PFLD.small, 28) if searched["small"] else (PFLD, 112)
space = ModelSpace(make(num_classes=2 * POINTS, in_channels=3, pose=True))
space.load_state_dict(torch.load(args.out / "supernet.pt", weights_only=True))
architecture = space.validate(read_json(args.architecture or args.out / "architecture.json", "architecture"))
data = Faces(args.data, size, args.batch_size, synthetic=0, workers=args.workers, seed=searched["seed"])
data.setup()

subnet = space.freeze(architecture)
trainer = pl.Trainer(
    max_epochs=args.epochs,
    accelerator=args.accelerator,
    devices=args.devices,
    logger=CSVLogger(into, name="retrain", version=""),
    enable_checkpointing=False,
    log_every_n_steps=1,
)
module = Landmarks(subnet, pixels=size, lr=args.lr)
trainer.fit(module, data.retrain_dataloader(), data.val_dataloader())
recalibrate(subnet.cpu(), islice(data.retrain_dataloader(), 20))
(tested,) = trainer.test(module, data.test_dataloader(), verbose=False)
if not trainer.is_global_zero:
    raise SystemExit  # one process goes on

torch.save(subnet.cpu().state_dict(), into / "subnet.pt")
report = {"architecture": architecture, "test_nme": tested["test_nme"], "epochs": args.epochs}
write_json(into / "retrain.json", report)
print(json.dumps(report, indent=1))
