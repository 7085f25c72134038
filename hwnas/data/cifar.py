"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images, 32×32, from their binary files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hwnas.data.fashion_mnist import cache_folder
from hwnas.data.images import Augmentation, ImageData, Images
from lookup_tables.progress import Progress

_PIXELS = 3 * 32 * 32
_FOLDERS = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
_TRAINING = {10: tuple(f"data_batch_{number}.bin" for number in range(1, 6)), 100: ("train.bin",)}
_TEST = {10: "test_batch.bin", 100: "test.bin"}
_URLS = {classes: f"https://www.cs.toronto.edu/~kriz/cifar-{classes}-binary.tar.gz" for classes in (10, 100)}
_MEANS = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}
_DEVIATIONS = {10: (0.2470, 0.2435, 0.2616), 100: (0.2673, 0.2564, 0.2762)}


class CIFAR(ImageData):
    """CIFAR-10 or CIFAR-100: 22,500 images for weights, 22,500 for the architecture, 5,000 to select on.

    The files are those of the binary version (https://www.cs.toronto.edu/~kriz/cifar.html): of each image
    its label, in CIFAR-100 a coarse one and the fine one, which counts here; then 1,024 red, green and blue
    pixels, row by row. The Python version is pickled and is not read. Nothing is downloaded. By default
    images are moved by up to 4 pixels and mirrored, as is usual.

    Args:
        classes: 10 or 100.
        folder: that the archive was unpacked to, or its folder in there; None: the user's cache folder for
            hwnas, or ``$HWNAS_CACHE``.
        batch_size: images in a training batch.
        eval_batch_size: images in a batch of validation and test.
        fractions: shares of the training set for weights, architecture and selection.
        seed: of split, order and augmentation.
        augmentation: of training images; None for none.
        num_workers: processes that prepare batches.
        progress: not called: reading takes a second.

    Raises:
        FileNotFoundError: when read, if a file is missing.
        ValueError: when read, if a file is damaged.
    """

    def __init__(
        self,
        classes: Literal[10, 100],
        folder: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        fractions: tuple[float, float, float] = (0.45, 0.45, 0.1),
        seed: int = 0,
        augmentation: Augmentation | None = Augmentation(shift=4),
        num_workers: int = 0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            name=f"cifar{classes}",
            num_classes=classes,
            input_shape=(3, 32, 32),
            mean=_MEANS[classes],
            std=_DEVIATIONS[classes],
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            fractions=fractions,
            seed=seed,
            augmentation=augmentation,
            num_workers=num_workers,
            progress=progress,
        )
        self.classes: Literal[10, 100] = classes
        self.folder = cache_folder().parent if folder is None else Path(folder)

    def load(self) -> tuple[Images, Images]:
        inner = self.folder / _FOLDERS[self.classes]
        place = inner if inner.is_dir() else self.folder
        names = _TRAINING[self.classes]
        missing = [name for name in (*names, _TEST[self.classes]) if not (place / name).is_file()]
        if missing:
            pickled = [*place.glob("data_batch_?"), *place.glob("train"), *self.folder.glob("cifar-*-py*")]
            also = (
                f"; {pickled[0]} is of the Python version, which is pickled and runs code when it is read"
                if pickled
                else ""
            )
            raise FileNotFoundError(
                f"CIFAR-{self.classes} needs {', '.join(missing)} in {place}{also}. Unpack the binary "
                f"version, {_URLS[self.classes]}, there, or name another folder (--data-folder)"
            )
        batches = [read_binary(place / name, self.classes) for name in names]
        training = Images(torch.cat([b.pixels for b in batches]), torch.cat([b.labels for b in batches]))
        return training, read_binary(place / _TEST[self.classes], self.classes)


def read_binary(path: Path, classes: Literal[10, 100]) -> Images:
    """The images of one of CIFAR's binary files.

    Raises:
        ValueError: not a whole number of images, or a label beyond the classes.
    """
    labels = 1 if classes == 10 else 2  # a coarse one comes before the fine one
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (labels + _PIXELS):
        raise ValueError(
            f"{path} must hold images of {labels + _PIXELS} bytes each; it has {len(content)} bytes. It is "
            f"damaged, or not of CIFAR-{classes}: unpack {_URLS[classes]} again"
        )
    records = torch.from_numpy(content).view(-1, labels + _PIXELS)
    found = records[:, labels - 1].long()
    if int(found.max()) >= classes:
        raise ValueError(
            f"{path} must have labels below {classes}; it has {int(found.max())}: it is damaged, or not of "
            f"CIFAR-{classes}. Unpack {_URLS[classes]} again"
        )
    return Images(records[:, labels:].reshape(-1, 3, 32, 32), found)
