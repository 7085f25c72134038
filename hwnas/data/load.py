"""The data module that a name or an import path stands for, and what a search needs to know of it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pytorch_lightning import LightningDataModule
from torch import Tensor

from hwnas.data.cifar import CIFAR
from hwnas.data.digits import Digits
from hwnas.data.fashion_mnist import FashionMNIST
from hwnas.data.image_folder import ImageFolder
from hwnas.loading import imported
from lookup_tables.progress import Progress

_MADE_BY: Mapping[str, Callable[..., LightningDataModule]] = {
    "fashion-mnist": FashionMNIST,
    "digits": Digits,
    "cifar10": partial(CIFAR, 10),
    "cifar100": partial(CIFAR, 100),
    "imagenet-folder": ImageFolder,
}
NAMES = tuple(_MADE_BY)


def load_data(
    source: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LightningDataModule:
    """The data module named ``source``, one of `NAMES`, or ``module:attribute``.

    ``fashion-mnist`` and ``digits`` are found or fetched; ``cifar10``, ``cifar100`` and ``imagenet-folder``
    read the files in ``folder`` (`CIFAR`, `ImageFolder`).

    In ``module:attribute`` the module is imported with the working directory in front of the import path,
    as by ``python -m``. The attribute is a ``LightningDataModule``, or a class or function that returns one;
    it is called with those of ``folder`` and ``batch_size`` that are given, and with ``seed`` and
    ``progress`` if it has parameters of these names. The module must have

    - ``train_dataloader()``, ``val_dataloader()``, ``test_dataloader()``: each yields ``(inputs, labels)``;
      the first trains weights, the second selects, the third is touched once, at the end;

    and may have

    - ``arch_dataloader()``: the batches of the architecture steps. Without it these come from
      ``val_dataloader()``, as in NNI;
    - ``retrain_dataloader()``: what the derived subnet is trained on. Without it, ``train_dataloader()``;
    - ``num_classes``, ``input_shape`` (channels, height, width), ``name``: without them they are found by
      reading the training and validation batches once (``describe``).

    Args:
        source: a name or an import path.
        folder: where the files lie; None: wherever they are found.
        batch_size: images in a training batch; None: what the data module has by default.
        seed: of split, order and augmentation.
        progress: told about downloads.

    Raises:
        ValueError: an unknown name, an import that fails, an argument that this data does not take.
        FileNotFoundError: ``imagenet-folder`` without its folders.
        TypeError: the attribute is no ``LightningDataModule`` and returns none.

    >>> load_data("digits", batch_size=32).num_classes
    10
    """
    given = {
        name: value for name, value in (("folder", folder), ("batch_size", batch_size)) if value is not None
    }
    offered = {"seed": seed, "progress": progress}
    if source in _MADE_BY:
        return _call(_MADE_BY[source], source, given, offered)
    module, colon, attribute = source.partition(":")
    if not (colon and module and attribute):
        raise ValueError(
            f"unknown data {source!r}; there are {', '.join(NAMES)}, and my_module:my_datamodule "
            "for any LightningDataModule"
        )
    return _call(imported(source, "data"), source, given, offered)


@dataclass(frozen=True)
class DataFacts:
    """What a search needs to know of its data.

    Attributes:
        name: for reports.
        num_classes: labels run from 0 to ``num_classes - 1``.
        input_shape: of one input, without the batch.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, ...]


def describe(data: LightningDataModule) -> DataFacts:
    """What ``data`` says of itself (``name``, ``num_classes``, ``input_shape``), else what its batches show.

    ``num_classes`` that is not stated is one more than the largest label of all training and validation
    batches, which are read once for it; a class that only the test set has must be stated.

    Raises:
        TypeError: batches are no ``(inputs, labels)`` pairs of tensors with whole numbers as labels.

    >>> describe(load_data("digits"))
    DataFacts(name='digits', num_classes=10, input_shape=(1, 28, 28))
    """
    name = getattr(data, "name", None) or type(data).__name__
    num_classes, input_shape = getattr(data, "num_classes", None), getattr(data, "input_shape", None)
    if num_classes is None or input_shape is None:
        data.prepare_data()
        data.setup("fit")
        inputs, _ = _pair(next(iter(data.train_dataloader())))
        input_shape = input_shape or inputs.shape[1:]
    if num_classes is None:
        loaders = (data.train_dataloader(), data.val_dataloader())
        num_classes = 1 + max(int(_pair(batch)[1].max()) for loader in loaders for batch in loader)
    return DataFacts(str(name), int(num_classes), tuple(input_shape))


def arch_dataloader(data: LightningDataModule) -> Iterable[Any]:
    """The batches of the architecture steps: ``data.arch_dataloader()``, else those of validation."""
    return _loader(data, "arch_dataloader", "val_dataloader")


def retrain_dataloader(data: LightningDataModule) -> Iterable[Any]:
    """What the derived subnet is trained on: ``data.retrain_dataloader()``, else the training batches."""
    return _loader(data, "retrain_dataloader", "train_dataloader")


def _loader(data: LightningDataModule, wanted: str, otherwise: str) -> Iterable[Any]:
    loader: Iterable[Any] = (getattr(data, wanted, None) or getattr(data, otherwise))()
    return loader


def _call(found: Any, source: str, given: dict[str, Any], offered: dict[str, Any]) -> LightningDataModule:
    if isinstance(found, LightningDataModule):
        if given:
            raise ValueError(
                f"data {source!r} is made already and takes no {' or '.join(given)}; leave it out"
            )
        return found
    if not callable(found):
        raise TypeError(
            f"data {source!r} must be a LightningDataModule or return one, it is a {type(found).__name__}"
        )
    parameters = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    refused = [name for name in given if not takes_any and name not in parameters]
    if refused:
        raise ValueError(f"data {source!r} takes no {' or '.join(refused)}; leave it out")
    given = {**given, **{name: value for name, value in offered.items() if name in parameters}}
    try:
        made = found(**given)
    except TypeError as error:
        raise TypeError(
            f"data {source!r} must be a LightningDataModule, or a class or function that makes one and needs "
            f"no arguments; called with {given or 'none'} it says: {error}"
        ) from error
    if not isinstance(made, LightningDataModule):
        raise TypeError(
            f"data {source!r} must return a LightningDataModule, it returned a {type(made).__name__}"
        )
    return made


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    match batch:
        case [Tensor() as inputs, Tensor() as labels] if not labels.is_floating_point():
            return inputs, labels
    raise TypeError(
        "a batch must be (inputs, labels), two tensors, the labels whole numbers, to find num_classes and "
        f"input_shape in it; got {type(batch).__name__}. Otherwise state both on the data module"
    )
