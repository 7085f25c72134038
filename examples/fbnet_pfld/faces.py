"""The 106-point data: an image folder and a list file, as the FBNet example of NNI reads it.

``train_data/list.txt`` and ``test_data/list.txt`` have one face a line: the image's path below the folder,
212 coordinates (x and y by turns, shares of the image), attributes where a list has some, and three Euler
angles, whose cosines are taken as of radians (microsoft/nni, ``examples/nas/oneshot/pfld/datasets.py``, which
has no attributes). Where the folder has no such files, synthetic faces are drawn into it first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from synthetic_faces import write_faces
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, random_split

POINTS = 106


class ListFile(Dataset[tuple[Tensor, Tensor]]):
    """Images ``(3, size, size)`` in 0..1 and targets ``(212 + 3,)``, coordinates and angles.

    Raises:
        ValueError: a line with fewer numbers, or with something that is no number.
    """

    def __init__(self, folder: Path, part: str, size: int) -> None:
        self.folder, self.size = folder, size
        self.names: list[str] = []
        targets = []
        path = folder / part / "list.txt"
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            name, *numbers = line.split()
            if len(numbers) < 2 * POINTS + 3:
                raise ValueError(
                    f"line {number} of '{path}' needs a path, {2 * POINTS} coordinates and three angles; "
                    f"it has {len(numbers)} numbers"
                )
            self.names.append(name)
            targets.append([float(x) for x in (*numbers[: 2 * POINTS], *numbers[-3:])])
        self.targets = torch.tensor(targets)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.folder / self.names[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.size, self.size)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255, self.targets[index]


class Faces(pl.LightningDataModule):
    """The training list split in three by ``seed``: weights (70 %), architecture (20 %), selection (10 %).

    Args:
        folder: holds ``train_data`` and ``test_data``.
        size: images are scaled to this side.
        batch_size: of all loaders.
        synthetic: how many faces to draw for training, and a quarter of it for the test, if there are none.
        workers: processes that read images.
        seed: of the split and of what is drawn.
    """

    def __init__(
        self, folder: Path, size: int, batch_size: int, synthetic: int, workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.folder, self.size, self.batch_size = folder, size, batch_size
        self.synthetic, self.workers, self.seed = synthetic, workers, seed

    def prepare_data(self) -> None:
        if not (self.folder / "train_data" / "list.txt").exists():
            print(f"no faces in '{self.folder}': {self.synthetic} SYNTHETIC ones are drawn for training")
            write_faces(self.folder, self.synthetic, self.synthetic // 4, self.size, self.seed)

    def setup(self, stage: str | None = None) -> None:
        images = ListFile(self.folder, "train_data", self.size)
        generator = torch.Generator().manual_seed(self.seed)
        self.weights, self.architecture, self.selection = random_split(images, (0.7, 0.2, 0.1), generator)
        self.test = ListFile(self.folder, "test_data", self.size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.weights, shuffle=True)

    def arch_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.architecture, shuffle=True)

    def retrain_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """What a chosen network is trained on: all but the selection."""
        return self._loader(ConcatDataset([self.weights, self.architecture]), shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.selection)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.test)

    def _loader(self, part: Dataset[tuple[Tensor, Tensor]], shuffle: bool = False) -> DataLoader:
        return DataLoader(
            part,
            self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and len(part) > self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
