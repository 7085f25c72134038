"""Which batches a search sees: its own ones in order, and the trainer's as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hwnas.classification import Classification
from hwnas.strategies import DARTS
from tests.hwnas.strategies.tiny import Noisy, classification, loaders, space_of, trainer


class Seen(pl.Callback):
    """Sums of the training batches, in order."""

    def __init__(self) -> None:
        self.batches: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(float(_first_tensor(batch).sum()))


class Numbered(DataLoader[Any]):
    """An unshuffled loader that says which batches were asked for."""

    def __init__(self, batches: int) -> None:
        super().__init__(Noisy(8 * batches, 3, noise=0.0), batch_size=8)
        self.first = [float(images[0].sum()) for images, _ in super().__iter__()]
        self.asked: list[int] = []

    def __iter__(self) -> Any:
        for images, labels in super().__iter__():
            self.asked.append(self.first.index(float(images[0].sum())))
            yield images, labels


def _first_tensor(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def training(batches: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(8 * batches, 1), batch_size=8, shuffle=True, **options)


def fit(strategy: pl.Callback | None, loader: Any, module: Any = None, **options: Any) -> list[float]:
    torch.manual_seed(5)
    np.random.seed(5)
    seen, ckpt_path = Seen(), options.pop("ckpt_path", None)
    callbacks = [seen, *options.pop("callbacks", []), *([] if strategy is None else [strategy])]
    if module is None:
        module = classification(schedule="constant")
        for dropout in (found for found in module.modules() if isinstance(found, nn.Dropout)):
            dropout.p = 0.0  # draws more numbers in a wider network
    trainer(*callbacks, **{"max_epochs": 2, **options}).fit(
        module, loader, DataLoader(Noisy(16, 2, 0.0), batch_size=8), ckpt_path=ckpt_path
    )
    return seen.batches


def test_every_architecture_batch_is_shown_over_several_epochs() -> None:
    batches = Numbered(6)
    fit(DARTS(arch_dataloader=batches), training(4), max_epochs=3)
    assert batches.asked == [0, 1, 2, 3, 4, 5] * 2


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
@pytest.mark.parametrize("at_train_end", [True, False])
def test_resumed_search_goes_on_with_the_next_batches(
    schedule: Any, at_train_end: bool, tmp_path: Path
) -> None:
    def run(ckpt_path: Path | None = None) -> tuple[list[float], Numbered]:
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
        batches, module = Numbered(6), classification(schedule=schedule)
        options = {"callbacks": [saver], "enable_checkpointing": True, "ckpt_path": ckpt_path}
        return fit(DARTS(arch_dataloader=batches), training(4), module, max_epochs=3, **options), batches

    seen, batches = run()
    (tmp_path / "epoch=0.ckpt").rename(tmp_path.parent / "first.ckpt")
    for other in tmp_path.glob("*.ckpt"):
        other.unlink()
    again, more = run(tmp_path.parent / "first.ckpt")
    assert again == seen[4:]
    # The pass that was left is gone through again, up to where it was left.
    assert more.asked[4:] == batches.asked[4:]


def test_training_batches_are_those_without_a_strategy() -> None:
    assert fit(DARTS(), training()) == fit(None, training())


def test_generators_of_the_users_loaders_are_left_alone() -> None:
    def seen(strategy: pl.Callback | None) -> list[float]:
        return fit(strategy, training(generator=torch.Generator().manual_seed(9)))

    assert seen(DARTS()) == seen(None)


def test_architecture_batches_from_a_loader_with_a_generator_depend_on_the_seed_alone() -> None:
    def logits(generator_seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(generator_seed)
        strategy = DARTS(0.1, arch_dataloader=training(generator=generator))
        fit(strategy, training())
        return strategy.logits.state_dict()

    torch.testing.assert_close(logits(1), logits(2), rtol=0, atol=0)


def test_loaders_with_persistent_workers_keep_their_iterators() -> None:
    def seen(strategy: pl.Callback | None) -> list[float]:
        workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
        return fit(strategy, training(**workers))

    assert seen(DARTS(arch_dataloader=training())) == seen(None)


class OfSeveral(pl.LightningModule):
    """Trains on a structure of batches."""

    def __init__(self, inner: Classification) -> None:
        super().__init__()
        self.inner = inner

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch["a"] if isinstance(batch, dict) else batch
        return torch.nn.functional.cross_entropy(self.inner(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.inner(images), labels))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_structures_of_training_loaders_recalibrate_on_structures_of_batches() -> None:
    strategy = DARTS(recalibration_batches=2)
    fit(strategy, {"a": training(), "b": training()}, OfSeveral(classification()))
    assert [sorted(batch) for batch in strategy._training_batches] == [["a", "b"]] * 2


def test_late_validation_still_gives_architecture_batches() -> None:
    strategy = DARTS(0.1)
    fit(strategy, training(), check_val_every_n_epoch=2, num_sanity_val_steps=0)
    assert all(p.max() - p.min() > 0.01 for p in strategy.probabilities().values())


class Answering(OfSeveral):
    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, _ = batch
        expected = space_of(self).freeze(self.answer).eval()(images)
        assert torch.equal(self.inner(images), expected)
        return expected

    predict_step = test_step


def test_trainer_tests_and_predicts_with_the_current_answer() -> None:
    strategy = DARTS(0.3)
    module = Answering(classification())
    made = trainer(strategy)
    made.fit(module, training(), DataLoader(Noisy(16, 2, 0.0), batch_size=8))
    strategy._training_batches = []  # not recalibrated: the space's own statistics
    module.answer = strategy.architecture()
    made.test(module, DataLoader(Noisy(8, 2), batch_size=8), verbose=False)
    made.predict(module, DataLoader(Noisy(8, 2), batch_size=8))
    assert strategy.validated == module.answer
    assert space_of(module)._stand_in is None


def test_data_module_is_no_loader_of_architecture_batches() -> None:
    strategy = DARTS(arch_dataloader=pl.LightningDataModule())  # type: ignore[arg-type]  # on purpose
    with pytest.raises(
        TypeError, match=r"DARTS\(arch_dataloader=…\) takes a loader.*got LightningDataModule"
    ):
        trainer(strategy).fit(classification(), *loaders(1))
