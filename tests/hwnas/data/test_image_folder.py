from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hwnas.data import ImageFolder, describe, load_data
from hwnas.data.image_folder import middle, random_part


def write(folder: Path, train: int = 10, val: int = 2, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Images of 40x30, of one colour a class: 100 times its number, plus which image it is, in red."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                colour = (100 * label + number, 7, 200)
                Image.new("RGB", (40, 30), colour).save(place / f"{number}.png")
            (place / "notes.txt").write_text("no image")
    return folder


def small(folder: Path, **options: object) -> ImageFolder:
    return ImageFolder(folder, **{"image_size": 8, "num_workers": 0, "batch_size": 4, **options})


def test_folders_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    data = small(write(tmp_path))
    training, test = data.load()
    assert data.classes == ["cat", "dog"]
    assert (len(training), len(test)) == (20, 4)
    assert test.labels.tolist() == [0, 0, 1, 1]
    pixels = test.read(torch.tensor([3]), None)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 8, 8), torch.uint8)
    assert pixels[0, :, 0, 0].tolist() == [101, 7, 200]
    assert describe(data).input_shape == (3, 8, 8)


def test_the_name_stands_for_the_class_and_its_batches_are_normalised(tmp_path: Path) -> None:
    data = load_data("imagenet-folder", folder=write(tmp_path), batch_size=4, seed=3)
    data.num_workers = 0
    assert [len(part) for part in data.parts()] == [9, 9, 2]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.shape) == ((4, 3, 224, 224), (4,))
    blue = (200 / 255 - 0.406) / 0.225
    torch.testing.assert_close(images[:, 2].mean(), torch.tensor(blue), rtol=1e-4, atol=0)
    assert [labels.tolist() for _, labels in data.test_dataloader()] == [[0, 0, 1, 1]]


def test_training_reads_random_parts_that_a_resumed_run_reads_again(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "one").mkdir(parents=True)
        for number in range(8):
            grey = Image.fromarray(np.broadcast_to(ramp, (64, 64)).copy())  # grey becomes colour
            grey.save(tmp_path / part / "one" / f"{number}.jpg")
    loader = small(tmp_path, fractions=(0.5, 0.25, 0.25)).train_dataloader()
    loader.sampler.set_epoch(1)
    (first, _), (again, _) = next(iter(loader)), next(iter(loader))
    assert torch.equal(first, again)
    assert len({image.sum().item() for image in first}) == 4  # one image, in four parts
    plain = small(tmp_path, fractions=(0.5, 0.25, 0.25), augmentation=None).train_dataloader()
    assert len({image.sum().item() for image in next(iter(plain))[0]}) == 1


def test_random_parts_lie_inside_and_have_the_areas_and_ratios_they_must() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, height in ((200, 100), (150, 150)):
        boxes = torch.tensor([random_part(width, height, generator) for _ in range(2000)])
        left, top, right, bottom = boxes.T
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (right <= width).all()
        assert (bottom <= height).all()
        areas = (right - left) * (bottom - top) / (width * height)
        ratios = (right - left) / (bottom - top)
        assert 0.07 < areas.min() < 0.1
        assert 0.73 < ratios.min() < 0.8
        assert 1.25 < ratios[areas < 0.9].max() < 1.36
    assert areas.max() > 0.95
    assert 0.45 < (ratios < 1).float().mean() < 0.55  # neither lying nor standing images are preferred
    assert random_part(1000, 1, generator) == (0, 0, 1000, 1)
    assert middle(256, 256) == (16, 16, 240, 240)


def test_what_is_missing_is_named_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data-folder.*train/<class>/ and val/<class>/"):
        load_data("imagenet-folder")
    with pytest.raises(FileNotFoundError, match=r"train must hold a folder for each class.*image-net\.org"):
        ImageFolder(tmp_path)
    write(tmp_path, val=0)
    with pytest.raises(FileNotFoundError, match=r"val/cat has no image"):
        small(tmp_path).setup()
    (tmp_path / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"every class in .*val must be one of .*train; it has bird"):
        small(tmp_path).setup()


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cat/0.png cannot be read as an image.*Remove or replace"):
        small(tmp_path).load()[1].read(torch.tensor([0]), None)
