"""A network that is to be trained somewhere: a light record, not a copy of it."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, final, get_args

import pytorch_lightning as pl
from torch import nn

from hwnas.call import Call
from hwnas.loading import imported
from hwnas.non_finite import StopAtNonFiniteLoss
from hwnas.run_folder import read_json, write_json
from hwnas.space import ModelSpace
from hwnas.strategies.side_effects import own_random_numbers
from hwnas.values import as_option
from profilers.space import Architecture, Option

Status = Literal[
    "initialized", "frozen", "training", "trained", "failed", "interrupted", "invalid", "retrying"
]
Metrics = dict[str, float]

_NEXT: dict[Status, tuple[Status, ...]] = {
    "initialized": ("frozen",),
    "frozen": ("training", "invalid"),
    "training": ("trained", "failed", "interrupted", "invalid"),
    "trained": (),
    "failed": ("retrying",),
    "interrupted": ("retrying",),
    "invalid": (),
    "retrying": ("training", "invalid"),
}


@final
@dataclass(frozen=True)
class ExecutableModel:
    """How to make a network, how to train it, and what came of it.

    A record does not change: what changes its status returns another one. Made of `Call`s it is plain
    data: it survives JSON and pickling, and is built and trained wherever it comes to, from the recipe
    alone; all that is drawn there follows from ``seed``.

    ===============  ==========================================================================
    status           what is known
    ===============  ==========================================================================
    ``initialized``  a space and how to train its networks, but no architecture
    ``frozen``       the architecture, too
    ``training``     `run` is at it; ``intermediate`` grows. Where its process died, whoever finds the
                     record says so: ``model.becomes("interrupted").retry()``
    ``trained``      ``metrics`` are there
    ``failed``       it raised ``error``
    ``interrupted``  it was stopped from outside, as by Ctrl-C
    ``invalid``      the space refuses the architecture, for the reason in ``error``
    ``retrying``     failed or interrupted before, and to be run again
    ===============  ==========================================================================

    Attributes:
        space: a call that makes a network with choices (or a `ModelSpace`); the network's weights are
            then slices of the freshly initialised whole. Or a `ModelSpace` itself, of this process, whose
            weights are inherited as by ``space.freeze`` (``training`` should then recalibrate BatchNorm,
            `hwnas.recalibrate`); such a record has no JSON form.
        training: trains or judges a network: called with it, and with ``report=`` if there is a parameter
            of this name, which takes intermediate metrics. Returns the final ones. A `Call`, or any
            function, with which there is no JSON form. `ValueChoice`s among a call's arguments are part
            of the space that is searched.
        seed: of the weights and of all that training draws.
        architecture: one option for each choice, those of ``training`` included.
        status: see above.
        metrics: what ``training`` returned.
        intermediate: what it reported before, in order.
        error: the traceback, or why the architecture was refused.

    >>> from hwnas import ValueChoice
    >>> model = ExecutableModel(
    ...     space=Call("hwnas.spaces:SmallMobileNet", {"num_classes": 4}),
    ...     training=Call("my_code:train", {"lr": ValueChoice([0.1, 0.2], label="lr")}),
    ... )
    >>> model.search_space().size  # 14,002,632 networks, each at two learning rates
    28005264
    >>> model.freeze(model.search_space().random()).status
    'frozen'
    """

    space: Callable[[], nn.Module] | ModelSpace
    training: Callable[..., Mapping[str, float]]
    seed: int = 0
    architecture: Architecture | None = None
    status: Status = "initialized"
    metrics: Metrics | None = None
    intermediate: tuple[Metrics, ...] = ()
    error: str | None = None

    def __post_init__(self) -> None:
        for name, found in (("space", self.space), ("training", self.training)):
            if not callable(found) or (isinstance(found, nn.Module) and not isinstance(found, ModelSpace)):
                raise TypeError(
                    f"a model's {name} is a Call, or a function that makes or trains a network (a ModelSpace "
                    f"serves as space, too); got {type(found).__name__}"
                )
        if self.status not in get_args(Status):
            raise ValueError(f"a status is one of {', '.join(get_args(Status))}; got {self.status!r}")
        if self.architecture is None and self.status != "initialized":
            raise ValueError(f"a model that is {self.status} has an architecture: model.freeze(architecture)")
        if (self.metrics is not None) != (self.status == "trained"):
            raise ValueError(
                f"a trained model has metrics, and no other has; got {self.metrics} {self.status}"
            )

    # ---- status

    def freeze(self, architecture: Mapping[str, Option]) -> ExecutableModel:
        """The record of one network; whether the space has it shows when it is built."""
        chosen = {label: as_option(option) for label, option in architecture.items()}
        return self.becomes("frozen", architecture=chosen)

    def retry(self) -> ExecutableModel:
        """To be run once more, after it failed or was interrupted."""
        return self.becomes("retrying", intermediate=(), error=None)

    def becomes(self, status: Status, **facts: Any) -> ExecutableModel:
        """The record in another status, with what else is known now.

        Raises:
            ValueError: the status does not follow on the present one.
        """
        if status not in _NEXT[self.status]:
            raise ValueError(
                f"a model that is {self.status} becomes {' or '.join(_NEXT[self.status]) or 'nothing else'}; "
                f"got {status!r}"
            )
        return replace(self, status=status, **facts)

    # ---- what it stands for

    def search_space(self) -> ModelSpace:
        """The space: the choices of the network, and beside them those of its training.

        Raises:
            TypeError: ``space`` makes no module.
        """
        made = self.space if isinstance(self.space, ModelSpace) else self.space()
        if not isinstance(made, nn.Module):
            raise TypeError(f"the space's call must make a torch.nn.Module; {self.space} made {type(made)}")
        choices = self.training.choices() if isinstance(self.training, Call) else []
        if not isinstance(made, ModelSpace):
            return ModelSpace(made, {"training": choices})
        if all(made.options.get(choice.name()) == choice.options for choice in choices):
            return made
        return ModelSpace(made.network, {"settings": made.settings, "training": choices})

    def build(self) -> nn.Module:
        """The network, with plain modules and no choice; built twice it is the same.

        Raises:
            ValueError: there is no architecture yet, or the space refuses it.
        """
        if self.architecture is None:
            raise ValueError("a model is built under an architecture: model.freeze(architecture).build()")
        with own_random_numbers(self.seed):
            return self.search_space().freeze(self.architecture)

    def evaluate(self, architecture: Mapping[str, Option]) -> Metrics:
        """The metrics of one network; what goes wrong is raised. This is what a search by trials calls."""
        with own_random_numbers(self.seed):
            space = self.search_space()
            return self._trained(space, space.canonical(architecture), lambda metrics: None)

    def run(self, watch: Callable[[ExecutableModel], object] | None = None) -> ExecutableModel:
        """Builds and trains the network, and returns the record of it.

        What goes wrong is in the record and is not raised, Ctrl-C included: who runs one model after the
        other looks at the status.

        Args:
            watch: told the record each time that it changes: when training begins, at each report of it,
                and at the end. Write it down there, and a process that dies leaves what it had.

        Raises:
            ValueError: the model is neither frozen nor retrying.
        """
        model = self

        def tell(changed: ExecutableModel) -> None:
            nonlocal model
            model = changed
            if watch is not None:
                watch(changed)

        def report(metrics: Mapping[str, float]) -> None:
            tell(replace(model, intermediate=(*model.intermediate, _numbers(metrics))))

        tell(self.becomes("training"))
        with own_random_numbers(self.seed):
            try:
                space = self.search_space()
                try:
                    chosen = space.canonical(self.architecture or {})
                except ValueError as refusal:
                    ended = model.becomes("invalid", error=str(refusal))
                else:
                    metrics = self._trained(space, chosen, report)
                    ended = model.becomes("trained", metrics=metrics)
            except KeyboardInterrupt:
                ended = model.becomes("interrupted", error=traceback.format_exc())
            except (Exception, SystemExit):
                ended = model.becomes("failed", error=traceback.format_exc())
        tell(ended)
        return ended

    def _trained(
        self, space: ModelSpace, architecture: Architecture, report: Callable[[Mapping[str, float]], None]
    ) -> Metrics:
        training = self.training
        if isinstance(training, Call):
            training = training.under(architecture)
        network = space.freeze(architecture)
        wants = inspect.signature(training).parameters
        try:
            return _numbers(training(network, **({"report": report} if "report" in wants else {})))
        except SystemExit as left:
            if isinstance(left.__context__, KeyboardInterrupt):  # Lightning makes an exit of Ctrl-C
                raise KeyboardInterrupt from left
            raise

    # ---- on disk

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it.

        Raises:
            TypeError: it holds something of this process: a `ModelSpace`, or a function that is no `Call`.
        """
        for name in ("space", "training"):
            if not isinstance(getattr(self, name), Call):
                raise TypeError(
                    f"a model is written down with Calls for its space and its training; its {name} is a "
                    f"{type(getattr(self, name)).__name__} of this process: give a Call that makes it"
                )
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**facts, "space": facts["space"].to_json(), "training": facts["training"].to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExecutableModel:
        """Raises ``ValueError`` where a fact is missing or unknown."""
        names = {field.name for field in fields(cls)}
        if data.keys() != names:
            raise ValueError(f"a model has the facts {sorted(names)}; got {sorted(data)}")
        architecture = data["architecture"]
        if architecture is not None:
            architecture = {label: as_option(option) for label, option in architecture.items()}
        return cls(
            **{
                **data,
                "space": Call.from_json(data["space"]),
                "training": Call.from_json(data["training"]),
                "architecture": architecture,
                "intermediate": tuple(data["intermediate"]),
            }
        )

    def save(self, path: Path) -> None:
        """Writes it to a file that is there whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> ExecutableModel:
        """Raises ``ValueError`` where the file is absent, damaged or no model."""
        return cls.from_json(read_json(path, "model"))


def fit(
    network: nn.Module,
    report: Callable[[Mapping[str, float]], None],
    module: str,
    data: pl.LightningDataModule,
    arguments: Mapping[str, Any] | None = None,
    **trainer: Any,
) -> Metrics:
    """Trains a network in a LightningModule: what a model's ``training`` calls by ``hwnas.executable:fit``.

    Every epoch is reported, with what the module logged. A loss that is no number ends the training.

    Args:
        network: the first argument of the LightningModule.
        report: told the metrics of each epoch.
        module: import path of the LightningModule, such as ``hwnas.classification:Classification``.
        data: has training batches, and validation batches if the module validates.
        arguments: of the LightningModule, besides the network.
        trainer: keywords of ``pytorch_lightning.Trainer``; without any it draws and writes nothing.

    Returns:
        What the module logged last.
    """
    fitted = imported(module, "LightningModule")(network, **(arguments or {}))
    callbacks = [*trainer.pop("callbacks", ()), StopAtNonFiniteLoss(), _ReportEpochs(report)]
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    made = pl.Trainer(**{**quiet, **trainer}, callbacks=callbacks)
    made.fit(fitted, datamodule=data)
    return _numbers(made.callback_metrics)


@final
class _ReportEpochs(pl.Callback):
    def __init__(self, report: Callable[[Mapping[str, float]], None]) -> None:
        self._report = report

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(_numbers(trainer.callback_metrics))


def _numbers(metrics: Any) -> Metrics:
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"a training returns and reports metrics as a mapping from names to numbers; got {metrics!r}"
        )
    return {str(name): float(value) for name, value in metrics.items()}
