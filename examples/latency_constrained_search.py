"""The whole library on one page: a space, this machine's table, a search within a latency, and the proof.

python examples/latency_constrained_search.py        # Fashion-MNIST; some ten minutes on two cores
"""

import argparse
from pathlib import Path

import torch
from pytorch_lightning import Trainer

from hwnas import ModelSpace
from hwnas.certificate import certify
from hwnas.classification import Classification
from hwnas.data import arch_dataloader, load_data, retrain_dataloader
from hwnas.export import accuracy, export_onnx
from hwnas.latency_table import build_latency_table
from hwnas.spaces import SmallMobileNet
from hwnas.strategies import Proxyless
from lookup_tables import SessionSettings
from profilers import LagrangianPenalty, LatencyProfiler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/latency_constrained_search"))
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="1")
parser.add_argument("--smoke", action="store_true", help="small digits, few blocks: does it run?")
args = parser.parse_args()
data = load_data("digits" if args.smoke else "fashion-mnist")
data.prepare_data()
data.setup()
few = {"widths": ((8, 16),), "depths": (1,)} if args.smoke else {}
space = ModelSpace(SmallMobileNet(num_classes=10, **few))  # or any module of yours with choices in it
example = torch.zeros(1, 1, 28, 28)

# What each block costs here, under the settings of the deployed session, calibrated on whole networks.
table = build_latency_table(
    space, example, args.out / "table.json", name="tour",
    settings=SessionSettings(threads=1), subnets=3 if args.smoke else 32,
)  # fmt: skip
latency = LatencyProfiler(space, example, table)
budget_ms = sum(latency.cost.bounds()) / 2  # half-way between the cheapest and the dearest network

strategy = Proxyless(penalty=LagrangianPenalty(latency, budget_ms), arch_dataloader=arch_dataloader(data))
lightning = {"accelerator": args.accelerator, "devices": args.devices, "default_root_dir": args.out}
lightning["max_epochs"] = 1 if args.smoke else 4
lightning["strategy"] = "auto" if args.devices == "1" else "ddp_find_unused_parameters_true"
Trainer(callbacks=[strategy], **lightning).fit(Classification(space, 10), datamodule=data)
architecture = strategy.architecture(max_cost={latency: budget_ms})  # exactly within it, by the table
subnet = space.freeze(architecture)  # plain torch.nn, weights inherited
Trainer(**lightning).fit(Classification(subnet, 10), retrain_dataloader(data), data.val_dataloader())

file = export_onnx(subnet.cpu().eval(), example, args.out / "subnet.onnx")
data.setup("test")
right = accuracy(file, data.test_dataloader())
proof = certify(file, subnet, latency, architecture, budget_ms, [example], test_accuracy=right)
print(f"{architecture}\naccuracy {right:.4f}; {'passed' if proof.passed else 'not passed'}: {proof.reason}")
