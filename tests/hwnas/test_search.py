"""A search goes from a space to a certified file, goes on after a kill, and refuses what it cannot keep."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest
import torch

from hwnas.certificate import Certificate
from hwnas.export import read_metadata
from hwnas.non_finite import NonFiniteLossError
from hwnas.search import STRATEGIES, Search, SearchFailedError, SearchSettings
from lookup_tables import LatencyReading, SessionSettings, fingerprint
from lookup_tables.quantise import quantised_nodes
from tests.hwnas.tiny_space import tiny_table

SETTINGS = SearchSettings(
    space="tests.hwnas.tiny_space:TinyNet",
    data="digits",
    epochs=2,
    train_epochs=2,
    batch_size=128,
    accelerator="cpu",
)


class Machine:
    """Stands for the measuring: what it reads is what it is told to read."""

    def __init__(self) -> None:
        self.reads_ms: list[float] = []
        self.count = 0
        self.floor = 1.0
        self.busy = 0  # readings, from now on, that are not valid

    def __call__(self, model, settings) -> LatencyReading:
        self.count += 1
        onnxruntime.InferenceSession(str(model))  # it is a model that runs
        ms = self.reads_ms.pop(0) if self.reads_ms else 0.001
        floor = 8.0 if self.busy > 0 else self.floor
        self.busy -= 1
        valid = floor <= 3.0
        return LatencyReading(ms, ms, ms, floor, "thread_cpu", valid, "" if valid else "busy")


@pytest.fixture
def machine(monkeypatch):
    stands = Machine()
    monkeypatch.setattr("hwnas.certificate.measure_latency", stands)
    return stands


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.json"
    tiny_table().save(path)
    return str(path)


def search(out, report=lambda what, done, total: None, **changes) -> Search:
    return Search(dataclasses.replace(SETTINGS, **changes), out, report, lambda line: None)


def killed_at(step: str, after: int = 1):
    """A report that stops the run as Ctrl-C does, when a step has come so far."""

    def report(what: str, done: int, total: int) -> None:
        if what.startswith(step) and done >= after:
            raise KeyboardInterrupt

    return report


def test_search_leaves_every_file_and_fact(tmp_path, machine, table):
    out = tmp_path / "run"
    certificate = search(out, device_table=table).run()
    assert certificate.passed
    assert {path.name for path in out.iterdir()} >= {
        "subnet.onnx", "certificate.json", "architecture.json", "latency_table.json", "checkpoints",
        "metrics.csv", "tensorboard",
    }  # fmt: skip
    facts = json.loads((out / "certificate.json").read_text())
    assert set(facts) >= {
        "passed", "budget_ms", "predicted_ms", "predicted_interval_ms", "measured_ms", "measured_p10_ms",
        "measured_p90_ms", "noise_floor_percent", "clock", "test_accuracy", "parity_max_abs_diff", "macs",
        "params", "architecture", "space", "device", "runtime", "strategy", "seed", "date",
    }  # fmt: skip
    assert read_metadata(out / "subnet.onnx") == facts
    assert Certificate.load(out / "subnet.onnx") == Certificate.load(out / "certificate.json")
    assert facts["predicted_ms"] <= facts["budget_ms"]
    assert facts["architecture"] == json.loads((out / "architecture.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ends_with_a_network_inside_the_budget(tmp_path, machine, table, strategy):
    certificate = search(tmp_path / "run", device_table=table, strategy=strategy, trials=5).run()
    assert certificate.passed
    assert certificate.strategy == strategy
    assert certificate.predicted_ms <= certificate.budget_ms


@pytest.mark.slow
@pytest.mark.parametrize("step", ["searching (", "searching the supernet"])
def test_killed_search_of_a_sampling_strategy_goes_on_and_tries_nothing_twice(tmp_path, machine, table, step):
    options = {"device_table": table, "strategy": "random-one-shot", "trials": 6}
    whole = search(tmp_path / "whole", **options).run()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", killed_at(step, 4), **options).run()
    seen = []
    resumed = search(tmp_path / "cut", lambda what, done, total: seen.append((what, done)), **options).run()
    assert resumed.architecture == whole.architecture
    assert resumed.test_accuracy == whole.test_accuracy
    tried = [done for what, done in seen if what == "searching the supernet" and done]
    assert tried == ([5, 6] if step == "searching the supernet" else [1, 2, 3, 4, 5, 6])


def test_finished_search_is_read_back_without_measuring(tmp_path, machine, table):
    first = search(tmp_path / "run", device_table=table).run()
    measured = machine.count
    assert search(tmp_path / "run", device_table=table).run() == first
    assert machine.count == measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "after"),
    [("searching", 7), ("comparing", 1), ("measuring", 0), ("training", 12), ("export", 2)],
)
def test_killed_search_goes_on_and_ends_as_one_that_ran_through(tmp_path, machine, table, step, after):
    whole = search(tmp_path / "whole", device_table=table).run()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", killed_at(step, after), device_table=table).run()
    seen = []
    resumed = search(
        tmp_path / "cut", lambda what, done, total: seen.append((what, done)), device_table=table
    ).run()
    assert resumed.architecture == whole.architecture
    assert resumed.test_accuracy == whole.test_accuracy
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "train" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    if step in ("training", "export"):
        assert not any(what.startswith("searching") for what, _ in seen)


def test_candidate_over_the_budget_gives_way_to_another_and_corrects_the_table(tmp_path, machine, table):
    machine.reads_ms = [9.0]
    job = search(tmp_path / "run", device_table=table, budget_percent=90.0)
    # The correction is by what was measured: keep it small enough for others to fit.
    high = json.loads((tmp_path / "table.json").read_text())
    assert high["calibration"]["scale"] == 1.0
    with pytest.raises(SearchFailedError, match="after correction by measurement the cheapest network needs"):
        job.run()
    machine.reads_ms = [0.0]
    other = search(tmp_path / "other", device_table=table, budget_percent=90.0)
    original = other._measured
    first = []

    def slightly_over(path):
        reading = original(path)
        if not first:
            first.append(dataclasses.replace(reading, p10_ms=1.01 * other.budget_ms))
            return first[0]
        return reading

    other._measured = slightly_over  # type: ignore[method-assign]
    certificate = other.run()
    assert certificate.passed
    (rejected,) = other.folder["rejected"]
    assert rejected != certificate.architecture
    assert other.folder["calibration"]["scale"] > 1.0
    assert certificate.predicted_ms <= certificate.budget_ms


def test_invalid_measurement_is_no_pass_and_is_made_again(tmp_path, machine, table):
    machine.floor = 8.0
    certificate = search(tmp_path / "run", device_table=table).run()
    assert not certificate.passed
    assert "invalid" in certificate.reason
    machine.floor = 1.0
    assert search(tmp_path / "run", device_table=table).run().passed


@pytest.mark.parametrize(("busy", "valid"), [(19, True), (20, False)])
def test_certificate_waits_for_the_machine_to_calm_down_twenty_readings_long(
    tmp_path, machine, table, busy, valid
):
    def report(what: str, done: int, total: int) -> None:
        if (what, done) == ("export and certificate", 2):
            machine.busy, machine.count = busy, 0

    certificate = search(tmp_path / "run", report, device_table=table).run()
    assert (certificate.valid, certificate.passed) == (valid, valid)
    assert machine.count == 20


def test_invalid_reading_of_a_candidate_rejects_nothing(tmp_path, machine, table):
    machine.floor, machine.reads_ms = 8.0, [9.0] * 5
    job = search(tmp_path / "run", device_table=table)
    job.run()
    assert job.folder.get("rejected") is None
    assert job.folder.get("calibration") is None


def test_budget_below_the_cheapest_is_refused_with_both_bounds_and_another_can_be_asked(
    tmp_path, machine, table
):
    with pytest.raises(
        ValueError, match=r"budget of 0.001 ms cannot be kept.*cheapest .* dearest .*ask for at least"
    ):
        search(tmp_path / "run", device_table=table, max_latency_ms=0.001).run()
    search(tmp_path / "run", device_table=table, max_latency_ms=0.05)


def test_other_settings_in_a_used_folder_are_refused(tmp_path, machine, table):
    search(tmp_path / "run", device_table=table).run()
    with pytest.raises(ValueError, match=r"holds a run with other settings .seed: 0 there, 1 asked"):
        search(tmp_path / "run", device_table=table, seed=1)


def test_table_of_another_device_is_refused_or_gives_no_pass(tmp_path, machine):
    path = tmp_path / "phone.json"
    tiny_table(dataclasses.replace(fingerprint(), cpu="Cortex-A76")).save(path)
    with pytest.raises(ValueError, match=r"Cortex-A76.*--allow-other-device"):
        search(tmp_path / "run", device_table=str(path)).run()
    with pytest.warns(UserWarning, match="another device"):
        certificate = search(tmp_path / "other", device_table=str(path), allow_other_device=True).run()
    assert not certificate.passed
    assert "another device" in certificate.reason


def test_table_with_missing_entries_names_them_and_the_command(tmp_path, machine):
    path = tmp_path / "thin.json"
    tiny_table(without=2).save(path)
    with pytest.raises(ValueError, match=r"no latency of 2 of .*Sequential.*hwnas table build"):
        search(tmp_path / "run", device_table=str(path)).run()


def test_truncated_table_and_checkpoint_are_named(tmp_path, machine, table):
    broken = tmp_path / "broken.json"
    broken.write_text(tiny_table_text()[:200])
    with pytest.raises(ValueError, match=r"broken.json' is damaged or no latency table"):
        search(tmp_path / "run", device_table=str(broken)).run()
    out = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        search(out, killed_at("comparing", 1), device_table=table).run()
    checkpoint = out / "checkpoints" / "search" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last.ckpt' is no checkpoint of a search"):
        search(out, device_table=table).run()


def tiny_table_text() -> str:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        tiny_table().save(path)
        return path.read_text()


@pytest.mark.filterwarnings("ignore:.*nothing is decided at the end:UserWarning")
@pytest.mark.parametrize(("step", "rate"), [("search", "lr"), ("train", "train_lr")])
def test_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    tmp_path, machine, table, step, rate
):
    with pytest.raises(NonFiniteLossError, match=r"step is (nan|inf).*what was saved before is good"):
        search(tmp_path / "run", device_table=table, epochs=30, train_epochs=30, **{rate: 1e6}).run()


def test_exported_file_is_the_trained_network(tmp_path, machine, table):
    job = search(tmp_path / "run", device_table=table)
    certificate = job.run()
    session = onnxruntime.InferenceSession(str(tmp_path / "run" / "subnet.onnx"))
    (scores,) = session.run(None, {"input": np.zeros((1, 1, 28, 28), dtype=np.float32)})
    assert scores.shape == (1, 10)
    assert certificate.parity_max_abs_diff < 1e-4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"strategy": "magic"}, "unknown strategy 'magic'; there are darts, gumbel-darts, proxyless"),
        ({"budget_percent": 120.0}, "from 0 to 100 %; got 120.0 %"),
        ({"max_latency_ms": -1.0}, "max_latency_ms must be above 0"),
        ({"warmup_epochs": 2}, "leave at least one epoch to search"),
        ({"epochs": 0}, "must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SETTINGS, **change)


def test_table_of_int8_leads_to_an_int8_file_and_certificate(tmp_path, machine, table):
    path = tmp_path / "int8.json"
    tiny_table(settings=SessionSettings(precision="int8")).save(path)
    out = tmp_path / "run"
    certificate = search(out, device_table=str(path), epochs=1, warmup_epochs=0, train_epochs=1).run()
    assert certificate.passed
    assert certificate.runtime["session"]["precision"] == "int8"
    assert quantised_nodes((out / "subnet.onnx").read_bytes()) >= {"stem.1/Conv", "classifier/Gemm"}
    assert certificate.parity_max_abs_diff > 1e-4  # of that very file, as is the accuracy
    with pytest.raises(ValueError, match=r"measured with .*fp32.* differs in precision"):
        search(tmp_path / "other", device_table=table, int8=True).run()


def test_a_choice_of_the_precision_needs_more_than_one_table(tmp_path):
    with pytest.raises(ValueError, match="searched with a table for each precision"):
        search(tmp_path / "run", space="tests.hwnas.test_precision:mixed_space")


def test_unknown_space_and_data_are_refused_with_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"unknown space 'nope'; there are .*small-mobilenet"):
        search(tmp_path / "a", space="nope")
    with pytest.raises(ValueError, match="unknown data 'nope'; there are fashion-mnist, digits"):
        search(tmp_path / "b", data="nope")


def test_table_that_was_completed_is_read_again(tmp_path, machine):
    path = tmp_path / "table.json"
    tiny_table(without=2).save(path)
    with pytest.raises(ValueError, match="hwnas table build"):
        search(tmp_path / "run", device_table=str(path)).run()
    tiny_table().save(path)
    assert search(tmp_path / "run", device_table=str(path)).run().passed


def test_other_table_is_taken_after_one_of_another_device_was_refused(tmp_path, machine, table):
    phone = tmp_path / "phone.json"
    tiny_table(dataclasses.replace(fingerprint(), cpu="Cortex-A76")).save(phone)
    with pytest.raises(ValueError, match="--allow-other-device"):
        search(tmp_path / "run", device_table=str(phone)).run()
    assert search(tmp_path / "run", device_table=table).run().passed


def test_checkpoint_truncated_in_the_middle_of_a_search_is_named(tmp_path, machine, table):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        search(out, killed_at("searching", 16), device_table=table, epochs=3).run()
    checkpoint = out / "checkpoints" / "search" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last.ckpt' is no checkpoint of a search"):
        search(out, device_table=table, epochs=3).run()


def test_diverged_search_keeps_a_checkpoint(tmp_path, machine, table):
    with pytest.raises(NonFiniteLossError) as told:
        search(tmp_path / "run", device_table=table, epochs=30, lr=1e6).run()
    print("TOLD", told.value, list((tmp_path / "run" / "checkpoints").rglob("*")))
    assert list((tmp_path / "run" / "checkpoints").rglob("*.ckpt"))


def test_budget_above_the_dearest_is_judged_as_asked(tmp_path, machine, table):
    assert search(tmp_path / "run", device_table=table, max_latency_ms=99.0).run().budget_ms == 99.0
