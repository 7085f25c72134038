"""Searches with every strategy on two processes; each rank writes down what it ends with.

python -m tests.hwnas.strategies.ddp_run FOLDER NAME...
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from profilers import LagrangianPenalty
from tests.hwnas.strategies.tiny import EVERY, TableProfiler, classification, loaders, space_of, trainer


class WriteDown(pl.Callback):
    """Weights, policy, answer and metrics of this rank, and the paths that it trained."""

    def __init__(self, strategy: Any, path: Path) -> None:
        self.strategy = strategy
        self.path = path
        self.paths: list[Any] = []

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        gates = space_of(module).gates
        assert gates is not None
        self.paths.append([gate.picked for gate in gates.values()])

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found = {
            "weights": dict(module.named_parameters()),
            "policy": self.strategy.policy_state(),
            "answer": self.strategy.architecture(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "paths": self.paths,
        }
        torch.save(found, f"{self.path}-{trainer.global_rank}.pt")


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:
        module = classification()
        penalty = LagrangianPenalty(TableProfiler(space_of(module)), baseline=4.0)
        strategy = EVERY[name](arc_learning_rate=0.1, penalty=penalty)
        several = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True, start_method="fork")
        made = trainer(
            strategy, WriteDown(strategy, folder / name), max_epochs=2, devices=2, strategy=several
        )
        made.fit(module, *loaders())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
