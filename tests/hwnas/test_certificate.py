"""A certificate passes by its rule alone, and can be checked again."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch

from hwnas.certificate import (
    Certificate,
    certify,
    deployed_session,
    judge,
    patient_reading,
    runtime_facts,
    verify,
)
from hwnas.export import export_onnx
from hwnas.mobile import quantise_file
from lookup_tables import LatencyReading, SessionSettings, fingerprint
from tests.hwnas.tiny_space import tiny_table


def reading(median: float, floor: float = 1.0, valid: bool = True) -> LatencyReading:
    return LatencyReading(median, median, median, floor, "thread_cpu", valid, "" if valid else "too noisy")


@pytest.mark.parametrize(
    ("median", "floor", "passes"),
    [(1.0, 0.0, True), (1.0099, 1.0, True), (1.0101, 1.0, False), (1.0199, 2.9, True), (1.0201, 2.9, False)],
)
def test_latency_may_exceed_the_budget_by_the_floor_but_never_by_more_than_two_percent(median, floor, passes):
    assert judge(reading(median, floor), 1.0)[0] is passes


def test_invalid_measurement_never_passes():
    passed, reason = judge(reading(0.1, floor=5.0, valid=False), 1.0)
    assert not passed
    assert "too noisy" in reason


def test_only_invalid_readings_are_repeated(monkeypatch, tmp_path):
    reads = [reading(0.1, 5.0, False), reading(9.0), reading(0.1)]
    monkeypatch.setattr("hwnas.certificate.measure_latency", lambda path, settings: reads.pop(0))
    assert patient_reading(tmp_path, SessionSettings()).median_ms == 9.0


def test_as_many_readings_are_taken_as_are_asked_for(monkeypatch, tmp_path):
    reads = [*[reading(0.1, 5.0, False)] * 7, reading(9.0)]
    monkeypatch.setattr("hwnas.certificate.measure_latency", lambda path, settings: reads.pop(0))
    assert patient_reading(tmp_path, SessionSettings(), readings=8).median_ms == 9.0
    with pytest.raises(ValueError, match="readings must be at least 1, got 0"):
        patient_reading(tmp_path, SessionSettings(), readings=0)


@pytest.fixture
def certified(tmp_path):
    path = export_onnx(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.zeros(1, 4), tmp_path / "net.onnx")
    certificate = Certificate(
        passed=True, valid=True, reason="", budget_ms=1.0, predicted_ms=0.9, predicted_interval_ms=(0.8, 1.0),
        measured_ms=0.9, measured_p10_ms=0.9, measured_median_ms=0.95, measured_p90_ms=1.0,
        noise_floor_percent=1.0, clock="thread_cpu",
        test_accuracy=0.9, parity_max_abs_diff=0.0, macs=8.0, params=10.0,
        architecture={"op": 0}, space="s",
        data="d", strategy="darts", seed=0, device=fingerprint().to_json(),
        runtime=runtime_facts(SessionSettings()), date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    certificate.save(path, tmp_path / "certificate.json")
    return path, certificate


def test_certificate_is_the_same_in_the_file_and_beside_it(certified, tmp_path):
    path, certificate = certified
    assert Certificate.load(path) == Certificate.load(tmp_path / "certificate.json") == certificate


def test_verify_measures_again_and_says_whether_the_promise_holds(certified, monkeypatch):
    path, _ = certified
    for median, holds in ((0.5, True), (1.5, False)):
        monkeypatch.setattr("hwnas.certificate.measure_latency", lambda *_, m=median: reading(m))
        assert verify(path).holds is holds


def test_verify_says_what_makes_this_another_device(certified, monkeypatch, tmp_path):
    path, certificate = certified
    phone = {**certificate.device, "cpu": "Cortex-A76"}
    dataclasses.replace(certificate, device=phone).save(path, tmp_path / "certificate.json")
    monkeypatch.setattr("hwnas.certificate.measure_latency", lambda *_: reading(0.5))
    assert any("Cortex-A76" in line for line in verify(path).other_device)


def test_a_certificate_of_before_had_a_median_alone(certified):
    _, certificate = certified
    facts = certificate.to_json()
    del facts["measured_median_ms"]
    old = Certificate.from_json(facts, "old.json")
    assert old.measured_median_ms == old.measured_ms == 0.9


def test_file_without_certificate_is_told(tmp_path):
    path = export_onnx(torch.nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "bare.onnx")
    with pytest.raises(ValueError, match=r"bare.onnx' carries no certificate"):
        verify(path)


class Latency:
    """What `certify` asks of a `LatencyProfiler`: half a millisecond, whatever the network."""

    def __init__(self, **settings):
        self.table = tiny_table(settings=SessionSettings(**settings))

    def profile(self, architecture):
        return 0.5

    def interval(self, architecture):
        return 0.4, 0.6


def test_a_file_that_is_not_the_subnet_gets_no_certificate(tmp_path):
    path = export_onnx(torch.nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"net.onnx' is not to be used"):
        certify(path, torch.nn.Linear(4, 2), Latency(), {}, 1.0, [torch.ones(3, 4)])
    assert not (tmp_path / "certificate.json").exists()


def test_weights_that_are_no_numbers_are_told_as_such(tmp_path):
    net = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(net.weight, torch.nan)
    path = export_onnx(net, torch.zeros(1, 4), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="outputs that are no numbers"):
        certify(path, net, Latency(), {}, 1.0, [torch.ones(3, 4)])


def test_a_table_of_one_precision_certifies_no_file_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr("hwnas.certificate.measure_latency", lambda *_: reading(0.5))
    network, images = torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.rand(3, 4)
    fp32 = export_onnx(network, images[:1], tmp_path / "fp32.onnx")
    int8 = quantise_file(fp32, tmp_path / "int8.onnx", [images])
    with pytest.raises(ValueError, match=r"fp32.onnx' computes in fp32, and the latency table is of int8"):
        certify(fp32, network, Latency(precision="int8"), {}, 1.0, [images])
    with pytest.raises(ValueError, match=r"int8.onnx' computes in int8, and the latency table is of fp32"):
        certify(int8, network, Latency(), {}, 1.0, [images])
    certificate = certify(int8, network, Latency(precision="int8"), {}, 1.0, [images])
    assert certificate.passed
    assert certificate.parity_max_abs_diff > 1e-3  # what the quantisation changes is told, and no error
    assert Certificate.load(int8).runtime["session"]["precision"] == "int8"


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_a_table_of_openvino_certifies_what_openvino_computes(tmp_path, monkeypatch):
    """Its outputs are compared, not ONNX Runtime's."""
    monkeypatch.setattr("hwnas.certificate.measure_latency", lambda *_: reading(0.5))
    monkeypatch.setattr("hwnas.export.run", lambda *_: pytest.fail("asked ONNX Runtime"))
    network, images = torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.rand(3, 4)
    path = export_onnx(network, images[:1], tmp_path / "net.onnx")
    latency = Latency(runtime="openvino")
    monkeypatch.setattr("hwnas.certificate.fingerprint", lambda *_: latency.table.device)
    certificate = certify(path, network, latency, {}, 1.0, [images])
    assert certificate.passed
    assert certificate.parity_max_abs_diff < 1e-5
    assert certificate.runtime["session"]["runtime"] == "openvino"


def test_what_is_asked_of_the_session_must_be_what_the_table_was_measured_with():
    table = tiny_table(settings=SessionSettings(2, precision="int8"))
    assert deployed_session(table) == deployed_session(table, threads=2, int8=True) == table.settings
    with pytest.raises(ValueError, match=r"measured with .*threads=2.* differs in threads, runtime: leave"):
        deployed_session(table, threads=1, runtime="openvino")
    with pytest.raises(ValueError, match="differs in precision"):
        deployed_session(tiny_table(), int8=True)
    assert deployed_session(None, int8=True) == SessionSettings(precision="int8")
