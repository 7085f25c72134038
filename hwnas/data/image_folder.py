"""Images in folders, one a class, as ImageNet's are usually laid out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hwnas.data.images import Augmentation, ImageData
from lookup_tables.progress import Progress

ENDINGS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})
_TRIES = 10  # to find a crop that fits


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images in files, read as they are asked for.

    What is read as it is, is the square in the middle whose side is 7/8 of the shorter one, scaled: 224
    pixels out of 256. With a generator it is a random part (GoogLeNet, arXiv 1409.4842, section 6): 8 to
    100 % of the area, sides in a ratio of 3:4 to 4:3.

    Attributes:
        paths: of the files.
        labels: int64, (images,).
        size: side of the square that is read, in pixels.
    """

    paths: Sequence[str]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, chosen: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.stack([self._read(self.paths[index], generator) for index in chosen.tolist()])

    def _read(self, path: str, generator: torch.Generator | None) -> Tensor:
        from PIL import Image  # needed here alone

        try:
            with Image.open(path) as image:
                square = (self.size, self.size)
                box = middle(*image.size) if generator is None else random_part(*image.size, generator)
                pixels = np.array(image.convert("RGB").resize(square, Image.Resampling.BILINEAR, box))
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}. Remove or replace it") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)


class ImageFolder(ImageData):
    """Images of any size in ``train/<class>/`` and ``val/<class>/``, as ImageNet's are usually laid out.

    ``train`` is split in three; ``val`` is the test set, which is touched once, at the end. Classes are the
    folders in ``train``, in alphabetical order. Files are read when their batch is made (`ImageFiles`); then
    training images are mirrored at random.

    Args:
        folder: that ``train`` and ``val`` are in.
        image_size: side of the images that a network gets, in pixels.
        batch_size: images in a training batch.
        eval_batch_size: images in a batch of validation and test.
        fractions: shares of the training set for weights, architecture and selection.
        seed: of split, order and augmentation.
        augmentation: of training images, after a random part was read; None for neither.
        num_workers: processes that read files.
        progress: not called.

    Raises:
        FileNotFoundError: a folder, or every image of a class, is missing.
        ValueError: ``val`` has a class that ``train`` has not; when read, a file that is no image.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        image_size: int = 224,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        fractions: tuple[float, float, float] = (0.45, 0.45, 0.1),
        seed: int = 0,
        augmentation: Augmentation | None = Augmentation(shift=0),
        num_workers: int = 4,
        progress: Progress | None = None,
    ) -> None:
        if folder is None:
            raise FileNotFoundError(f"images in folders need to be named (--data-folder): {_LAYOUT}")
        self.folder = Path(folder)
        self.classes = _subfolders(self.folder / "train")
        super().__init__(
            name="imagenet-folder",
            num_classes=len(self.classes),
            input_shape=(3, image_size, image_size),
            # ImageNet's, which weights from elsewhere were trained with.
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            fractions=fractions,
            seed=seed,
            augmentation=augmentation,
            num_workers=num_workers,
            progress=progress,
        )

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        unknown = sorted({*_subfolders(self.folder / "val")} - {*self.classes})
        if unknown:
            raise ValueError(
                f"every class in {self.folder / 'val'} must be one of {self.folder / 'train'}; it has "
                f"{unknown[0]} and {len(unknown) - 1} others besides. {_LAYOUT}"
            )
        return self._files("train", self.classes), self._files("val", _subfolders(self.folder / "val"))

    def _files(self, part: str, classes: Sequence[str]) -> ImageFiles:
        paths: list[str] = []
        labels: list[int] = []
        for name in classes:
            place = self.folder / part / name
            found = sorted(
                entry.path for entry in os.scandir(place) if Path(entry.name).suffix.lower() in ENDINGS
            )
            if not found:
                raise FileNotFoundError(f"{place} has no image ({', '.join(sorted(ENDINGS))}). {_LAYOUT}")
            paths += found
            labels += [self.classes.index(name)] * len(found)
        return ImageFiles(paths, torch.tensor(labels), self.input_shape[1])


_LAYOUT = (
    "The folder holds train/<class>/ and val/<class>/ with images in them. ImageNet comes from "
    "https://image-net.org (ILSVRC2012, after registration); its validation images have to be sorted into "
    "classes"
)


def _subfolders(place: Path) -> list[str]:
    found = sorted(entry.name for entry in os.scandir(place) if entry.is_dir()) if place.is_dir() else []
    if not found:
        raise FileNotFoundError(f"{place} must hold a folder for each class, and does not. {_LAYOUT}")
    return found


def middle(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the square in the middle whose side is 7/8 of the shorter one.

    >>> middle(80, 160)
    (5.0, 45.0, 75.0, 115.0)
    """
    half = min(width, height) * 7 / 16
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def random_part(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image; the whole where none fits.

    Its area is 8 to 100 % of the image's, evenly; the logarithm of its ratio of sides is even, too.
    """
    for _ in range(_TRIES):
        area, ratio, across, down = torch.rand(4, generator=generator, dtype=torch.double).tolist()
        pixels = (0.08 + 0.92 * area) * width * height
        stretch = math.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
        wide, high = round(math.sqrt(pixels * stretch)), round(math.sqrt(pixels / stretch))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(across * (width - wide + 1)), int(down * (height - high + 1))
            return left, top, left + wide, top + high
    return 0, 0, width, height
