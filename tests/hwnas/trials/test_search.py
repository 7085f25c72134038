from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hwnas import LayerChoice, ModelSpace
from hwnas.trials import Method, RandomSearch, RegularizedEvolution, Trials, search
from profilers import ParamsProfiler, RangeProfilerFilter
from profilers.space import Architecture
from tests.contracts.search import conditional_space, parameters, worth

EVOLUTION = RegularizedEvolution(8, 3)
BEST = {"accuracy": "max"}


def dies_at_depth_3(architecture: Architecture) -> dict[str, float]:
    if architecture["depth"] == 3 and architecture["op"] == "plain":
        os.kill(os.getpid(), signal.SIGKILL)
    return worth(architecture)


def raises_at_depth_3(architecture: Architecture) -> dict[str, float]:
    if architecture["depth"] == 3:
        raise LookupError("too deep")
    return worth(architecture)


def pool() -> ProcessPoolExecutor:
    # Forked: the workers share the imported modules of the tests.
    return ProcessPoolExecutor(2, mp_context=get_context("fork"))


def run(trials: int = 30, **more: object) -> Trials:
    given: dict[str, object] = {"evaluate": worth, "method": EVOLUTION, "objectives": BEST}
    return search(conditional_space(), trials=trials, **{**given, **more})  # type: ignore[arg-type]


# ---- objectives and costs


def test_a_profiler_can_be_an_objective() -> None:
    found = run(objectives={"accuracy": "max", "size": "min"}, costs={"size": parameters()})
    for trial in found.trials:
        assert trial.metrics == {
            **worth(trial.architecture),
            "size": parameters().profile(trial.architecture),
        }
    sizes = [trial.metrics["size"] for trial in found.pareto_front()]
    assert sizes == sorted(sizes, reverse=True)


def test_metric_that_is_missing_or_no_number_is_a_failed_trial() -> None:
    with pytest.warns(UserWarning, match="trial 0 failed with ValueError: .*'top1'"):
        found = run(trials=1, objectives={"top1": "max"})
    assert found.trials[0].is_failed
    with pytest.warns(UserWarning, match="nan"):
        run(trials=1, evaluate=lambda a: {"accuracy": float("nan")})
    with pytest.warns(UserWarning, match="'latency'.* are looked up as costs, and evaluated too"):
        run(trials=1, costs={"latency": parameters()})


def test_exhausted_space_is_said() -> None:
    size = conditional_space().size
    with pytest.warns(
        UserWarning, match=f"no more than {size} architectures within the filters; 1000 trials"
    ):
        found = run(trials=1000, method=RandomSearch())
    assert found.is_exhausted
    assert len(found.trials) == size


def test_evolution_finds_a_better_architecture_than_random_search() -> None:
    layers = [nn.Identity() for _ in range(5)]
    space = ModelSpace(nn.Sequential(*(LayerChoice(layers, label=f"layer{i}") for i in range(8))))

    def right(architecture: Architecture) -> dict[str, float]:
        return {"right": sum(option == 2 for option in architecture.values())}

    def mean(method: Method) -> float:
        found = [
            search(space, right, method, {"right": "max"}, trials=120, seed=seed).best.metrics["right"]
            for seed in range(5)
        ]
        return sum(found) / len(found)

    assert mean(EVOLUTION) > mean(RandomSearch()) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials must be at least 1"),
        ({"trials": 2.5}, "a whole number, or None.*got 2.5"),
        ({"workers": 0}, "at least 1"),
        ({"workers": 2}, "1 without an executor; got 2"),
    ],
)
def test_numbers_without_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_network_in_place_of_a_space_and_class_in_place_of_a_method_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a search is of a ModelSpace, by a method.*the class RandomSearch"):
        run(method=RandomSearch)
    with pytest.raises(TypeError, match="got Linear and RandomSearch"):
        search(torch.nn.Linear(1, 1), worth, RandomSearch(), {"accuracy": "max"}, trials=1)  # type: ignore[arg-type]


def test_costs_and_filters_of_another_space_are_refused() -> None:
    other = ModelSpace(torch.nn.Sequential(LayerChoice([torch.nn.ReLU(), torch.nn.Linear(2, 2)], label="op")))
    profiler = ParamsProfiler(other)
    with pytest.raises(ValueError, match=r"a cost in parameter belongs to another space.*'op': \(0, 1\)"):
        run(costs={"size": profiler})
    with pytest.raises(ValueError, match="a cost in parameter belongs to another space"):
        run(filters=[RangeProfilerFilter(profiler, max=3)])


# ---- executors


def test_workers_are_kept_busy_and_no_more() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def slow(architecture: Architecture) -> dict[str, float]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return worth(architecture)

    with ThreadPoolExecutor(8) as threads:
        found = run(evaluate=slow, executor=threads, workers=3)
    assert most == 3
    assert [trial.number for trial in found.trials] == list(range(30))


def test_process_pool_evaluates_and_tells_errors() -> None:
    with pool() as executor, pytest.warns(UserWarning, match="LookupError: too deep"):
        found = run(evaluate=raises_at_depth_3, executor=executor, workers=2)
    assert len(found.trials) == 30
    for trial in found.trials:
        assert trial.is_failed == (trial.architecture["depth"] == 3)
        assert trial.is_failed or trial.metrics == worth(trial.architecture)


def test_worker_that_dies_fails_its_own_trial_alone_where_pools_can_be_made(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="BrokenProcessPool"):
        found = run(40, evaluate=dies_at_depth_3, executor=pool, workers=2, journal=tmp_path / "trials.jsonl")
    deadly = [t for t in found.trials if t.architecture["depth"] == 3 and t.architecture["op"] == "plain"]
    assert deadly
    assert [trial for trial in found.trials if trial.is_failed] == deadly
    assert [trial.number for trial in found.trials] == list(range(40))


def test_broken_pool_stops_the_search_which_then_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each trial that fails
        while True:
            calls += 1
            with pool() as executor:
                try:
                    found = run(40, evaluate=dies_at_depth_3, executor=executor, workers=2, journal=path)
                    break
                except RuntimeError as error:
                    assert "runs nothing any more" in str(error)  # noqa: PT017  # as often as a pool breaks
    assert calls > 1
    failed = [trial for trial in found.trials if trial.is_failed]
    assert len(failed) <= 2 * (calls - 1)
    assert all("BrokenProcessPool" in str(trial.error) for trial in failed)
    assert [trial.number for trial in found.trials] == list(range(40))


def test_pool_that_was_broken_before_is_an_error() -> None:
    with pool() as executor:
        with pytest.raises(BrokenExecutor):
            executor.submit(os._exit, 1).result()
        with (
            pytest.warns(UserWarning, match="Broken"),
            pytest.raises(RuntimeError, match="runs nothing any more"),
        ):
            run(executor=executor)


def test_function_that_cannot_be_sent_is_an_error_at_once() -> None:
    with pool() as executor, pytest.raises(TypeError, match="at the top of a module"):
        run(evaluate=lambda architecture: worth(architecture), executor=executor)


@pytest.mark.slow
def test_dask_evaluates_and_resumes(tmp_path: Path) -> None:
    import distributed

    path = tmp_path / "trials.jsonl"
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # one for each trial that fails
        first = run(10, evaluate=raises_at_depth_3, executor=executor, workers=2, journal=path)
        whole = run(30, evaluate=raises_at_depth_3, executor=executor, workers=2, journal=path)
    assert whole.trials[:10] == first.trials
    assert len({str(trial.architecture) for trial in whole.trials}) == 30
    assert all(trial.is_failed == (trial.architecture["depth"] == 3) for trial in whole.trials)


# ---- interruptions


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupt_leaves_every_finished_trial_in_the_journal(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    finished: list[str] = []

    def interrupts(trial: object) -> None:
        if len(finished) >= 12:
            raise KeyboardInterrupt

    def evaluate(architecture: Architecture) -> dict[str, float]:
        finished.append(str(architecture))
        return worth(architecture)

    with ThreadPoolExecutor(workers) as threads:
        with pytest.raises(KeyboardInterrupt):
            run(30, evaluate=evaluate, executor=threads, workers=workers, journal=path, report=interrupts)
        before = list(finished)
        found = run(30, evaluate=evaluate, executor=threads, workers=workers, journal=path)
    assert len(found.trials) == 30
    # Those in flight when it was interrupted may run again; nothing that was written does.
    again = [name for name in finished[len(before) :] if name in before]
    assert len(again) <= workers - 1


PROGRAM = """
import sys, time
from hwnas.trials import RegularizedEvolution, search
from tests.contracts.search import conditional_space, worth

def slow(architecture):
    print(architecture, flush=True)
    time.sleep(0.02)
    return worth(architecture)

found = search(conditional_space(), slow, RegularizedEvolution(8, 3), {"accuracy": "max"}, trials=40,
               journal=sys.argv[1])
"""


@pytest.mark.slow
def test_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, path], stdout=subprocess.PIPE, text=True)

    process = start()
    while not path.exists() or path.read_bytes().count(b"\n") < 16:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    first = process.communicate()[0].splitlines()
    written = path.read_bytes().count(b"\n") - 1
    assert 15 <= written < 40
    process = start()
    second = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert len(second) == 40 - written  # nothing finished is evaluated again, and nothing is left out
    whole = run(40)
    assert [*first[:written], *second] == [str(trial.architecture) for trial in whole.trials]


def test_number_is_no_executor() -> None:
    with pytest.raises(TypeError, match=r"a function that makes one.*Got 4"):
        run(2, executor=4)
