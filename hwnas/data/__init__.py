"""Data to search on: real images, tiny ones, and any ``LightningDataModule`` of the user's."""

from hwnas.data.cifar import CIFAR
from hwnas.data.digits import Digits
from hwnas.data.fashion_mnist import FashionMNIST
from hwnas.data.image_folder import ImageFiles, ImageFolder
from hwnas.data.images import Augmentation, ImageData, Images, ImageSource
from hwnas.data.load import DataFacts, arch_dataloader, describe, load_data, retrain_dataloader

__all__ = [
    "CIFAR",
    "Augmentation",
    "DataFacts",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "ImageFiles",
    "ImageFolder",
    "ImageSource",
    "Images",
    "arch_dataloader",
    "describe",
    "load_data",
    "retrain_dataloader",
]
