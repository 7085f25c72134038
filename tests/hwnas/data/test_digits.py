import numpy as np
import torch
from sklearn.datasets import load_digits

from hwnas.data import Digits


def test_enlarged_digits_are_the_originals_at_every_third_pixel() -> None:
    train, test = Digits().load()
    small = torch.cat([train.pixels, test.pixels])[:, 0, 3:-2:3, 3:-2:3]
    assert np.array_equal(np.round(small.numpy() * (16 / 255)), load_digits().images)


def test_digits_keep_their_order_and_labels() -> None:
    train, test = Digits().load()
    assert torch.cat([train.labels, test.labels]).tolist() == load_digits().target.tolist()
    assert len(test) == 360


def test_frame_is_black() -> None:
    pixels = Digits().load()[0].pixels
    assert pixels.sum() == pixels[:, :, 2:-2, 2:-2].sum()
