from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.data import CIFAR, load_data
from hwnas.data.cifar import read_binary

FILES = {
    10: [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"],
    100: ["train.bin", "test.bin"],
}
FOLDERS = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}


def write(folder: Path, classes: int, images: int = 20) -> dict[str, np.ndarray]:
    """Files of a few random images each; what was written, by name."""
    random = np.random.default_rng(0)
    written = {}
    (folder / FOLDERS[classes]).mkdir(parents=True)
    for name in FILES[classes]:
        records = random.integers(256, size=(images, (1 if classes == 10 else 2) + 3072), dtype=np.uint8)
        records[:, 0] %= 10
        if classes == 100:
            records[:, 1] %= 100
        records.tofile(folder / FOLDERS[classes] / name)
        written[name] = records
    return written


@pytest.mark.parametrize("classes", [10, 100])
def test_pixels_are_read_by_channel_and_row_with_their_labels(classes: int, tmp_path: Path) -> None:
    written = write(tmp_path, classes)
    data = load_data(f"cifar{classes}", folder=tmp_path, batch_size=8)
    training, test = data.load()
    assert len(training) == 20 * (len(FILES[classes]) - 1)
    assert (len(test), data.num_classes, data.input_shape) == (20, classes, (3, 32, 32))
    first = 1 if classes == 10 else 2
    record = written[FILES[classes][-1]][7]
    assert test.labels[7] == record[first - 1]
    assert test.pixels[7, 1, 2, 3] == record[first + 1024 + 2 * 32 + 3]  # green, third row, fourth column
    last = written[FILES[classes][-2]][-1]
    assert torch.equal(training.pixels[-1].flatten(), torch.from_numpy(last[first:]))


def test_the_training_set_is_split_in_three_and_the_test_set_is_apart(tmp_path: Path) -> None:
    write(tmp_path, 10)
    data = CIFAR(10, tmp_path / FOLDERS[10], batch_size=9)  # the inner folder can be named, too
    parts = data.parts()
    assert [len(part) for part in parts] == [45, 45, 10]
    assert torch.cat(parts).sort().values.tolist() == list(range(100))
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.shape) == ((9, 3, 32, 32), (9,))
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 20


def test_missing_files_are_named_with_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10)
    (tmp_path / FOLDERS[10] / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs data_batch_3.bin in .*cifar-10-binary\.tar\.gz"):
        CIFAR(10, tmp_path).setup()
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"needs train.bin, test.bin in .*cache.*cifar-100-binary"):
        load_data("cifar100").setup()


def test_the_pickled_version_is_refused_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 is of the Python version, which is pickled"):
        CIFAR(10, tmp_path).setup()


def test_a_file_that_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 100)
    with pytest.raises(ValueError, match=r"images of 3073 bytes each; it has 61480 bytes"):
        read_binary(tmp_path / FOLDERS[100] / "test.bin", 10)
    np.full(3073, 11, np.uint8).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="labels below 10; it has 11"):
        read_binary(tmp_path / "test_batch.bin", 10)
