from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hwnas.regression import Regression


def batches(shape: tuple[int, ...] = (2,), whole: bool = False) -> DataLoader[Any]:
    inputs = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    targets = (inputs @ torch.tensor([[1.0, -1.0], [0.0, 2.0], [3.0, 0.5]]))[:, : shape[-1] if shape else 1]
    targets = targets.reshape(32, *shape)
    pairs = list(zip(inputs, targets.round().long() if whole else targets, strict=True))
    return DataLoader(pairs, batch_size=8)  # type: ignore[arg-type]  # a list is a dataset


def fitted(module: Regression, data: DataLoader[Any], max_epochs: int = 1) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_checkpointing=False, max_epochs=max_epochs, **quiet)
    trainer.fit(module, data, data)
    return trainer


def linear(outputs: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, outputs)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", nn.SmoothL1Loss()])
def test_training_learns_and_logs_loss_and_error(loss: Any) -> None:
    trainer = fitted(Regression(linear(), loss=loss, lr=0.1), batches(), 30)
    assert {"train_loss", "train_mae", "val_loss", "val_mae"} == trainer.callback_metrics.keys()
    assert trainer.callback_metrics["val_mae"] < 0.2  # 2.3 for a guess of 0


def test_losses_are_those_of_torch() -> None:
    outputs, targets = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    for name, expected in (("mse", F.mse_loss), ("mae", F.l1_loss), ("huber", F.huber_loss)):
        module = Regression(linear(), loss=name)
        for found in (module.training_loss, module.evaluation_loss, module.imitation_loss):
            assert torch.equal(found(outputs, targets), expected(outputs, targets))
    doubled = Regression(linear(), loss=lambda found, wanted: 2 * F.mse_loss(found, wanted))
    assert torch.equal(doubled.training_loss(outputs, targets), 2 * F.mse_loss(outputs, targets))


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_whole_numbers_are_targets_too(loss: str) -> None:
    trainer = fitted(Regression(linear(1), loss=loss, lr=0.1), batches((1,), whole=True), 5)
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_targets_of_another_shape_are_refused_rather_than_broadcast() -> None:
    with pytest.raises(ValueError, match=r"the shape of the targets; got \(8, 1\) and \(8,\)"):
        fitted(Regression(linear(1)), batches(()))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="loss is 'mse', 'mae', 'huber' or a function; got 'l7'"):
        Regression(linear(), loss="l7")


def test_one_axis_is_enough() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear(1)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.linear(x)
            return scores.squeeze(1)

    assert fitted(Regression(Flat(), lr=0.1), batches(()), 30).callback_metrics["val_mae"] < 0.3
