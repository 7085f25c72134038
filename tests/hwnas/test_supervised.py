"""What both ready-made modules promise alike."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.regression import MeanSquaredError, R2Score

from hwnas.classification import Classification
from hwnas.regression import Regression
from hwnas.supervised import Supervised


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def classification(seed: int = 0, **options: Any) -> Supervised:
    return Classification(network(seed), 3, **options)


def regression(seed: int = 0, **options: Any) -> Supervised:
    return Regression(network(seed), **options)


def loader(module: Supervised) -> DataLoader[Any]:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    targets = inputs[:, :3] if isinstance(module, Regression) else inputs[:, :3].argmax(dim=1)
    return DataLoader(list(zip(inputs, targets, strict=True)), batch_size=8)  # type: ignore[arg-type]  # a list is a dataset


def fitted(module: Supervised, max_epochs: int = 2, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", enable_checkpointing=False, max_epochs=max_epochs, **quiet, **options
    )
    trainer.fit(module, loader(module), loader(module))
    return trainer


both = pytest.mark.parametrize("make", [classification, regression])


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.found.append(optimizer.param_groups[0]["lr"])


@both
def test_schedules_are_stepped_after_each_step(make: Any) -> None:
    steps = 12
    expected = {
        "constant": [0.1] * steps,
        "cosine": [0.05 * (1 + torch.cos(torch.tensor(torch.pi * i / steps)).item()) for i in range(steps)],
        "halved": [0.1 * 0.5**i for i in range(steps)],
    }

    def halved(optimizer: Any, total: int) -> Any:
        assert total == steps
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    for name, wanted in expected.items():
        rates = Rates()
        fitted(make(lr=0.1, schedule=halved if name == "halved" else name), 4, callbacks=[rates])
        assert rates.found == pytest.approx(wanted), name


@both
def test_one_cycle_of_twenty_steps_anneals_as_one_of_nineteen(make: Any) -> None:
    rates = {steps: Rates() for steps in (19, 20)}
    for steps, callback in rates.items():
        fitted(make(lr=0.1), steps, limit_train_batches=1, callbacks=[callback])
    assert rates[20].found[0] == pytest.approx(rates[19].found[0], rel=0.02)
    assert rates[20].found[-1] < 1e-3


@both
def test_optimisers_are_made_of_the_groups_that_decay_and_those_that_do_not(make: Any) -> None:
    for optimizer in ("sgd", "adamw", torch.optim.RMSprop):
        made = make(
            lr=0.3, schedule="constant", optimizer=optimizer, weight_decay=0.01
        ).configure_optimizers()
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        assert type(made) is (kinds[optimizer] if isinstance(optimizer, str) else optimizer)
        assert [group["weight_decay"] for group in made.param_groups] == [0.01, 0.0]
        assert [len(group["params"]) for group in made.param_groups] == [2, 4]
        assert made.param_groups[0]["lr"] == 0.3
    plain = make(schedule="constant", optimizer="sgd", momentum=0.0).configure_optimizers()
    assert not plain.param_groups[0]["nesterov"]


CLASSES: dict[Any, Any] = {
    classification: (MulticlassAccuracy(3), MulticlassF1Score(3)),
    regression: (MeanSquaredError(num_outputs=1), R2Score()),
}


@both
def test_any_metric_is_logged_under_its_name_for_every_stage(make: Any) -> None:
    first, second = CLASSES[make]
    names = [type(metric).__name__ for metric in (first, second)]
    forms: list[tuple[Any, list[str]]] = [
        (first, names[:1]),
        ([first, second], names),
        ({"a": first, "b": second}, ["a", "b"]),
        (MetricCollection({"c": second}), ["c"]),
    ]
    for metrics, expected in forms:
        module = make(metrics=metrics)
        trainer = fitted(module, 1)
        stages = {f"{stage}_{name}" for stage in ("train", "val") for name in [*expected, "loss"]}
        assert set(trainer.callback_metrics) == stages
        assert trainer.test(module, loader(module), verbose=False)[0].keys() == {
            f"test_{name}" for name in [*expected, "loss"]
        }


@both
def test_a_logged_metric_is_that_of_all_outputs_together(make: Any) -> None:
    metric: Metric = CLASSES[make][1]
    module = make(metrics={"it": metric})
    trainer = fitted(module, 1)
    module.eval()
    with torch.no_grad():
        pairs = [(module(inputs), targets) for inputs, targets in loader(module)]
    expected = metric.clone()(torch.cat([o for o, _ in pairs]), torch.cat([t for _, t in pairs]))
    assert float(trainer.callback_metrics["val_it"]) == pytest.approx(float(expected), rel=1e-5)


# ---- a teacher


@both
def test_a_teacher_is_left_as_it_is_and_in_no_checkpoint(make: Any) -> None:
    teacher = network(1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    module = make(teacher=teacher)
    fitted(module)
    assert not any(part.training for part in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert module.state_dict().keys() == make().state_dict().keys()
    assert len(list(module.parameters())) == len(list(make().parameters()))


@both
def test_the_weight_goes_from_the_targets_alone_to_the_teacher_alone(make: Any) -> None:
    def after(**options: Any) -> Tensor:
        torch.manual_seed(2)
        module = make(**options)
        fitted(module, 1)
        return module.network[0].weight.detach()

    assert torch.equal(after(), after(teacher=network(1), distillation_weight=0.0))
    one, other = (
        after(teacher=network(1), distillation_weight=weight, metrics=CLASSES[make][0])
        for weight in (0.5, 1.0)
    )
    assert not torch.equal(one, other)


@both
def test_a_student_comes_to_agree_with_its_teacher(make: Any) -> None:
    teacher = network(1)

    def distance(module: Supervised) -> float:
        inputs = torch.cat([inputs for inputs, _ in loader(module)])
        with torch.no_grad():
            return float(module.imitation_loss(module.eval()(inputs), teacher(inputs)))

    module = make(teacher=teacher, distillation_weight=1.0, lr=0.05)
    module.network[3] = nn.Identity()  # no dropout: it is to agree exactly
    start = distance(module)
    fitted(module.train(), 60)
    assert distance(module) < 0.1 * start


@both
def test_a_teacher_of_other_outputs_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"a teacher's outputs have the shape .*\(8, 5\) and \(8, 3\)"):
        fitted(make(teacher=nn.Linear(4, 5)), 1)


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "rmsprop"}, "optimizer is 'sgd', 'adamw' or a function; got 'rmsprop'"),
        ({"schedule": "step"}, "schedule is 'one-cycle', .*; got 'step'"),
        ({"distillation_weight": 1.5}, "a share from 0 to 1; got 1.5"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@both
def test_bfloat16_reaches_the_teacher(make: Any) -> None:
    teacher = network(1)
    fitted(make(teacher=teacher), 1, precision="bf16-true")
    assert teacher[0].weight.dtype == torch.bfloat16


def test_volumes_are_trained_as_well() -> None:
    torch.manual_seed(0)
    volumes = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2))
    assert Classification(volumes, 2)(torch.zeros(3, 1, 2, 2, 2)).shape == (3, 2)


@both
def test_a_schedule_without_an_end_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="'one-cycle' needs to know how many steps there are"):
        fitted(make(), max_epochs=-1)
