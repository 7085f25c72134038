from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from hwnas.classification import Classification


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


def batches(count: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count * 4, 1, 8, 8, generator=generator)
    labels = (images.mean(dim=(1, 2, 3)) > 0).long()
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=4)  # type: ignore[arg-type]  # a list is a dataset


def fitted(module: Classification, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)
    trainer.fit(module, batches(), batches())
    return trainer


def test_training_learns_and_logs_loss_and_accuracy() -> None:
    trainer = fitted(Classification(network(), 2, lr=0.05), max_epochs=10)
    assert {"train_loss", "train_acc", "val_loss", "val_acc"} <= trainer.callback_metrics.keys()
    assert trainer.callback_metrics["val_acc"] > 0.9


def test_logged_accuracy_is_the_share_that_is_right() -> None:
    module = Classification(network(), 2)
    trainer = fitted(module, max_epochs=1)
    module.eval()
    with torch.no_grad():
        right = [module(images).argmax(1) == labels for images, labels in batches()]
    expected = torch.cat(right).float().mean()
    assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(float(expected))
    found = trainer.test(module, batches(), verbose=False)
    assert found[0]["test_acc"] == pytest.approx(float(expected))


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.found.append(optimizer.param_groups[0]["lr"])


def test_one_cycle_warms_up_and_ends_near_zero_and_constant_stays() -> None:
    cycle, constant = Rates(), Rates()
    fitted(Classification(network(), 2, lr=0.2), max_epochs=4, callbacks=[cycle])
    assert max(cycle.found) == pytest.approx(0.2, rel=0.05)
    assert cycle.found[0] < cycle.found[1]
    assert cycle.found[-1] < 1e-3
    fitted(Classification(network(), 2, lr=0.2, schedule="constant"), max_epochs=1, callbacks=[constant])
    assert set(constant.found) == {0.2}


def test_biases_and_normalisation_do_not_decay() -> None:
    module = Classification(network(), 2, schedule="constant")
    decayed, others = module.configure_optimizers().param_groups
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(module.parameters()))


def test_frozen_parameters_are_not_optimised() -> None:
    module = Classification(network(), 2, schedule="constant")
    module.network[0].weight.requires_grad_(False)
    groups = module.configure_optimizers().param_groups
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_inputs_need_not_be_images() -> None:
    assert Classification(nn.Linear(5, 3), 3)(torch.randn(4, 5)).shape == (4, 3)


def test_label_smoothing_is_in_training_alone() -> None:
    scores, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([0])
    module = Classification(network(), 2, label_smoothing=0.3)
    expected = torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.3)
    assert torch.equal(module.training_loss(scores, labels), expected)
    assert module.evaluation_loss(scores, labels) < expected


def test_distillation_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    taught = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    module = Classification(network(), 4, temperature=3.0)
    (found,) = torch.autograd.grad(module.imitation_loss(scores, taught), scores)
    # Equation 2, (q - p) / T for a case's cross entropy with soft targets, times T^2, mean over cases.
    expected = 3.0 * (torch.softmax(scores / 3, 1) - torch.softmax(taught / 3, 1)) / 6
    torch.testing.assert_close(found, expected.detach())
    assert float(module.imitation_loss(taught, taught)) == pytest.approx(0.0, abs=1e-12)


def test_soft_targets_are_taken_at_every_position() -> None:
    scores, taught = torch.randn(2, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    module = Classification(network(), 3)
    flat = [t.movedim(1, -1).reshape(-1, 3) for t in (scores, taught)]
    torch.testing.assert_close(module.imitation_loss(scores, taught), module.imitation_loss(*flat))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"label_smoothing": -0.1}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1 and temperature above 0; got"):
        Classification(network(), 2, **options)  # type: ignore[arg-type]  # floats are all it takes by these names


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_auxiliary_scores_add_their_loss_in_training_alone() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

        def forward(self, inputs: torch.Tensor) -> object:
            scores = tuple(head(inputs) for head in self.heads)
            return scores if self.training else scores[0]

    module = Classification(TwoHeads(), 3, auxiliary_weight=0.25)
    inputs, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    first, second = (module.training_loss(head(inputs), labels) for head in module.network.heads)
    torch.testing.assert_close(module.training_step((inputs, labels), 0), first + 0.25 * second)
    module.eval()
    module.validation_step((inputs, labels), 0)
