"""What is said of an exported file is said of that very file, in INT8 and in the mobile format too."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from typer.testing import CliRunner

from hwnas import ModelSpace
from hwnas.certificate import Certificate
from hwnas.cli import app
from hwnas.export import export_onnx, load_session, parity, read_metadata, run
from hwnas.mobile import mobile_usability, nodes_in, quantise_file, to_ort
from lookup_tables import LatencyReading, SessionSettings
from lookup_tables.quantise import quantised_nodes
from profilers import LatencyProfiler
from tests.hwnas.tiny_space import EXAMPLE, TinyNet, tiny_table

IMAGES = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def subnet():
    torch.manual_seed(0)
    space = ModelSpace(TinyNet())
    network = space.freeze({**space.default(), "layer1": "k5"})
    network(IMAGES)  # statistics that are not 0 and 1
    return network.eval()


@pytest.fixture(scope="module")
def fp32(subnet, tmp_path_factory):
    return export_onnx(subnet, EXAMPLE, tmp_path_factory.mktemp("fp32") / "subnet.onnx", metadata={"a": [1]})


def test_operators_are_named_after_their_modules(fp32):
    names = [node.name for node in onnx.load(str(fp32)).graph.node]
    assert len(set(names)) == len(names)
    assert {"stem.1/Conv", "layers.1.1/Conv", "head.0/Conv", "classifier/Gemm"} <= set(names)


def test_int8_file_is_near_the_network_and_keeps_its_facts(subnet, fp32, tmp_path):
    path = quantise_file(fp32, tmp_path / "int8.onnx", [IMAGES])
    with torch.no_grad():
        size = float(subnet(IMAGES).abs().max())
    assert 1e-5 < parity(subnet, path, [IMAGES]) < 0.1 * size
    assert read_metadata(path) == {"a": [1]}


def test_only_the_chosen_modules_are_quantised(fp32, tmp_path):
    path = quantise_file(fp32, tmp_path / "mixed.onnx", [IMAGES], ["layers.1", "head"])
    assert quantised_nodes(path.read_bytes()) == {"layers.1.1/Conv", "head.0/Conv"}
    assert nodes_in(onnx.load(str(fp32)).graph, ["layers.1", "layers.9"]) == [
        "layers.1.1/Conv",
        "layers.1.2/Relu",
    ]


@pytest.mark.parametrize("int8", [False, True])
def test_mobile_format_computes_the_same_and_keeps_the_facts(subnet, fp32, tmp_path, int8, capfd):
    source = quantise_file(fp32, tmp_path / "int8.onnx", [IMAGES]) if int8 else fp32
    path = to_ort(source, tmp_path / "subnet.ort")
    same, found = (run(load_session(p), IMAGES) for p in (source, path))
    assert abs(same - found).max() < 1e-4
    assert path.read_bytes()[4:8] == b"ORTM"
    assert read_metadata(path) == {"a": [1]}
    assert capfd.readouterr().out == ""


def test_wrong_names_and_foreign_files_are_told(fp32, tmp_path):
    with pytest.raises(ValueError, match=r"must be named \*\.ort"):
        to_ort(fp32, tmp_path / "subnet.onnx")
    foreign = tmp_path / "foreign.onnx"
    foreign.write_text("no model")
    with pytest.raises(ValueError, match=r"foreign\.onnx"):
        to_ort(foreign, tmp_path / "subnet.ort")
    with pytest.raises(ValueError, match=r"foreign\.onnx"):
        quantise_file(foreign, tmp_path / "int8.onnx", [IMAGES])


def test_usability_is_told_for_each_accelerator(fp32, capfd):
    report = mobile_usability(fp32)
    for text in ("NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram", "Advice: "):
        assert text in report
    assert capfd.readouterr().out == ""


@pytest.fixture
def trained(tmp_path):
    space = ModelSpace(TinyNet())
    (tmp_path / "architecture.json").write_text(json.dumps(space.default()))
    torch.save(space.freeze(space.default()).state_dict(), tmp_path / "last.ckpt")
    return [
        tmp_path / "architecture.json",
        tmp_path / "last.ckpt",
        "--space",
        "tests.hwnas.tiny_space:TinyNet",
    ]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_certifies_the_file_that_phones_run(trained, tmp_path, monkeypatch):
    measured = []

    def reads(path, settings):
        measured.append((path.name, settings.precision, settings.threads))
        return LatencyReading(0.5, 0.4, 0.6, 1.0, "wall", True, "")

    monkeypatch.setattr("hwnas.certificate.measure_latency", reads)
    out = tmp_path / "net.onnx"
    result = call(
        "export", *trained, "--out", out, "--data", "digits", "--int8", "--ort", "--max-latency-ms", 1,
        "--threads", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Checking NNAPI" in result.output
    certificate = Certificate.load(tmp_path / "net.ort")
    assert certificate == Certificate.load(out) == Certificate.load(tmp_path / "net.ort.certificate.json")
    assert certificate.passed
    assert (certificate.strategy, certificate.predicted_ms) == ("given", None)
    assert certificate.runtime["session"]["precision"] == "int8"
    assert certificate.test_accuracy is not None
    assert {tensor.data_type for tensor in onnx.load(str(out)).graph.initializer} >= {onnx.TensorProto.INT8}
    assert call("verify", tmp_path / "net.ort").exit_code == 0
    assert measured == [("net.ort", "int8", 2)] * 2


def test_certificate_of_an_export_says_what_the_table_predicts_or_that_there_is_none(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "hwnas.certificate.measure_latency",
        lambda path, settings: LatencyReading(0.01, 0.01, 0.01, 1.0, "thread_cpu", True, ""),
    )
    table, space = tiny_table(settings=SessionSettings(precision="int8")), ModelSpace(TinyNet())
    table.save(tmp_path / "int8.json")
    out = tmp_path / "net.onnx"
    asked = ["export", *trained, "--out", out, "--max-latency-ms", 1]
    with_table = [*asked, "--device", tmp_path / "int8.json"]
    result = call(*with_table, "--data", "digits")  # in INT8, as the table
    assert result.exit_code == 0, result.output
    certificate, latency = Certificate.load(out), LatencyProfiler(space, EXAMPLE, table)
    assert certificate.predicted_ms == latency.profile(space.default())
    assert certificate.predicted_interval_ms == latency.interval(space.default())
    assert quantised_nodes(out.read_bytes())
    plain = call(*asked)
    assert Certificate.load(out).predicted_ms is None
    assert "no latency table was given" in plain.output
    for more, says in (
        (["--data", "digits", "--ort"], "nothing about one in the mobile format"),
        (["--threads", 2], "what is asked differs in threads"),
        ([], "name them with --data"),
    ):
        assert says in call(*with_table, *more).output.replace("\n", " ")
    without_budget = call("export", *trained, "--out", out, "--device", tmp_path / "int8.json")
    assert "give a budget, too" in without_budget.output


def test_export_in_int8_needs_real_images(trained, tmp_path):
    result = call("export", *trained, "--out", tmp_path / "net.onnx", "--int8")
    assert result.exit_code == 2
    assert "name them with --data" in result.output.replace("\n", " ")


@pytest.mark.slow
def test_mobile_file_is_measured_as_it_is(fp32, tmp_path):
    from lookup_tables import SessionSettings, measure_latency

    path = to_ort(fp32, tmp_path / "subnet.ort")
    assert measure_latency(path, SessionSettings(), seconds=0.1).median_ms > 0
