"""The main job: from a space and a budget to an ONNX file with a certificate."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from hwnas.certificate import Certificate, certify, deployed_session, patient_reading
from hwnas.classification import Classification
from hwnas.data import DataFacts, arch_dataloader, describe, load_data, retrain_dataloader
from hwnas.derive import Budget, ranked
from hwnas.export import accuracy, export_onnx
from hwnas.latency_table import build_latency_table
from hwnas.loading import load_space
from hwnas.mobile import quantise_on
from hwnas.non_finite import StopAtNonFiniteLoss
from hwnas.progress import ReportProgress
from hwnas.recalibrate import recalibrate
from hwnas.run_folder import MetricsFile, RunFolder, write_json
from hwnas.space import ModelSpace
from hwnas.strategies import DARTS, ENAS, GumbelDARTS, Proxyless, RandomOneShot, Strategy
from hwnas.trials import RegularizedEvolution, SupernetEvaluator
from hwnas.trials import search as search_trials
from lookup_tables import Calibration, LatencyReading, LookupTable, Progress, SessionSettings, fingerprint
from profilers import LagrangianPenalty, LatencyProfiler, RangeProfilerFilter
from profilers.space import Architecture

DIFFERENTIABLE: dict[str, Callable[..., Strategy]] = {
    "darts": DARTS,
    "gumbel-darts": GumbelDARTS,
    "proxyless": Proxyless,
}
# Their supernets are searched by evolution: there is no score that adds up over choices.
SAMPLED: dict[str, Callable[..., Strategy]] = {"enas": ENAS, "random-one-shot": RandomOneShot}
STRATEGIES = {**DIFFERENTIABLE, **SAMPLED}

# A network that leaves more of the budget unused is not what was asked for, as long as others fit.
_LEAST_USE = 0.94
_CANDIDATES = 6
_ATTEMPTS = 8
_READINGS = 20  # of the certificate, two minutes: noise that comes in bursts should not undo a search
_RECALIBRATION_BATCHES = 20
_SEVERAL_DEVICES = "ddp_fork_find_unused_parameters_true"


@final
@dataclass(frozen=True)
class SearchSettings:
    """What is asked of a search; two runs with equal settings on one machine find the same network.

    Attributes:
        space, data, strategy: by name, or ``module:attribute``.
        data_folder: where the data's files lie; None: wherever they are found.
        device_table: a latency table; None: one of this machine is built.
        allow_other_device: whether a table of another machine may be used.
        max_latency_ms: the budget; None: by ``budget_percent``.
        budget_percent: the budget as a point between the space's cheapest (0) and dearest (100) network.
        epochs: of the search.
        train_epochs: of the subnet that was found.
        batch_size: of both; None: what the data has.
        lr, train_lr: peak learning rates of the search and of the training.
        arc_learning_rate: of the architecture parameters.
        warmup_epochs: epochs at the start of the search that train weights alone.
        trials: networks that evolution tries on the supernet of a strategy that samples.
        threads, optimisation, runtime: of the session that is measured; None: those of the given table, else
            1, ``all`` and ``onnxruntime``.
        int8: whether what is measured and exported computes in INT8, its ranges found on training images;
            so it does, too, where the given table was measured in it.
        accelerator, devices, precision: Lightning's.
        seed: of everything that is drawn.
    """

    space: str = "small-mobilenet"
    data: str = "fashion-mnist"
    data_folder: str | None = None
    strategy: str = "proxyless"
    device_table: str | None = None
    allow_other_device: bool = False
    max_latency_ms: float | None = None
    budget_percent: float = 50.0
    epochs: int = 4
    train_epochs: int = 6
    batch_size: int | None = None
    lr: float = 0.1
    train_lr: float = 0.1
    arc_learning_rate: float = 0.01
    warmup_epochs: int = 1
    trials: int = 60
    threads: int | None = None
    optimisation: str | None = None
    runtime: str | None = None
    int8: bool = False
    accelerator: str = "auto"
    devices: str = "1"
    precision: str = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}; there are {', '.join(STRATEGIES)}")
        if self.epochs < 1 or self.train_epochs < 1:
            raise ValueError(
                f"epochs and train_epochs must be at least 1; got {self.epochs} and {self.train_epochs}"
            )
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1; got {self.trials}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                "warmup_epochs must leave at least one epoch to search: from 0 to epochs - 1; "
                f"got {self.warmup_epochs} of {self.epochs}"
            )
        if self.max_latency_ms is not None and not 0 < self.max_latency_ms < math.inf:
            raise ValueError(f"max_latency_ms must be above 0 and finite; got {self.max_latency_ms}")
        if self.max_latency_ms is None and not 0 <= self.budget_percent <= 100:
            raise ValueError(
                "the budget is a share of the span between the cheapest and the dearest network, from 0 to "
                f"100 %; got {self.budget_percent} %"
            )


class SearchFailedError(RuntimeError):
    """The search ran, but no network kept to the budget when it was measured."""


@final
class Search:
    """One run in one folder. Every step leaves its result there; `run` goes on after the last of them.

    Args:
        settings: what is asked.
        out: the folder.
        report: told about the progress of every long step.
        say: told what happens, a line at a time.

    Raises:
        ValueError: unknown names, or a folder that holds another run.
    """

    def __init__(
        self, settings: SearchSettings, out: Path, report: Progress, say: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self._report = report
        self._say = say
        pl.seed_everything(settings.seed, verbose=False)
        self._data = load_data(
            settings.data,
            folder=settings.data_folder,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=report,
        )
        self._data.prepare_data()
        self._data.setup("fit")
        self._facts: DataFacts = describe(self._data)
        self.space: ModelSpace = load_space(
            settings.space, self._facts.num_classes, self._facts.input_shape[0]
        )
        self._example = torch.zeros(1, *self._facts.input_shape)
        if "precision" in self.space.settings:
            raise ValueError(
                "a choice of the precision is searched with a table for each precision, in Python "
                "(hwnas.precision): this search measures in one precision, that of --int8 or of the table"
            )
        self._deployed(None)  # tells of settings that there are not
        self.folder = RunFolder(out, dataclasses.asdict(settings))
        self.latency: LatencyProfiler
        self.budget_ms: float

    def run(self) -> Certificate:
        """Table, search, derivation, training, export, certificate: what is there already is not done again.

        Raises:
            ValueError: a budget that nothing in the space keeps to.
            NonFiniteLossError: the training diverged; the last good checkpoint is kept.
            SearchFailedError: every candidate was over the budget when it was measured.
        """
        if self.folder.get("finished") and self._certificate_path.exists():
            self._say(f"'{self.folder.path}' is finished; its certificate is read back")
            return Certificate.load(self._certificate_path)
        self.latency = self._latency_profiler(self._table())
        self.budget_ms = self._budget()
        strategy = self._searched()
        for _ in range(_ATTEMPTS):
            architecture = self._derived(strategy)
            certificate = self._certified(architecture, self._trained(architecture))
            if certificate.passed or self._other_device():
                self.folder.update(finished=True)
                return certificate
            if not certificate.valid:
                self._say("the machine is too busy for a certificate: the same command measures again")
                return certificate
            self._say(f"not kept: {certificate.reason}; the next-best architecture is tried")
            self._reject(architecture, certificate.measured_ms)
        raise SearchFailedError(
            f"{_ATTEMPTS} architectures were over the budget of {self.budget_ms:.4f} ms when measured; "
            "the machine may be slower now than when the table was built: build it again "
            f"(remove '{self.folder.path / 'latency_table.json'}') or ask for more"
        )

    # ---- table and budget

    def _table(self) -> LookupTable:
        path = self.folder.path / "latency_table.json"
        # As long as no budget hangs on the copy, the given file may have been completed or replaced.
        if self.settings.device_table is not None and not (path.exists() and self.folder.get("budget_ms")):
            given = LookupTable.load(Path(self.settings.device_table))
            given.save(path)
        if self.settings.device_table is not None:
            table = LookupTable.load(path)
            self._deployed(table)  # tells where they differ
            return table
        return build_latency_table(
            self.space,
            self._example,
            path,
            name=self.settings.space,
            settings=self._deployed(None),
            seed=self.settings.seed,
            progress=self._report,
        )

    def _deployed(self, table: LookupTable | None) -> SessionSettings:
        asked = self.settings
        return deployed_session(table, asked.threads, asked.optimisation, asked.runtime, asked.int8)

    @property
    def _session(self) -> SessionSettings:
        return self.latency.table.settings

    def _latency_profiler(self, table: LookupTable) -> LatencyProfiler:
        if self.folder.get("calibration"):
            table = table.with_calibration(Calibration(**self.folder["calibration"]))
        return LatencyProfiler(
            self.space, self._example, table, allow_other_device=self.settings.allow_other_device
        )

    def _other_device(self) -> list[str]:
        """What makes the table's device another one than this machine."""
        return self.latency.table.device.differences(fingerprint(self._session.runtime))

    @property
    def _certificate_path(self) -> Path:
        return self.folder.path / "certificate.json"

    def _budget(self) -> float:
        if not self.folder.get("budget_ms"):
            low, high = self.latency.cost.bounds()
            asked = self.settings.max_latency_ms
            budget = low + self.settings.budget_percent / 100 * (high - low) if asked is None else asked
            if budget < low:
                raise ValueError(
                    f"a budget of {budget:g} ms cannot be kept: by "
                    f"'{self.folder.path / 'latency_table.json'}' the space's cheapest network needs "
                    f"{low:.4f} ms and its dearest {high:.4f} ms; ask for at least {low:.4f} ms"
                )
            if budget > high:
                self._say(f"every network fits: the dearest of the space needs {high:.4f} ms")
            self.folder.update(budget_ms=budget, span_ms=[low, high])
        budget_ms: float = self.folder["budget_ms"]
        low, high = self.folder["span_ms"]
        self._say(f"budget {budget_ms:.4f} ms; the space spans {low:.4f} to {high:.4f} ms")
        return budget_ms

    # ---- search

    def _searched(self) -> Strategy:
        settings = self.settings
        strategy = STRATEGIES[settings.strategy](**self._strategy_options())
        module = Classification(self.space, self._facts.num_classes, lr=settings.lr)
        state = self._fit(
            module,
            "search",
            f"searching ({settings.strategy})",
            settings.epochs,
            self._data.train_dataloader(),
            callbacks=[strategy],
        )
        self.space.cpu()
        strategy.prepare_for(self.space)
        strategy.load_policy_state(state["callbacks"][strategy.state_key]["policy"])
        return strategy

    def _strategy_options(self) -> dict[str, Any]:
        settings = self.settings
        highest = min(self.budget_ms, self.folder["span_ms"][1])
        options: dict[str, Any] = {
            "warmup_epochs": settings.warmup_epochs,
            "recalibration_batches": _RECALIBRATION_BATCHES,
            "seed": settings.seed,
        }
        if settings.strategy in SAMPLED:
            options["filter"] = RangeProfilerFilter(self.latency, max=highest)
        else:
            options["penalty"] = LagrangianPenalty(self.latency, baseline=highest)
        if settings.strategy != "random-one-shot":
            options["arc_learning_rate"] = settings.arc_learning_rate
            options["arch_dataloader"] = arch_dataloader(self._data)
        return options

    def _derived(self, strategy: Strategy) -> Architecture:
        """The architecture to train: measured before it is trained, since weights do not change latency."""
        if self.folder.get("architecture"):
            return self.space.validate(self.folder["architecture"])
        for _ in range(_ATTEMPTS):
            if self.settings.strategy in SAMPLED:
                architecture = self._evolved()
            else:
                architecture = self._selected(self._candidates(strategy.probabilities()))
            if self._other_device():
                break
            path = self.folder.path / "candidate.onnx"
            self._export(self.space.freeze(architecture), path)
            self._report("measuring the candidate", 0, 1)
            reading = self._measured(path)
            self._report("measuring the candidate", 1, 1)
            path.unlink()
            # Stricter than the certificate, which is measured once more after the training. A reading that
            # is not valid says nothing against a network that fits by the table.
            if not reading.valid or reading.p10_ms <= self.budget_ms:
                break
            self._say(
                f"a candidate of {self.latency.profile(architecture):.4f} ms by the table measures "
                f"{reading.p10_ms:.4f} ms; the table is corrected and the next-best is tried"
            )
            self._reject(architecture, reading.p10_ms)
        else:
            raise SearchFailedError(
                f"{_ATTEMPTS} candidates were over the budget of {self.budget_ms:.4f} ms when measured"
            )
        self.folder.update(architecture=architecture)
        write_json(self.folder.path / "architecture.json", architecture)
        return architecture

    def _candidates(self, probabilities: Mapping[str, Tensor]) -> list[Architecture]:
        """The best-scoring architectures that use the budget well, or that fit at all."""
        rejected = self._rejected()
        limit: Budget = {self.latency: self.budget_ms}
        high = self._dearest()
        use: Budget = {self.latency: _LEAST_USE * min(self.budget_ms, high)}
        found = list(islice(ranked(self.space, probabilities, limit, use, rejected), _CANDIDATES))
        if not found:
            found = list(islice(ranked(self.space, probabilities, limit, None, rejected), _CANDIDATES))
        if not found:
            raise SearchFailedError(f"no network is left within the budget of {self.budget_ms:.4f} ms")
        return found

    def _dearest(self) -> float:
        """What the dearest network needs by the table of now, in ms; the cheapest has to fit."""
        low, high = self.latency.cost.bounds()
        if self.budget_ms < low:
            raise SearchFailedError(
                f"after correction by measurement the cheapest network needs {low:.4f} ms, more than the "
                f"budget of {self.budget_ms:.4f} ms"
            )
        return high

    def _evolved(self) -> Architecture:
        """The most accurate network that evolution on the trained supernet finds, the budget well used."""
        rejected = self._rejected()
        highest = min(self.budget_ms, self._dearest())
        try:
            within = RangeProfilerFilter(self.latency, min=_LEAST_USE * highest, max=highest)
        except ValueError:
            within = RangeProfilerFilter(self.latency, max=highest)
        evaluate = self._evaluator()
        trials = self.settings.trials
        self._report("searching the supernet", 0, trials)
        # Each correction of the table makes it another search.
        journal = self.folder.path / f"trials-{len(rejected)}.jsonl"
        found = search_trials(
            self.space,
            evaluate,
            RegularizedEvolution(population_size=20, sample_size=10, crossover=0.5),
            {"accuracy": "max"},
            trials=trials,
            filters=[within],
            seed=self.settings.seed,
            journal=journal,
            report=lambda trial: self._report("searching the supernet", trial.number + 1, trials),
        )
        known = [self.space.canonical(architecture) for architecture in rejected]
        for trial in found.top_k(trials):
            if trial.architecture not in known:
                return dict(trial.architecture)
        raise SearchFailedError(f"no network is left within the budget of {self.budget_ms:.4f} ms")

    def _evaluator(self) -> SupernetEvaluator:
        """Accuracy on the selection set, with the supernet's weights, BatchNorm recalibrated."""
        return SupernetEvaluator(
            self.space.cpu(),
            list(islice(retrain_dataloader(self._data), _RECALIBRATION_BATCHES)),
            self._data.val_dataloader(),
            {"accuracy": MulticlassAccuracy(self._facts.num_classes, average="micro")},
        )

    def _selected(self, candidates: list[Architecture]) -> Architecture:
        """The most accurate of a few."""
        evaluate = self._evaluator()
        scores = []
        for number, architecture in enumerate(candidates):
            self._report("comparing candidates", number, len(candidates))
            scores.append(evaluate(architecture)["accuracy"])
        self._report("comparing candidates", len(candidates), len(candidates))
        return candidates[max(range(len(candidates)), key=scores.__getitem__)]

    def _reject(self, architecture: Architecture, measured_ms: float) -> None:
        """Keeps an architecture from coming back, and corrects the table by what it measured."""
        factor = max(1.0, measured_ms / self.latency.profile(architecture))
        old = dataclasses.asdict(self.latency.table.calibration)
        self.folder.update(
            rejected=[*self._rejected(), architecture],
            calibration={name: value * factor for name, value in old.items()},
            architecture=None,
        )
        self.latency = self._latency_profiler(self.latency.table)

    def _rejected(self) -> list[Architecture]:
        rejected: list[Architecture] = self.folder.get("rejected") or []
        return rejected

    # ---- training, export, certificate

    def _trained(self, architecture: Architecture) -> nn.Module:
        """The subnet, trained on from the supernet's weights."""
        settings = self.settings
        # A rejected subnet keeps its checkpoints; the next one gets its own.
        step = f"train-{len(self._rejected())}" if self._rejected() else "train"
        subnet = self.space.freeze(architecture)
        module = Classification(subnet, self._facts.num_classes, lr=settings.train_lr)
        self._fit(
            module,
            step,
            "training the subnet",
            settings.train_epochs,
            retrain_dataloader(self._data),
            callbacks=[StopAtNonFiniteLoss()],
        )
        batches = islice(retrain_dataloader(self._data), _RECALIBRATION_BATCHES)
        return recalibrate(subnet.cpu(), batches).eval()

    def _certified(self, architecture: Architecture, subnet: nn.Module) -> Certificate:
        """Exports, tests, compares with torch, measures, and writes the certificate."""
        path = self.folder.path / "subnet.onnx"
        self._report("export and certificate", 0, 3)
        self._export(subnet, path)
        self._report("export and certificate", 1, 3)
        self._data.setup("test")
        # The one time that the test set is touched.
        test_accuracy = accuracy(path, self._data.test_dataloader(), self._session.runtime)
        self._report("export and certificate", 2, 3)
        certificate = certify(
            path,
            subnet,
            self.latency,
            architecture,
            self.budget_ms,
            [next(iter(self._data.test_dataloader()))[0][:64]],
            test_accuracy=test_accuracy,
            space=self.settings.space,
            data=self._facts.name,
            strategy=self.settings.strategy,
            seed=self.settings.seed,
            say=self._say,
            readings=_READINGS,
        )
        self._report("export and certificate", 3, 3)
        return certificate

    def _export(self, subnet: nn.Module, path: Path) -> None:
        """The file as it is deployed: in the precision of the table."""
        export_onnx(subnet, self._example, path)
        if self._session.precision == "int8":
            quantise_on(self._data, path)

    def _measured(self, path: Path) -> LatencyReading:
        return patient_reading(path, self._session, self._say)

    # ---- Lightning

    def _fit(
        self,
        module: pl.LightningModule,
        step: str,
        what: str,
        epochs: int,
        train_loader: Any,
        callbacks: list[pl.Callback],
    ) -> dict[str, Any]:
        """Fits to the last epoch, from the last checkpoint if there is one; returns that of the end."""
        settings = self.settings
        checkpoint = self.folder.checkpoint(step)
        if not self.folder.get(f"{step} done"):
            if checkpoint.exists():
                _load_checkpoint(checkpoint)  # tells of damage in a line, before Lightning meets it
            with _quiet():
                trainer = pl.Trainer(
                    max_epochs=epochs,
                    accelerator=settings.accelerator,
                    devices=_devices(settings.devices),
                    # Forked, not launched anew: the folder's other steps belong to this process.
                    strategy="auto" if settings.devices in ("1", "auto") else _SEVERAL_DEVICES,
                    precision=settings.precision,  # type: ignore[arg-type]  # Lightning checks it
                    callbacks=[
                        *callbacks,
                        ModelCheckpoint(
                            checkpoint.parent,
                            filename=checkpoint.stem,
                            save_on_train_epoch_end=True,
                            enable_version_counter=False,  # one file, replaced as a whole each epoch
                        ),
                        MetricsFile(self.folder.path / "metrics.csv", step),
                        ReportProgress(self._report, what),
                    ],
                    logger=TensorBoardLogger(self.folder.path / "tensorboard", name=step, version=""),
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    num_sanity_val_steps=0,
                    log_every_n_steps=1,
                )
                try:
                    trainer.fit(
                        module,
                        train_loader,
                        self._data.val_dataloader(),
                        ckpt_path=str(checkpoint) if checkpoint.exists() else None,
                    )
                except SystemExit as stopped:
                    # Lightning turns Ctrl-C into an exit of its own.
                    raise KeyboardInterrupt from stopped
            self.folder.update(**{f"{step} done": True})
        # Also right after the fit: what comes next starts from what a later start would read.
        state = _load_checkpoint(checkpoint)
        module.load_state_dict(state["state_dict"])
        return state


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        _ = state["state_dict"], state["callbacks"]
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise ValueError(
            f"'{path}' is no checkpoint of a search: it is missing, truncated or foreign ({error}). "
            "Remove it and 'run.json' beside the folder's other files to train this step again"
        ) from error
    return state


def _devices(asked: str) -> int | str:
    return int(asked) if asked.isdigit() else asked


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's hints from between the progress bars; warnings about the user's own code stay."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
