"""scikit-learn's handwritten digits: tiny, embedded, for trying things out and for tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hwnas.data.images import Augmentation, ImageData, Images
from lookup_tables.progress import Progress


class Digits(ImageData):
    """1,797 digits of 8×8 pixels, each pixel tripled and two black rows and columns put around: 28×28.

    The first 1,437 are the training set, the last 360 the test set: other people wrote those, and
    scikit-learn's own examples split them so. By default digits are shifted, not mirrored.

    Source: ``sklearn.datasets.load_digits`` (the test set of UCI's Optical Recognition of Handwritten
    Digits). Mean and deviation are those of the training set after enlarging.

    >>> data = Digits(batch_size=16)
    >>> images, labels = next(iter(data.train_dataloader()))
    >>> images.shape, labels.shape
    (torch.Size([16, 1, 28, 28]), torch.Size([16]))
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        fractions: tuple[float, float, float] = (0.4, 0.4, 0.2),
        seed: int = 0,
        augmentation: Augmentation | None = Augmentation(flip=False),
        num_workers: int = 0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            name="digits",
            num_classes=10,
            input_shape=(1, 28, 28),
            mean=(0.2244,),
            std=(0.3488,),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            fractions=fractions,
            seed=seed,
            augmentation=augmentation,
            num_workers=num_workers,
            progress=progress,
        )

    def load(self) -> tuple[Images, Images]:
        from sklearn.datasets import load_digits  # seconds to import, and needed here alone

        digits = load_digits()
        pixels = enlarge(torch.from_numpy(digits.images.astype(np.uint8)))
        labels = torch.from_numpy(digits.target.astype(np.int64))
        return Images(pixels[:1437], labels[:1437]), Images(pixels[1437:], labels[1437:])


def enlarge(digits: Tensor) -> Tensor:
    """Digits of 8×8 with grey levels 0..16 as uint8 (digits, 1, 28, 28) with levels 0..255."""
    tripled = digits.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    framed = torch.nn.functional.pad(tripled, (2, 2, 2, 2))
    return (framed.float() * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
