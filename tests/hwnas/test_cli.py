"""The command line: errors in a line that says what there is, exit codes that scripts can trust."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hwnas import ModelSpace
from hwnas.cli import app
from lookup_tables import LatencyReading, Validation
from lookup_tables.calibrate import accuracy_of
from tests.hwnas.tiny_space import TinyNet, tiny_table

TINY = "tests.hwnas.tiny_space:TinyNet"


def broken(num_classes: int, in_channels: int) -> None:
    raise KeyError("wide")


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["search", "--space", "nope"], "unknown space 'nope'; there are "),
        (["search", "--data", "nope"], "unknown data 'nope'; there are fashion-mnist, digits"),
        (["search", "--data", "cifar10", "--data-folder", "absent"], "CIFAR-10 needs data_batch_1.bin"),
        (["search", "--data", "imagenet-folder"], "The folder holds train/<class>/ and val/<class>/"),
        (
            ["search", "--strategy", "nope"],
            "unknown strategy 'nope'; there are darts, gumbel-darts, proxyless",
        ),
        (["search", "--budget", "half"], "such as 50%; got 'half'"),
        (["search", "--budget", "150%"], "from 0 to 100 %"),
        (["search", "--epochs", "2", "--warmup-epochs", "2"], "leave at least one epoch to search"),
        (["profile", "--input-shape", "28"], "such as 1x28x28; got '28'"),
        (["table", "show", "absent.json"], "absent.json"),
        (["search", "--data", "json:loads"], "data 'json:loads' must be a LightningDataModule, or a class"),
        (["search", "--space", "json:loads"], "must be a class or function that takes num_classes and in"),
        (["search", "--space", "tests.hwnas.test_cli:broken"], "KeyError: 'wide' (HWNAS_TRACEBACK=1 shows"),
        (["search", "--out", __file__], "needs a folder that it can make and write to"),
        (["search", "--out", f"{__file__}/below"], "needs a folder that it can make and write to"),
        (["search", "--max-latency-ms", "inf"], "above 0 and finite"),
        (["table", "build", "--space", TINY, "--out", "."], "cannot read '.' as a latency table"),
        (
            ["table", "build", "--space", TINY, "--out", f"{__file__}/below/table.json"],
            "cannot be written (Not",
        ),
        (["verify", "absent.onnx"], "absent.onnx"),
    ],
)
def test_mistakes_are_told_in_a_line_and_exit_with_two(arguments, text, tmp_path):
    out = ["--out", tmp_path / "run", "--data", "digits"] if arguments[0] == "search" else []
    result = call(*([arguments[0], *out, *arguments[1:]]))
    assert result.exit_code == 2
    assert text in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_table_show_prints_device_error_and_entries(tmp_path):
    tiny_table().save(tmp_path / "table.json")
    result = call("table", "show", tmp_path / "table.json", "--entries", 3)
    assert result.exit_code == 0
    for text in ("held-out error", "noise floor", "device", "entry"):
        assert text in result.output


def test_table_show_warns_of_a_table_that_predicts_badly_and_draws_it(tmp_path):
    table = tiny_table()
    bad = replace(table, accuracy=replace(table.accuracy, within_10_percent=60.0))
    bad.save(tmp_path / "table.json")
    plot = tmp_path / "plots" / "table.png"
    result = call("table", "show", tmp_path / "table.json", "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "predicts only 60 %" in " ".join(result.output.split())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_table_diff_prints_what_differs(tmp_path):
    table = tiny_table()
    table.save(tmp_path / "a.json")
    entries = {key: replace(e, p10_us=2 * e.p10_us) for key, e in list(table.entries.items())[1:]}
    lacking = tuple(net for net in table.subnets if set(net.parts) <= entries.keys())
    device = replace(table.device, cpu="another CPU")
    replace(table, entries=entries, subnets=lacking, device=device).save(tmp_path / "b.json")
    result = call("table", "diff", tmp_path / "a.json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert f"{len(entries)} entries in common, 1 and 0 in one alone" in text
    assert "2.00 in the median" in text
    assert "another CPU" in text


@pytest.mark.parametrize(("bias", "code"), [(1.0, 0), (1.3, 1)])
def test_table_validate_measures_other_networks_and_exits_by_what_it_finds(tmp_path, monkeypatch, bias, code):
    """The machine takes what the table predicts, times the bias."""
    table = replace(tiny_table(), subnets=())
    table.save(tmp_path / "table.json")

    def measured(_, subnets, **rest):
        us = [bias * table.predict_us(net.keys) for net in subnets]
        accuracy = accuracy_of([u / bias for u in us], us, us)
        return Validation(tuple(us), tuple(us), accuracy, round(len(us) * (bias == 1)), 0.9, "thread_cpu")

    monkeypatch.setattr("hwnas.latency_table.validate_table", measured)
    result = call("table", "validate", tmp_path / "table.json", "--space", TINY, "--networks", 6)
    assert result.exit_code == code, result.output
    text = " ".join(result.output.split())
    assert ("covers what it claims" in text) is (code == 0)
    assert "on 6 networks" in text


def test_profile_prints_what_architectures_cost(tmp_path):
    tiny_table().save(tmp_path / "table.json")
    result = call("profile", "--space", TINY, "--device", tmp_path / "table.json")
    assert result.exit_code == 0
    for text in ("cheapest", "dearest", "MAC", "parameter", "ms"):
        assert text in result.output


@pytest.mark.parametrize("of", ["subnet", "supernet"])
def test_export_writes_the_file_of_an_architecture_and_a_checkpoint(tmp_path, of):
    space = ModelSpace(TinyNet())
    architecture = {**space.default(), "layer0": "k3"}
    (tmp_path / "architecture.json").write_text(json.dumps(architecture))
    network = space if of == "supernet" else space.freeze(architecture)
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    result = call(
        "export", tmp_path / "architecture.json", tmp_path / "last.ckpt", "--space", TINY,
        "--out", tmp_path / "net.onnx",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "net.onnx").exists()


def test_export_refuses_weights_of_something_else(tmp_path):
    (tmp_path / "architecture.json").write_text(json.dumps(ModelSpace(TinyNet()).default()))
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "last.ckpt")
    result = call("export", tmp_path / "architecture.json", tmp_path / "last.ckpt", "--space", TINY)
    assert result.exit_code == 2
    assert "fit neither the subnet" in result.output.replace("\n", " ")


@pytest.mark.parametrize(("median", "code"), [(1e-6, 0), (99.0, 1)])
def test_search_then_verify_exits_by_whether_the_promise_holds(tmp_path, monkeypatch, median, code):
    reads = LatencyReading(1e-6, 1e-6, 1e-6, 1.0, "thread_cpu", True, "")
    monkeypatch.setattr("hwnas.certificate.measure_latency", lambda *_: reads)
    tiny_table().save(tmp_path / "table.json")
    result = call(
        "search", "--space", TINY, "--data", "digits", "--device", tmp_path / "table.json", "--epochs", 1,
        "--train-epochs", 1, "--accelerator", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    again = LatencyReading(median, median, median, 1.0, "thread_cpu", True, "")
    monkeypatch.setattr("hwnas.certificate.measure_latency", lambda *_: again)
    assert call("verify", tmp_path / "run" / "subnet.onnx").exit_code == code
