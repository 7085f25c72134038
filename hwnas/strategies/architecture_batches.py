"""Batches that the architecture learns from, beside those that the weights are trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, final

import pytorch_lightning as pl

from hwnas.strategies.side_effects import own_loader_numbers, own_random_numbers
from hwnas.strategies.strategy import mixed_seed, set_epoch


def architecture_loader(trainer: pl.Trainer, given: Iterable[Any] | None, strategy: str) -> Iterable[Any]:
    """The loader that was given, or else the trainer's (first) validation loader.

    Raises:
        ValueError: there is neither; the text names the ``strategy``.
        TypeError: what was given cannot be iterated.
    """
    if given is not None:
        if not hasattr(given, "__iter__"):
            raise TypeError(
                f"{strategy}(arch_dataloader=…) takes a loader, which can be iterated again and again; got "
                f"{type(given).__name__}: of a LightningDataModule give one of its loaders, such as "
                "val_dataloader()"
            )
        return given
    validation = trainer.fit_loop.epoch_loop.val_loop
    # None where validation is not due in this epoch.
    if validation._combined_loader is None and validation._data_source.is_defined():
        validation.setup_data()
    loaders = [] if validation._combined_loader is None else validation._combined_loader.flattened
    if not loaders:
        raise ValueError(
            f"{strategy} needs batches for its architecture steps: give "
            f"{strategy}(arch_dataloader=…), or validation batches to Trainer.fit"
        )
    first: Iterable[Any] = loaders[0]
    return first


@final
class ArchitectureBatches:
    """Architecture batches without end, pass after pass over a loader.

    Which batch comes depends on the seed, the pass and the place in it alone, so that a resumed search
    goes on with the batch that comes next.

    Args:
        loader: anything that can be iterated again and again.
        seed: of the loader's random numbers.
        start: pass and place to go on from; getting there draws the batches of the pass again.
    """

    def __init__(self, loader: Iterable[Any], seed: int, start: tuple[int, int] = (0, 0)) -> None:
        self._loader = loader
        self._seed = seed
        self._pass, place = start
        self._place = 0
        self._iterator = self._begin()
        for _ in range(place):
            self.next()

    @property
    def position(self) -> tuple[int, int]:
        return self._pass, self._place

    def next(self) -> Any:
        for _ in range(2):
            with self._own_numbers():
                for batch in self._iterator:
                    self._place += 1
                    return batch
            self._pass, self._place = self._pass + 1, 0
            self._iterator = self._begin()
        raise ValueError("the loader of the architecture batches is empty: give it at least one batch")

    def _begin(self) -> Iterator[Any]:
        set_epoch(self._loader, self._pass)
        with self._own_numbers():
            return iter(self._loader)

    @contextlib.contextmanager
    def _own_numbers(self) -> Iterator[None]:
        seed = mixed_seed(self._seed, self._pass, self._place)
        with own_random_numbers(seed), own_loader_numbers([self._loader], seed):
            yield
