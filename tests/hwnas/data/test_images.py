import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hwnas.data import Augmentation, Digits, Images
from hwnas.data import images as images_module
from hwnas.data.images import Batch, BatchDataset, EpochBatches


def numbered(count: int) -> Images:
    """Image n is all n (mod 256) and has label n."""
    labels = torch.arange(count)
    return Images(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), labels)


def batches_of(count: int = 20, batch_size: int = 6, **options: Any) -> BatchDataset:
    return BatchDataset(numbered(count), torch.arange(count), batch_size, (0.0,), (1.0,), **options)


def labels_of(loader: DataLoader[Batch], epoch: int = 0) -> list[int]:
    assert isinstance(loader.sampler, EpochBatches)
    loader.sampler.set_epoch(epoch)
    return [int(label) for _, labels in loader for label in labels]


class Recorder(LightningModule):
    """Learns nothing to speak of; writes down the batches that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(28 * 28, 10)
        self.seen: list[tuple[int, Tensor]] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        images, labels = batch
        self.seen.append((self.current_epoch, images.clone()))
        return nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("val_mean", batch[0].mean())

    test_step = validation_step

    def predict_step(self, batch: Batch, _: int) -> Tensor:
        return batch[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@given(st.integers(10, 200), st.integers(0, 5), st.sampled_from([(0.45, 0.45, 0.1), (0.2, 0.3, 0.5)]))
def test_parts_are_disjoint_and_cover_the_training_set(
    count: int, seed: int, fractions: tuple[float, float, float]
) -> None:
    data = Digits(seed=seed, fractions=fractions)
    data._loaded = (numbered(count), numbered(3))
    weights, architecture, selection = data.parts()
    assert sorted(torch.cat([weights, architecture, selection]).tolist()) == list(range(count))
    assert len(weights) == round(count * fractions[0])


def test_parts_depend_on_the_seed_alone() -> None:
    first, again, other = (Digits(seed=seed).parts() for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_every_loader_reads_its_own_part() -> None:
    data = Digits(batch_size=1, augmentation=None)
    data._loaded = (numbered(100), numbered(7))
    weights, architecture, selection = (part.tolist() for part in data.parts())
    assert sorted(labels_of(data.train_dataloader())) == sorted(weights)
    assert sorted(labels_of(data.arch_dataloader())) == sorted(architecture)
    assert sorted(labels_of(data.retrain_dataloader())) == sorted(weights + architecture)
    assert labels_of(data.val_dataloader()) == selection
    assert labels_of(data.test_dataloader()) == list(range(7))


def test_batches_are_normalised_to_mean_0_and_deviation_1() -> None:
    data = Digits(augmentation=None)
    pixels, _ = BatchDataset(data.load()[0], torch.arange(1437), 1437, data.mean, data.std)[0]
    assert pixels.mean() == pytest.approx(0, abs=1e-3)  # four digits of mean and std are stated
    assert pixels.std() == pytest.approx(1, abs=1e-3)


@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 3))
def test_an_epoch_holds_every_image_once(
    count: int, size: int, shuffle: bool, drop: bool, epoch: int
) -> None:
    batches = batches_of(count, size, shuffle=shuffle, drop_last=drop)
    labels = [int(label) for number in range(len(batches)) for label in batches[epoch, number][1]]
    assert len(set(labels)) == len(labels)
    assert len(labels) == (count // size * size if drop and count >= size else count)


def test_order_changes_with_epoch_and_seed() -> None:
    orders = {
        tuple(torch.cat([batches[epoch, number][1] for number in range(len(batches))]).tolist())
        for batches in (batches_of(seed=0, shuffle=True), batches_of(seed=1, shuffle=True))
        for epoch in range(3)
    }
    assert len(orders) == 6


def test_item_does_not_depend_on_what_was_read_before() -> None:
    fresh, used = (batches_of(shuffle=True, augmentation=Augmentation()) for _ in range(2))
    for epoch in (3, 0, 1):
        used[epoch, 2]
    assert all(torch.equal(a, b) for a, b in zip(fresh[1, 1], used[1, 1], strict=True))


def test_batch_number_out_of_range_is_an_error() -> None:
    with pytest.raises(IndexError, match=r"must be in 0\.\.3, got 4"):
        batches_of()[0, 4]


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Reference: window of the padded image that starts there."""
    return nn.functional.pad(image, (2, 2, 2, 2))[
        :, down : down + image.shape[1], right : right + image.shape[2]
    ]


def test_augmented_image_is_one_of_the_fifty_that_exist() -> None:
    pixels = torch.randint(256, (64, 2, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = set()
    for image, result in zip(pixels, Augmentation()(pixels, torch.Generator().manual_seed(1)), strict=True):
        found |= {
            (down, right, flip)
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
            if torch.equal(
                result, shifted(image, down, right).flip(-1) if flip else shifted(image, down, right)
            )
        }
    assert len(found) > 25  # 64 draws of 50 equally likely ones leave 36 ± 3 seen
    assert {flip for _, _, flip in found} == {False, True}


def test_augmentation_without_flip_and_shift_leaves_images_as_they_are() -> None:
    pixels = numbered(5).pixels
    assert torch.equal(Augmentation(flip=False, shift=0)(pixels, torch.Generator()), pixels)


def test_augmentation_is_drawn_anew_for_every_batch_and_epoch() -> None:
    batches = batches_of(count=12, augmentation=Augmentation())
    batches.images = Images(
        torch.arange(16).repeat(12, 1).view(12, 1, 4, 4).to(torch.uint8), torch.arange(12)
    )
    items = [batches[epoch, number][0] for epoch in (0, 1) for number in (0, 1)]
    assert all(not torch.equal(a, b) for a, b in pairwise(items))


def test_validation_and_test_images_are_not_augmented() -> None:
    data = Digits()
    pixels, _ = next(iter(data.val_dataloader()))
    expected = data.load()[0].pixels[data.parts()[2][: len(pixels)]] / 255
    torch.testing.assert_close(pixels * data.std[0] + data.mean[0], expected)


def epochs(seen: list[tuple[int, Tensor]], epoch: int) -> list[Tensor]:
    return [images for at, images in seen if at == epoch]


def test_run_resumed_at_an_epoch_boundary_sees_the_same_batches(tmp_path: Path) -> None:
    through, first, resumed = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(through, datamodule=Digits())
    interrupted = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    interrupted.fit(first, datamodule=Digits())
    interrupted.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(
        resumed, datamodule=Digits(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True
    )
    assert {epoch for epoch, _ in resumed.seen} == {2}
    torch.testing.assert_close(epochs(resumed.seen, 2), epochs(through.seen, 2), rtol=0, atol=0)
    assert not torch.equal(epochs(through.seen, 1)[0], epochs(through.seen, 2)[0])


def test_worker_processes_make_the_same_batches() -> None:
    alone, helped = Digits().train_dataloader(), Digits(num_workers=2).train_dataloader()
    for epoch in (0, 1):
        assert labels_of(helped, epoch) == labels_of(alone, epoch)


def test_lightning_tests_and_predicts_on_the_whole_test_set(tmp_path: Path) -> None:
    run, data = trainer(tmp_path, enable_checkpointing=False), Digits()
    run.test(Recorder(), data, verbose=False)
    predicted = run.predict(Recorder(), data)
    assert predicted is not None
    assert torch.equal(torch.cat(predicted), data.load()[1].labels)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_lightning_can_overfit_a_few_batches(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, enable_checkpointing=False, max_epochs=2, overfit_batches=2, limit_val_batches=0).fit(
        recorder, datamodule=Digits()
    )
    torch.testing.assert_close(epochs(recorder.seen, 0), epochs(recorder.seen, 1), rtol=0, atol=0)


@pytest.mark.parametrize(("world", "count"), [(2, 24), (3, 20), (5, 7)])
def test_processes_share_the_batches_out_evenly(
    monkeypatch: pytest.MonkeyPatch, world: int, count: int
) -> None:
    sampler = EpochBatches(batches_of(count))
    dealt = []
    for rank in range(world):
        monkeypatch.setattr(images_module, "_rank_and_world", lambda rank=rank: (rank, world))
        dealt.append([number for _, number in sampler])
        assert len(dealt[-1]) == len(sampler) == math.ceil(len(sampler.batches) / world)
    assert {number for numbers in dealt for number in numbers} == set(range(len(sampler.batches)))


def test_lightning_keeps_our_sampler_under_ddp(tmp_path: Path) -> None:
    run = trainer(tmp_path, enable_checkpointing=False, strategy="ddp", devices=2)
    connector = run._data_connector
    loader = Digits().train_dataloader()
    assert not connector._requires_distributed_sampler(loader)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5)])
def test_fractions_that_are_no_shares_are_refused(fractions: Any) -> None:
    with pytest.raises(ValueError, match="three positive shares"):
        Digits(fractions=fractions)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Digits(batch_size=0)


def test_empty_part_is_refused() -> None:
    data = Digits()
    data._loaded = (numbered(2), numbered(2))
    with pytest.raises(ValueError, match="every part must hold an image"):
        data.parts()


@pytest.mark.parametrize(
    ("pixels", "labels", "text"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), "pixels must be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "pixels must be uint8"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"shape \(2,\)"),
    ],
)
def test_images_of_another_form_are_refused(pixels: Tensor, labels: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Images(pixels, labels)
