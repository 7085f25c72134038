"""Data to search on: real images, tiny ones, and any ``LightningDataModule`` of the user's."""

from hwnas.data.digits import Digits
from hwnas.data.fashion_mnist import FashionMNIST
from hwnas.data.images import Augmentation, ImageData, Images
from hwnas.data.load import DataFacts, arch_dataloader, describe, load_data, retrain_dataloader

__all__ = [
    "Augmentation",
    "DataFacts",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "Images",
    "arch_dataloader",
    "describe",
    "load_data",
    "retrain_dataloader",
]
