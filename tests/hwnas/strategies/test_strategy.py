from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hwnas import LayerChoice, ModelSpace
from hwnas.classification import Classification
from hwnas.recalibrate import recalibrate
from hwnas.strategies import DARTS, ENAS, NonFiniteLossError
from profilers.penalty import LagrangianPenalty, SampleProfilerPenalty
from tests.hwnas.strategies.tiny import (
    CLASSES,
    EVERY,
    STRATEGIES,
    Noisy,
    TableProfiler,
    TinyNet,
    assert_equal,
    classification,
    fit,
    loaders,
    logits_of,
    space_of,
    trainer,
)

# Going on in the folder of before is what resuming is.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
every_differentiable = pytest.mark.parametrize("name", STRATEGIES)
every_strategy = pytest.mark.parametrize("name", EVERY)


class Steps(pl.Callback):
    """Counts optimizer steps, and the architecture steps by what a fit of the strategy shows."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.optimizer_steps = 0
        self.moved_in: list[int] = []
        self._before: dict[str, Tensor] = {}

    def on_before_zero_grad(self, *_: Any) -> None:
        self.optimizer_steps += 1

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        now = logits_of(self.strategy)
        if self._before and any(not torch.equal(now[label], self._before[label]) for label in now):
            self.moved_in.append(batch_idx)
        self._before = now

    def on_train_epoch_start(self, *_: Any) -> None:
        self._before = logits_of(self.strategy)


@every_differentiable
def test_one_architecture_step_opens_each_accumulation_window(name: str) -> None:
    strategy = STRATEGIES[name](arc_learning_rate=0.1)
    steps = Steps(strategy)
    _, trainer = fit(strategy, None, steps, batches=5, max_epochs=2, accumulate_grad_batches=2)
    assert steps.moved_in == [0, 2, 4] * 2  # the last window of an epoch is short
    assert trainer.global_step == 6


@every_differentiable
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    ],
    ids=["clipping", "bf16", "all"],
)
def test_trainer_options_train_weights_and_logits(name: str, options: dict[str, Any]) -> None:
    strategy = STRATEGIES[name](arc_learning_rate=0.1)
    module = classification(schedule="one-cycle")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    _, trainer = fit(strategy, module, max_epochs=2, **options)
    assert trainer.global_step == 8 // options.get("accumulate_grad_batches", 1)
    assert any(not torch.equal(value, before[key]) for key, value in module.named_parameters())
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(p.max() - p.min() > 2e-3 for p in strategy.probabilities().values())


@every_strategy
def test_schedule_stops_and_checkpoints_follow_the_subnet(name: str, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=1)
    stop = EarlyStopping("val_acc", mode="max", patience=1)
    strategy = EVERY[name](arc_learning_rate=0.1)
    module = classification(lr=0.0)  # nothing is learned: the second epoch without progress stops
    _, trainer = fit(strategy, module, stop, best, max_epochs=20, enable_checkpointing=True)
    assert trainer.current_epoch < 20
    assert best.best_model_score is not None
    assert best.best_model_score == stop.best_score
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])


class Metrics(pl.Callback):
    """What was logged by the end of each epoch."""

    def __init__(self) -> None:
        self.of_epoch: dict[int, dict[str, float]] = {}

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._keep(trainer, trainer.current_epoch - 1)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._keep(trainer, trainer.current_epoch - 1)

    def _keep(self, trainer: pl.Trainer, epoch: int) -> None:
        self.of_epoch[epoch] = {name: float(value) for name, value in trainer.callback_metrics.items()}


class KilledError(Exception):
    pass


class Killer(pl.Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise KilledError


class Search:
    """One search of three epochs with everything that must come back."""

    def __init__(self, name: str, folder: Path, *callbacks: pl.Callback, at_train_end: bool = True) -> None:
        self.module = classification()
        penalty = LagrangianPenalty(TableProfiler(space_of(self.module)), baseline=4.0)
        self.strategy = EVERY[name](arc_learning_rate=0.1, penalty=penalty)
        self.accumulated = 1 if name == "darts-second-order" else 2
        self.metrics = Metrics()
        saver = ModelCheckpoint(folder, save_last=True, save_top_k=-1, save_on_train_epoch_end=at_train_end)
        self.callbacks = (self.metrics, saver, *callbacks)

    def run(self, ckpt_path: Path | None = None, seed: int = 5, max_epochs: int = 3) -> Search:
        options: dict[str, Any] = {"enable_checkpointing": True, "accumulate_grad_batches": self.accumulated}
        _, self.trainer = fit(
            self.strategy, self.module, *self.callbacks, ckpt_path=ckpt_path, seed=seed,
            max_epochs=max_epochs, **options,
        )  # fmt: skip
        return self

    def everything(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "strategy": self.strategy.state_dict(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "schedule": self.trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
            "random": torch.get_rng_state(),
            "metrics": self.metrics.of_epoch[2],
        }


@every_strategy
@pytest.mark.parametrize("at_train_end", [True, False], ids=["train-end", "validation-end"])
def test_resumed_search_equals_uninterrupted_one(name: str, at_train_end: bool, tmp_path: Path) -> None:
    whole = Search(name, tmp_path, at_train_end=at_train_end).run()
    # The same schedule, ended early: another process goes on from its first checkpoint.
    (first,) = tmp_path.glob("epoch=0-*.ckpt")
    again = Search(name, tmp_path, at_train_end=at_train_end).run(first, seed=99)
    assert_equal(again.everything(), whole.everything())
    assert again.metrics.of_epoch[1] == whole.metrics.of_epoch[1]


@every_strategy
def test_search_killed_inside_an_epoch_goes_on_from_the_last_checkpoint(name: str, tmp_path: Path) -> None:
    whole = Search(name, tmp_path / "whole").run()
    with pytest.raises(KilledError):
        Search(name, tmp_path / "killed", Killer(2, 3)).run()
    again = Search(name, tmp_path / "killed").run(tmp_path / "killed" / "last.ckpt", seed=99)
    assert_equal(again.everything(), whole.everything())


@every_differentiable
def test_checkpoint_holds_tensors_and_plain_python_only(name: str, tmp_path: Path) -> None:
    Search(name, tmp_path).run(max_epochs=1)
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert any("logits" in str(state) for state in loaded["callbacks"].values())


# ---- what an architecture step leaves behind


class Around(pl.Callback):
    """Stands before and after the strategy, and compares what must not move between."""

    def __init__(self) -> None:
        self.before: dict[str, Any] | None = None
        self.compared = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        now = {
            "state": {key: value.clone() for key, value in module.state_dict().items()},
            "gradients": [p.grad if p.grad is None else p.grad.clone() for p in module.parameters()],
            "asking": [p.requires_grad for p in module.parameters()],
        }
        if self.before is None:
            self.before = now
        else:
            assert_equal(now, self.before)
            self.before, self.compared = None, self.compared + 1


@every_strategy
def test_architecture_step_leaves_weights_gradients_and_buffers_alone(name: str) -> None:
    module, around = classification(), Around()
    next(module.parameters()).requires_grad_(False)
    strategy = EVERY[name](arc_learning_rate=0.1)
    trainer_ = trainer(around, strategy, around, max_epochs=2)
    trainer_.fit(module, *loaders())
    assert around.compared == 8
    assert not next(module.parameters()).requires_grad


@every_differentiable
def test_architecture_parameters_are_in_no_optimizer_of_the_user(name: str) -> None:
    strategy = STRATEGIES[name]()
    module, trainer_ = fit(strategy)
    mine = {id(parameter) for parameter in strategy.logits.parameters()}
    assert not mine & {id(parameter) for parameter in module.parameters()}
    groups = trainer_.optimizers[0].param_groups
    assert not mine & {id(parameter) for group in groups for parameter in group["params"]}


class Faulty(pl.LightningModule):
    """Returns what it is told to for batches whose first label is ``at``."""

    def __init__(self, at: int, returned: Any) -> None:
        super().__init__()
        self.space = ModelSpace(TinyNet())
        self.at, self.returned = at, returned

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        loss = F.cross_entropy(self.space(images), labels.clamp(max=CLASSES - 1))
        return self.returned(loss) if int(labels[0]) == self.at else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def marked_batches(mark: int, ordinary: int = 2) -> DataLoader[Any]:
    """Ordinary batches, then one that is marked by its label."""
    labels = [*[torch.zeros(4, dtype=torch.long)] * ordinary, torch.full((4,), mark)]
    return DataLoader([(torch.randn(4, 1, 8, 8), label) for label in labels], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def nothing(loss: Tensor) -> Any:
    return None


def as_dictionary(loss: Tensor) -> Any:
    return {"loss": loss, "more": 1}


def not_a_number(loss: Tensor) -> Any:
    return loss * torch.nan


def failing(loss: Tensor) -> Any:
    raise KilledError


@every_differentiable
def test_error_in_an_architecture_step_leaves_no_trace(name: str) -> None:
    module = Faulty(9, failing)
    strategy = STRATEGIES[name](arch_dataloader=marked_batches(9))
    with pytest.raises(KilledError):
        trainer(strategy).fit(module, marked_batches(1))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.space.gates is None
    assert "log" not in vars(module)


@every_differentiable
@pytest.mark.parametrize("returned", [nothing, as_dictionary])
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.:UserWarning")
def test_training_step_may_return_a_dictionary_or_nothing(name: str, returned: Any) -> None:
    strategy = STRATEGIES[name](arch_dataloader=marked_batches(9))
    trainer(strategy).fit(Faulty(9, returned), marked_batches(9))
    assert strategy.architecture()


@every_differentiable
@pytest.mark.parametrize("step", ["weight", "architecture"])
def test_loss_that_is_no_number_stops_before_any_weight_is_touched(name: str, step: str) -> None:
    module = Faulty(9, not_a_number)
    marked = {"weight": (9, 1), "architecture": (1, 9)}[step]
    strategy = STRATEGIES[name](arch_dataloader=marked_batches(marked[1]))
    before: dict[str, Any] = {}

    class Keep(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            before.update({key: value.clone() for key, value in module.state_dict().items()})

    with pytest.raises(NonFiniteLossError, match=rf"{step} step is nan in epoch 0, step 2.*resume"):
        trainer(Keep(), strategy).fit(module, marked_batches(marked[0]))
    weights = {key for key, _ in module.named_parameters()}
    assert_equal(
        {k: v for k, v in module.state_dict().items() if k in weights}, {k: before[k] for k in weights}
    )


def test_checkpoint_before_a_loss_that_is_no_number_can_be_resumed_from(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    batches = marked_batches(9)

    class SecondEpoch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            module.at = 9 if trainer.current_epoch == 1 else -1

    def run(*callbacks: pl.Callback, **options: Any) -> None:
        strategy = DARTS(arch_dataloader=marked_batches(1))
        made = trainer(strategy, saver, *callbacks, max_epochs=2, enable_checkpointing=True)
        made.fit(Faulty(-1, not_a_number), batches, **options)

    with pytest.raises(NonFiniteLossError):
        run(SecondEpoch())
    run(ckpt_path=tmp_path / "last.ckpt")


# ---- validation


class Recorder(pl.Callback):
    """The supernet's state around each validation."""

    def __init__(self) -> None:
        self.validations = 0

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._before = {key: value.clone() for key, value in space_of(module).state_dict().items()}

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert_equal(dict(space_of(module).state_dict()), self._before)
        self.validations += 1


@every_strategy
def test_validation_judges_the_recalibrated_subnet_and_leaves_the_supernet_alone(name: str) -> None:
    strategy, module, recorder = EVERY[name](arc_learning_rate=0.1), classification(), Recorder()
    training, validation = DataLoader(Noisy(32, 1, 0.0), batch_size=8), loaders(noise=0.0)[1]
    made = trainer(strategy, recorder, max_epochs=2)
    made.fit(module, training, validation)
    subnet = recalibrate(strategy.space.freeze(strategy.validated), training).eval()
    losses = [F.cross_entropy(subnet(images), labels).detach() for images, labels in validation]
    assert float(made.callback_metrics["val_loss"]) == pytest.approx(float(sum(losses) / 2), rel=1e-5)
    assert float(made.callback_metrics["supernet_val_loss"]) != float(made.callback_metrics["val_loss"])
    assert recorder.validations == 3  # Lightning's sanity check is one


class ZeroedHead(pl.Callback):
    """Swaps weights for the validation, as averaged weights (EMA) are swapped in."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._kept = {key: value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad():
            for parameter in space_of(module).network.head.parameters():
                parameter.zero_()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.load_state_dict(self._kept)


@every_strategy
@pytest.mark.parametrize("is_first", [True, False])
def test_weights_that_are_swapped_for_validation_are_seen(name: str, is_first: bool) -> None:
    callbacks = [ZeroedHead(), EVERY[name]()]
    made = trainer(*(callbacks if is_first else reversed(callbacks)))
    made.fit(classification(), *loaders())
    assert float(made.callback_metrics["val_loss"]) == pytest.approx(math.log(CLASSES))
    assert float(made.callback_metrics["supernet_val_loss"]) == pytest.approx(math.log(CLASSES))


class TwoLoaders(Faulty):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.space(images), labels))
        self.log("val_which", float(dataloader_idx))


@every_differentiable
def test_two_validation_loaders_are_told_apart(name: str) -> None:
    made = trainer(STRATEGIES[name]())
    training, validation = loaders()
    made.fit(TwoLoaders(-1, nothing), training, [validation, loaders()[1]])
    for index in (0, 1):
        assert float(made.callback_metrics[f"val_which/dataloader_idx_{index}"]) == index
        assert float(made.callback_metrics[f"supernet_val_which/dataloader_idx_{index}"]) == index


# ---- what the user's module keeps


class Collecting(pl.LightningModule):
    """Collects what its steps see, and logs at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ModelSpace(TinyNet())
        self.seen: dict[str, list[int]] = {"train": []}
        self.validated: list[int] = []
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.seen["train"].append(batch_idx)
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch_idx)
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.log("count", float(len(self.validated)))
        self.validated.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@every_strategy
def test_what_the_users_module_collects_is_of_its_own_steps_alone(name: str) -> None:
    module = Collecting()
    _, made = fit(EVERY[name](), module, num_sanity_val_steps=0)
    assert module.steps == 4
    assert module.seen == {"train": [0, 1, 2, 3]}
    assert made.callback_metrics["count"] == 2.0


# ---- errors


@every_strategy
def test_network_without_one_space_and_manual_optimisation_are_refused(name: str) -> None:
    plain = Classification(nn.Flatten(), CLASSES)
    with pytest.raises(ValueError, match=r"the one ModelSpace inside.*Classification contains 0"):
        trainer(EVERY[name]()).fit(plain, *loaders())
    two = Faulty(-1, nothing)
    two.other = ModelSpace(TinyNet())
    with pytest.raises(ValueError, match="Faulty contains 2"):
        trainer(EVERY[name]()).fit(two, loaders()[0])
    manual = Faulty(-1, nothing)
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization = False"):
        trainer(EVERY[name]()).fit(manual, loaders()[0])


def test_two_strategies_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one strategy decides.*\['DARTS', 'RandomOneShot'\]"):
        trainer(EVERY["darts"](), EVERY["random-one-shot"]()).fit(classification(), *loaders())


@pytest.mark.parametrize("name", [*STRATEGIES, "enas"])
def test_penalty_of_another_kind_is_refused(name: str) -> None:
    profiler = TableProfiler(space_of(classification()))
    make: Any = ENAS if name == "enas" else STRATEGIES[name]
    wrong = (LagrangianPenalty if name == "enas" else SampleProfilerPenalty)(profiler, 5.0)
    with pytest.raises(TypeError, match=f"takes a penalty of .*; got {type(wrong).__name__}"):
        make(penalty=wrong)


@every_differentiable
def test_architecture_batches_must_come_from_somewhere(name: str) -> None:
    with pytest.raises(ValueError, match=r"arch_dataloader=…\), or validation batches"):
        trainer(STRATEGIES[name]()).fit(Faulty(-1, nothing), loaders()[0])
    with pytest.raises(ValueError, match="loader of the architecture batches is empty"):
        trainer(STRATEGIES[name](arch_dataloader=[])).fit(Faulty(-1, nothing), loaders()[0])


@every_strategy
def test_architecture_before_the_fit_says_what_is_missing(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"has not seen a space yet.*Trainer\(callbacks="):
        EVERY[name]().architecture()


@every_differentiable
def test_checkpoint_of_another_space_names_the_choices(name: str) -> None:
    strategy, other = STRATEGIES[name](), STRATEGIES[name]()
    fit(strategy)
    space = ModelSpace(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="op")))
    other.prepare_for(space)
    with pytest.raises(
        ValueError, match=r"another space.*'act' \(2 there, 0 here\).*'op' \(3 there, 2 here\)"
    ):
        other.load_state_dict(strategy.state_dict())


@every_strategy
@pytest.mark.parametrize("options", [{"warmup_epochs": -1}, {"recalibration_batches": 0}])
def test_impossible_counts_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="warmup_epochs must be at least 0"):
        EVERY[name](**options)


@every_differentiable
def test_logits_rest_during_the_warm_up(name: str) -> None:
    strategy = STRATEGIES[name](arc_learning_rate=0.1, warmup_epochs=2)
    fit(strategy, max_epochs=2)
    rested = logits_of(strategy)
    fit(strategy, max_epochs=1)
    assert_equal(logits_of(strategy), rested)
    fit(longer := STRATEGIES[name](arc_learning_rate=0.1, warmup_epochs=2), max_epochs=3)
    assert any(not torch.equal(rested[label], logits) for label, logits in logits_of(longer).items())
