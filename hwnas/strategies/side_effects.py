"""Runs of a user's step that leave no trace: metrics, logs, attributes, buffers and random numbers stay."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection


@final
class Logged:
    """What a step logged while it was watched, averaged over batches by their size."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, value: Any, batch_size: int) -> None:
        if isinstance(value, Metric):
            self._metrics[name] = value
        elif isinstance(value, Tensor | float | int):
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * batch_size
            self._weights[name] = self._weights.get(name, 0.0) + batch_size

    def means(self) -> dict[str, float]:
        found = {name: total / self._weights[name] for name, total in self._sums.items()}
        return {**found, **{name: float(metric.compute()) for name, metric in self._metrics.items()}}


@final
class StandIns:
    """Copies of a module's metrics that take their place while a step is run on the side.

    Args:
        module: the user's module; metrics that are attributes of it or of its children are found.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = list(_metric_places(module))
        self._copies: list[Any] = []
        for holder, name in self._places:
            metric = copy.deepcopy(holder._modules[name])
            metric.reset()  # type: ignore[union-attr, operator]
            self._copies.append(metric)

    def reset(self) -> None:
        for metric in self._copies:
            metric.reset()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        originals = [holder._modules[name] for holder, name in self._places]
        # Not setattr: the order of the children, and so of the state dict, stays.
        for (holder, name), metric, original in zip(self._places, self._copies, originals, strict=True):
            assert original is not None
            holder._modules[name] = metric.to(_device_of(original))
        try:
            yield
        finally:
            for (holder, name), original in zip(self._places, originals, strict=True):
                holder._modules[name] = original


@contextlib.contextmanager
def captured_logs(
    module: pl.LightningModule, logged: Logged | None, batch_size: int, suffix: str = ""
) -> Iterator[None]:
    """What the user's step logs goes to ``logged`` (or nowhere), not to the trainer.

    ``suffix`` is added to the names, as Lightning does where there are several loaders.
    """

    def log(name: str, value: Any, *arguments: Any, **keywords: Any) -> None:
        if logged is not None:
            full_name = name + suffix if keywords.get("add_dataloader_idx", True) else name
            logged.add(full_name, value, keywords.get("batch_size") or batch_size)

    def log_dict(values: Any, *arguments: Any, **keywords: Any) -> None:
        for name, value in values.items():
            log(name, value, **keywords)

    # The instance's attribute hides the method of its class.
    before: dict[str, Any] = {n: vars(module)[n] for n in ("log", "log_dict") if n in vars(module)}
    vars(module)["log"], vars(module)["log_dict"] = log, log_dict
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]
        vars(module).update(before)


@contextlib.contextmanager
def muted_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """What the user's step writes to ``self.logger`` itself goes nowhere."""
    loggers: list[Any] = trainer.loggers
    trainer.loggers = [_Muted(logger) for logger in loggers]  # type: ignore[misc]  # they stand in for loggers
    try:
        yield
    finally:
        trainer.loggers = loggers


@final
class _Muted:
    """A logger that can be asked (for its folder, say), and writes nothing."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.experiment = DummyLogger().experiment

    def __getattr__(self, name: str) -> Any:
        held = getattr(self._logger, name)
        return self.experiment.nop if callable(held) else held


@contextlib.contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers (BatchNorm statistics and any other) are as before afterwards, also where one was replaced."""
    places = [
        (holder, name, buffer)
        for holder in _modules_in(module)
        for name, buffer in holder._buffers.items()
        if buffer is not None
    ]
    saved = [buffer.detach().clone() for _, _, buffer in places]
    try:
        yield
    finally:
        with torch.no_grad():
            for (holder, name, buffer), value in zip(places, saved, strict=True):
                holder._buffers[name] = buffer
                buffer.copy_(value)


@contextlib.contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: less to compute and far less to keep for backward."""
    held = (parameter for holder in _modules_in(module) for parameter in holder._parameters.values())
    asking = [parameter for parameter in held if parameter is not None and parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _modules_in(module: nn.Module) -> Iterator[nn.Module]:
    """Each module once, in any order: torch's nested generators take milliseconds in every step."""
    found, left = {id(module)}, [module]
    while left:
        holder = left.pop()
        yield holder
        for child in holder._modules.values():
            if child is not None and id(child) not in found:
                found.add(id(child))
                left.append(child)


@contextlib.contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers start from ``seed`` inside and go on as before after, also
    when an error passes.
    """
    isolated = isolate_rng()
    isolated.__enter__()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        isolated.__exit__(None, None, None)  # told of an error, it would leave the states as they are


@contextlib.contextmanager
def own_loader_numbers(loaders: Iterable[Any], seed: int) -> Iterator[None]:
    """Generators of the loaders and their samplers start from ``seed`` inside and go on as before after."""
    holders = [
        holder
        for loader in loaders
        for holder in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    ]
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def random_states() -> dict[str, Any]:
    """The global random states as tensors and plain Python, which Lightning's checkpoints can hold."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # a tuple, when legacy
    keys = np.asarray(keys)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss_next],
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))


def _metric_places(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for name, child in module.named_children():
        if isinstance(child, Metric | MetricCollection):
            yield module, name
        else:
            yield from _metric_places(child)


def _device_of(metric: nn.Module) -> torch.device:
    if isinstance(metric, Metric):
        return metric.device
    return next((m.device for m in metric.children() if isinstance(m, Metric)), torch.device("cpu"))
