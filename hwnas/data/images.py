"""Images for a search: three-way split, whole batches gathered at once, loaders that resume exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lookup_tables.progress import Progress

Batch: TypeAlias = tuple[Tensor, Tensor]


class ImageSource(Protocol):
    """Labelled images, wherever they are. `Images` are in memory, `ImageFiles` in files."""

    @property
    def labels(self) -> Tensor:
        """int64, (images,)."""
        ...

    def __len__(self) -> int: ...

    def read(self, chosen: Tensor, generator: torch.Generator | None) -> Tensor:
        """The pixels of some images, uint8, (chosen, channels, height, width).

        Args:
            chosen: their indices, int64.
            generator: where reading is part of the augmentation (a random crop of a large image); None: as
                they are.
        """
        ...


@dataclass(frozen=True)
class Images:
    """Labelled images as they are stored.

    Attributes:
        pixels: uint8, (images, channels, height, width).
        labels: int64, (images,).
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise ValueError(
                "pixels must be uint8 of shape (images, channels, height, width), "
                f"got {self.pixels.dtype} of shape {tuple(self.pixels.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape ({len(self.pixels)},), "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, chosen: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.pixels[chosen]


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, drawn for each image anew; black (0) comes in at the borders."""

    flip: bool = True
    shift: int = 2

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Mirrored with probability one half and moved by up to ``shift`` pixels in each direction.

        ``pixels``: (batch, channels, height, width), any type; the result has the same shape and type.
        """
        count, _, height, width = pixels.shape
        if self.shift:
            # Every window of the padded image is a view; picking one window an image is the only copy.
            padded = torch.nn.functional.pad(pixels, (self.shift,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            down, right = torch.randint(2 * self.shift + 1, (2, count), generator=generator)
            pixels = windows[torch.arange(count), :, down, right]
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return pixels


class BatchDataset(Dataset[Batch]):
    """Whole batches as items: item ``(epoch, number)`` is a pure function of the arguments given here.

    So a resumed run sees the same batches as one that was not interrupted, in any number of worker
    processes. A plain ``number`` stands for ``(0, number)``: that is what Lightning's ``overfit_batches``
    asks for.

    Args:
        images: the images to choose from.
        part: indices of those that belong here, int64.
        batch_size: images in a batch; the last batch holds the rest, or is left out by ``drop_last``
            (a part smaller than one batch still makes one).
        mean: subtracted from pixels in 0..1, one number a channel.
        std: what they are divided by then.
        seed: of order and augmentation.
        shuffle: a new order for every epoch.
        augmentation: None leaves the images as they are.
    """

    def __init__(
        self,
        images: ImageSource,
        part: Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images = images
        self.part = part
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.augmentation = augmentation
        self.shift = 255 * torch.tensor(mean).view(1, -1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(1, -1, 1, 1))
        self.order_of_epoch = (0, self._draw_order(0))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.part), self.batch_size)
        return whole if self.drop_last and whole else whole + (rest > 0)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        """Images as float32 (batch, channels, height, width), normalised, and labels as int64 (batch,)."""
        epoch, number = (0, index) if isinstance(index, int) else index
        if not 0 <= number < len(self):
            raise IndexError(f"batch number must be in 0..{len(self) - 1}, got {number}")
        if self.order_of_epoch[0] != epoch:
            self.order_of_epoch = (epoch, self._draw_order(epoch))
        chosen = self.order_of_epoch[1][number * self.batch_size :][: self.batch_size]
        if self.augmentation is None:
            pixels = self.images.read(chosen, None)
        else:
            generator = _generator(self.seed, epoch, number + 1)
            pixels = self.augmentation(self.images.read(chosen, generator), generator)
        return pixels.float().sub_(self.shift).mul_(self.scale), self.images.labels[chosen]

    def _draw_order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return self.part
        return self.part[torch.randperm(len(self.part), generator=_generator(self.seed, epoch, 0))]


class EpochBatches(DistributedSampler[tuple[int, int]]):
    """The ``(epoch, number)`` of every batch of an epoch, in turn; several processes share them out.

    Lightning calls ``set_epoch`` on the sampler of every loader before each epoch, also after a resume;
    who iterates over such a loader outside Lightning does the same: ``loader.sampler.set_epoch(epoch)``.
    Being a ``DistributedSampler`` keeps Lightning from putting its own in this place, which would deal out
    plain numbers and so lose the epoch. As there, each process takes every n-th batch, and the first
    batches are dealt again where the number does not divide.
    """

    def __init__(self, batches: BatchDataset) -> None:
        # Rank and world are read when the batches are dealt: a loader may be older than its process group.
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world = _rank_and_world()
        for place in range(len(self)):
            yield self.epoch, (place * world + rank) % len(self.batches)

    def __len__(self) -> int:
        return -(-len(self.batches) // _rank_and_world()[1])


class ImageData(LightningDataModule, ABC):
    """Images, the training set split in three: weights, architecture, selection.

    The split is a permutation drawn from ``seed``. The test set is apart and read by ``test_dataloader``
    alone. Each loader yields ``[images, labels]``: float32 (batch, channels, height, width), normalised by
    ``mean`` and ``std`` of the whole training set, and int64 (batch,).

    Under several processes ``batch_size`` is that of one process, and evaluation sees a few batches twice
    where their number does not divide (as with PyTorch's ``DistributedSampler``): evaluate on one device.

    Args:
        name: as in the command line.
        num_classes: labels run from 0 to ``num_classes - 1``.
        input_shape: (channels, height, width).
        mean: of the training pixels in 0..1, one number a channel.
        std: likewise.
        batch_size: images in a training batch.
        eval_batch_size: images in a batch of validation and test.
        fractions: shares of the training set for weights, architecture and selection; they sum to 1.
        seed: of the split, the order of training batches and their augmentation.
        augmentation: of training images; None for none.
        num_workers: processes that prepare batches; gathering is so cheap that 0 is the fastest for most.
        progress: told about long steps.

    Raises:
        ValueError: on fractions that are not three shares of 1, or a batch size below 1.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int,
        input_shape: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        eval_batch_size: int,
        fractions: tuple[float, float, float],
        seed: int,
        augmentation: Augmentation | None,
        num_workers: int,
        progress: Progress | None,
    ) -> None:
        super().__init__()
        if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError(
                "fractions must be three positive shares (weights, architecture, selection) that sum to 1, "
                f"got {fractions}"
            )
        if min(batch_size, eval_batch_size) < 1:
            raise ValueError(f"batch sizes must be at least 1, got {batch_size} and {eval_batch_size}")
        self.name = name
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.mean = mean
        self.std = std
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.fractions = fractions
        self.seed = seed
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.progress = progress
        self._loaded: tuple[ImageSource, ImageSource] | None = None

    @abstractmethod
    def load(self) -> tuple[ImageSource, ImageSource]:
        """The training set and the test set, fetched first where they are not on this machine."""

    def prepare_data(self) -> None:
        # Lightning calls this in one process alone, so that the others find what it fetched.
        self._images()

    def setup(self, stage: str | None = None) -> None:
        self._images()

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into the training set for weights, architecture and selection: disjoint, all of it."""
        count = len(self._images()[0])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        weights, architecture = round(count * self.fractions[0]), round(count * self.fractions[1])
        if min(weights, architecture, count - weights - architecture) < 1:
            raise ValueError(
                f"every part must hold an image, but {count} images split by {self.fractions} leave "
                f"{weights}, {architecture} and {count - weights - architecture}; give other fractions"
            )
        return order[:weights], order[weights : weights + architecture], order[weights + architecture :]

    def train_dataloader(self) -> DataLoader[Batch]:
        """The part for weights: shuffled, augmented."""
        return self._training_loader(self.parts()[0])

    def arch_dataloader(self) -> DataLoader[Batch]:
        """The part for the architecture: shuffled, augmented."""
        return self._training_loader(self.parts()[1])

    def retrain_dataloader(self) -> DataLoader[Batch]:
        """Both parts together, for the derived subnet: shuffled, augmented."""
        return self._training_loader(torch.cat(self.parts()[:2]))

    def val_dataloader(self) -> DataLoader[Batch]:
        """The part for selection, as it is."""
        return self._evaluation_loader(self._images()[0], self.parts()[2])

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test set, as it is."""
        images = self._images()[1]
        return self._evaluation_loader(images, torch.arange(len(images)))

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def _images(self) -> tuple[ImageSource, ImageSource]:
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    def _training_loader(self, part: Tensor) -> DataLoader[Batch]:
        # A last batch of one image would stop BatchNorm, hence drop_last.
        batches = BatchDataset(
            self._images()[0],
            part,
            self.batch_size,
            self.mean,
            self.std,
            seed=self.seed,
            shuffle=True,
            drop_last=True,
            augmentation=self.augmentation,
        )
        return self._loader(batches)

    def _evaluation_loader(self, images: ImageSource, part: Tensor) -> DataLoader[Batch]:
        return self._loader(BatchDataset(images, part, self.eval_batch_size, self.mean, self.std))

    def _loader(self, batches: BatchDataset) -> DataLoader[Batch]:
        return DataLoader(
            batches,
            batch_size=None,
            sampler=EpochBatches(batches),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _generator(*numbers: int) -> torch.Generator:
    """A generator for this tuple of numbers; near tuples give unrelated draws."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def _rank_and_world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
