from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from hwnas import InputChoice, LayerChoice, ModelSpace, ValueChoice
from hwnas.call import Call
from hwnas.executable import ExecutableModel, Status
from hwnas.nn import Linear

HERE = "tests.hwnas.test_executable"


class Net(nn.Module):
    """Features in two widths, then one or two of three branches."""

    def __init__(self, features: int) -> None:
        super().__init__()
        width = ValueChoice([2, 4], label="width")
        self.first = Linear(features, width)
        self.branches = nn.ModuleList(LayerChoice([nn.Tanh(), nn.ReLU()]) for _ in range(3))
        self.pick = InputChoice(3, n_chosen=2, label="pick")
        self.last = Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        scores: Tensor = self.last(self.pick([branch(hidden) for branch in self.branches]))
        return scores


def judge(network: nn.Module, report: Callable[[Mapping[str, float]], None], rate: float) -> dict[str, Any]:
    """Numbers that depend on the weights, on what is drawn, and on a setting."""
    for epoch in range(2):
        report({"epoch": epoch})
    drawn = torch.randn(2, next(network.parameters()).shape[1])
    return {"score": network(drawn).sum().detach(), "rate": rate, "pid": os.getpid()}


def fails(network: nn.Module, report: Callable[[Mapping[str, float]], None], how: str) -> Mapping[str, float]:
    report({"step": 1.0})
    if how == "stop":
        raise KeyboardInterrupt
    if how == "exit":
        raise SystemExit(3)
    raise OSError("the disk is full")


def plain_function(network: nn.Module) -> dict[str, float]:
    return {"parameters": sum(parameter.numel() for parameter in network.parameters())}


SPACE = Call(f"{HERE}:Net", {"features": 5})
MODEL = ExecutableModel(
    SPACE, Call(f"{HERE}:judge", {"rate": ValueChoice([0.1, 0.2, 0.4], label="rate")}), seed=3
)
ARCHITECTURE = {
    "width": 4, "pick": (0, 2), "branches.0": 1, "branches.1": 0, "branches.2": 1, "rate": 0.4
}  # fmt: skip


def frozen(training: Callable[..., Any], **changes: Any) -> ExecutableModel:
    architecture = {label: option for label, option in ARCHITECTURE.items() if label != "rate"}
    return ExecutableModel(SPACE, training).freeze({**architecture, **changes})


def without_pid(model: ExecutableModel) -> dict[str, Any]:
    assert model.metrics is not None
    return {name: value for name, value in model.metrics.items() if name != "pid"}


def through_json(model: ExecutableModel) -> ExecutableModel:
    return ExecutableModel.from_json(json.loads(json.dumps(model.to_json())))


# ---- one space for the network and its training


def test_the_space_joins_the_choices_of_the_network_and_of_its_training() -> None:
    space = MODEL.search_space()
    assert space.options["rate"] == (0.1, 0.2, 0.4)
    assert space.size == 2 * 3 * 2**3 * 3 == 3 * ModelSpace(Net(5)).size
    drawn = space.random(torch.Generator().manual_seed(0))
    assert space.canonical(drawn) == drawn
    assert MODEL.evaluate(drawn)["rate"] == drawn["rate"]


def test_choices_of_the_training_join_the_space_of_this_process_too() -> None:
    living = ModelSpace(Net(5))
    model = ExecutableModel(living, MODEL.training)
    space = model.search_space()
    assert space.network is living.network
    assert list(space.options) == [*living.options, "rate"]
    assert ExecutableModel(space, MODEL.training).search_space() is space  # it has them already
    fewer = Call(f"{HERE}:judge", {"rate": ValueChoice([0.1, 0.2], label="rate")})
    with pytest.raises(ValueError, match="label 'rate' names a ValueChoice over"):
        ExecutableModel(space, fewer).search_space()
    assert model.freeze(ARCHITECTURE).run().metrics == pytest.approx(model.evaluate(ARCHITECTURE))


# ---- build and run


def test_a_network_is_built_again_the_same_and_disturbs_no_random_numbers() -> None:
    model = MODEL.freeze(ARCHITECTURE)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = model.build(), through_json(model).build()
    assert torch.equal(torch.rand(1), expected)
    assert type(first.first) is nn.Linear
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    other = ExecutableModel(SPACE, MODEL.training, seed=4).freeze(ARCHITECTURE).build()
    assert not torch.equal(other.state_dict()["first.weight"], first.state_dict()["first.weight"])


def test_a_run_reports_and_ends_with_its_metrics() -> None:
    seen: list[ExecutableModel] = []
    ended = MODEL.freeze(ARCHITECTURE).run(seen.append)
    assert [model.status for model in seen] == ["training"] * 3 + ["trained"]
    assert [len(model.intermediate) for model in seen] == [0, 1, 2, 2]
    assert seen[-1] is ended
    assert ended.intermediate == ({"epoch": 0.0}, {"epoch": 1.0})
    assert ended.metrics is not None
    assert ended.metrics["rate"] == 0.4
    assert MODEL.status == "initialized"  # a record does not change


def test_a_model_is_trained_elsewhere_as_it_would_be_here() -> None:
    model = through_json(MODEL.freeze(ARCHITECTURE))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(ExecutableModel.run, model).result()
        found = pool.submit(MODEL.evaluate, ARCHITECTURE).result()
    here = model.run()
    assert (there.status, here.status) == ("trained", "trained")
    assert there.metrics is not None
    assert there.metrics["pid"] == found["pid"] != os.getpid()
    assert without_pid(there) == without_pid(here)
    assert {**there.metrics, "pid": 0} == {**found, "pid": 0}


def test_weights_of_a_space_of_this_process_are_inherited() -> None:
    space = ModelSpace(Net(5))
    model = ExecutableModel(space, plain_function).freeze({**space.default(), "width": 2})
    built = model.build()
    assert torch.equal(built.first.weight, space.network.first.weight[:2])  # type: ignore[union-attr, index]
    assert model.run().metrics == {"parameters": 5 * 2 + 2 + 2 * 3 + 3}
    with pytest.raises(TypeError, match=r"its space is a ModelSpace of this process: give a Call"):
        model.to_json()
    with pytest.raises(TypeError, match=r"its training is a function of this process"):
        ExecutableModel(SPACE, plain_function).to_json()


# ---- what goes wrong


def test_an_error_is_recorded_with_its_text() -> None:
    ended = frozen(Call(f"{HERE}:fails", {"how": "raise"})).run()
    assert ended.status == "failed"
    assert ended.metrics is None
    assert ended.intermediate == ({"step": 1.0},)
    assert ended.error is not None
    assert ended.error.rstrip().endswith("OSError: the disk is full")
    assert "in fails" in ended.error


@pytest.mark.parametrize(("how", "status"), [("stop", "interrupted"), ("exit", "failed")])
def test_an_interrupt_is_told_from_an_exit(how: str, status: str) -> None:
    assert frozen(Call(f"{HERE}:fails", {"how": how})).run().status == status


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 3}, "choice 'width' has the options .2, 4.; got 3"), ({"depth": 1}, "unknown: .'depth'.")],
)
def test_an_architecture_that_the_space_refuses_is_invalid(change: dict[str, Any], message: str) -> None:
    model = frozen(plain_function, **change)
    ended = model.run()
    assert ended.status == "invalid"
    with pytest.raises(ValueError, match=message):
        raise ValueError(ended.error)
    with pytest.raises(ValueError, match=message):
        model.build()


def test_a_space_that_cannot_be_made_fails() -> None:
    model = ExecutableModel(Call("no_such:Net"), plain_function).freeze({"op": 0})
    ended = model.run()
    assert ended.status == "failed"
    assert "'no_such:Net' cannot be imported" in str(ended.error)
    ended = ExecutableModel(Call("builtins:dict"), plain_function).freeze({"op": 0}).run()
    assert "must make a torch.nn.Module" in str(ended.error)


def test_metrics_that_are_no_mapping_fail() -> None:
    ended = frozen(lambda network: 0.5).run()
    assert ended.status == "failed"
    assert "mapping from names to numbers; got 0.5" in str(ended.error)


def test_what_goes_wrong_in_a_trial_is_raised() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.raises(OSError, match="the disk is full"):
        ExecutableModel(SPACE, Call(f"{HERE}:fails", {"how": "raise"})).evaluate(
            frozen(plain_function).architecture or {}
        )
    assert torch.equal(torch.rand(1), expected)  # of this process, as if there had been no trial


def test_a_failed_model_is_tried_again() -> None:
    attempts = itertools.count()

    def sometimes(network: nn.Module) -> dict[str, float]:
        if next(attempts) == 0:
            raise OSError("busy")
        return {"score": 1.0}

    failed = frozen(sometimes).run()
    again = failed.retry()
    assert (failed.status, again.status, again.error) == ("failed", "retrying", None)
    assert again.run().metrics == {"score": 1.0}


# ---- status

NEXT = {
    ("initialized", "frozen"), ("frozen", "training"), ("frozen", "invalid"), ("training", "trained"),
    ("training", "failed"), ("training", "interrupted"), ("training", "invalid"), ("failed", "retrying"),
    ("interrupted", "retrying"), ("retrying", "training"), ("retrying", "invalid"),
}  # fmt: skip


@pytest.mark.parametrize("before", get_args(Status))
@pytest.mark.parametrize("after", get_args(Status))
def test_only_sensible_transitions_are_made(before: Status, after: Status) -> None:
    facts: dict[str, Any] = {"architecture": None if before == "initialized" else ARCHITECTURE}
    model = ExecutableModel(
        SPACE, MODEL.training, status=before, metrics={} if before == "trained" else None, **facts
    )
    added = {"architecture": ARCHITECTURE, "metrics": {"score": 1.0} if after == "trained" else None}
    if (before, after) in NEXT:
        assert model.becomes(after, **added).status == after
    else:
        with pytest.raises(ValueError, match=f"a model that is {before} becomes .*; got '{after}'"):
            model.becomes(after, **added)


def test_a_model_without_an_architecture_is_neither_built_nor_run() -> None:
    with pytest.raises(ValueError, match=r"model.freeze\(architecture\).build\(\)"):
        MODEL.build()
    with pytest.raises(ValueError, match=r"a model that is initialized becomes frozen; got 'training'"):
        MODEL.run()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"status": "done"}, "a status is one of initialized, .*; got 'done'"),
        ({"status": "frozen"}, "a model that is frozen has an architecture"),
        ({"status": "trained", "architecture": {}}, "a trained model has metrics"),
        ({"metrics": {"score": 1.0}}, "no other has; got"),
    ],
)
def test_facts_that_contradict_one_another_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExecutableModel(SPACE, plain_function, **facts)


# ---- on disk


def test_every_state_comes_back_from_json(tmp_path: Path) -> None:
    model = MODEL.freeze({**ARCHITECTURE, "pick": [0, 2]})
    for state in (MODEL, model, model.run(), frozen(Call(f"{HERE}:fails", {"how": "raise"})).run()):
        back = through_json(state)
        assert back == state
        state.save(tmp_path / "model.json")
        assert ExecutableModel.load(tmp_path / "model.json") == state
    assert through_json(model).architecture == ARCHITECTURE  # the pair is a tuple again


def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a model has the facts .*; got .'space'."):
        ExecutableModel.from_json({"space": {}})
    (tmp_path / "half.json").write_text('{"space": ')
    with pytest.raises(ValueError, match=r"half.json' is no model file"):
        ExecutableModel.load(tmp_path / "half.json")


# ---- a LightningModule

LIGHTNING = ExecutableModel(
    Call("tests.hwnas.tiny_space:TinyNet"),
    Call(
        "hwnas.executable:fit",
        {
            "module": "hwnas.classification:Classification",
            "arguments": {"num_classes": 10, "lr": ValueChoice([0.05, 0.2], label="lr")},
            "data": Call(
                "hwnas.data:load_data",
                {"source": "digits", "batch_size": ValueChoice([64, 128], label="batch_size")},
            ),
            "max_epochs": 2,
            "limit_train_batches": 2,
            "limit_val_batches": 1,
            "accelerator": "cpu",
        },
    ),
)


def test_a_lightning_module_is_trained_from_the_recipe_alone() -> None:
    space = LIGHTNING.search_space()
    assert space.size == 4 * ModelSpace(LIGHTNING.space()).size  # type: ignore[arg-type, operator]  # a Call
    model = LIGHTNING.freeze({**space.default(), "lr": 0.2, "batch_size": 128})
    ended, again = model.run(), through_json(model).run()
    assert ended.status == "trained", ended.error
    assert ended.metrics is not None
    assert {"train_loss", "val_loss", "val_acc"} <= ended.metrics.keys()
    assert [set(found) for found in ended.intermediate] == [set(ended.metrics)] * 2
    assert ended.intermediate[-1] == ended.metrics == again.metrics
    slower = LIGHTNING.freeze({**space.default(), "lr": 0.05, "batch_size": 128}).run()
    assert slower.metrics != ended.metrics


class PressesCtrlC(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_a_fit_is_an_interrupt_and_works_again_afterwards() -> None:
    assert isinstance(LIGHTNING.training, Call)
    arguments = {**LIGHTNING.training.arguments, "callbacks": [Call(f"{HERE}:PressesCtrlC")]}
    model = ExecutableModel(LIGHTNING.space, Call("hwnas.executable:fit", arguments))
    # A process that runs tests for another one leaves the signal out.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = model.freeze(model.search_space().default()).run()
        assert ended.status == "interrupted", ended.error
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loss_that_is_no_number_fails() -> None:
    assert isinstance(LIGHTNING.training, Call)
    arguments = {**LIGHTNING.training.arguments, "arguments": {"num_classes": 10, "lr": 1e30}}
    model = ExecutableModel(LIGHTNING.space, Call("hwnas.executable:fit", arguments))
    ended = model.freeze(model.search_space().default()).run()
    assert ended.status == "failed"
    assert "NonFiniteLossError" in str(ended.error)


def test_network_as_space_and_path_as_training_are_refused() -> None:
    call = Call("hwnas.spaces:SmallMobileNet", {"num_classes": 4})
    with pytest.raises(TypeError, match=r"a model's space is a Call.*got Linear"):
        ExecutableModel(space=nn.Linear(1, 1), training=call)
    with pytest.raises(TypeError, match=r"a model's training is a Call.*got str"):
        ExecutableModel(space=call, training="my_code:train")  # type: ignore[arg-type]  # on purpose
