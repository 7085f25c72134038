from typing import Any

import onnxruntime
import pytest

from lookup_tables.session import SessionSettings


@pytest.mark.parametrize("threads", [0, -1, True, 1.0, "2"])
def test_threads_must_be_a_positive_integer(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads must be a positive integer"):
        SessionSettings(threads=threads)


def test_unknown_level_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="all, extended, basic, disabled; got 'fast'"):
        SessionSettings(optimisation="fast")  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize(
    "settings",
    [
        SessionSettings(),
        SessionSettings(3, "extended", precision="int8"),
        SessionSettings(runtime="openvino"),
    ],
)
def test_settings_survive_json(settings: SessionSettings) -> None:
    assert SessionSettings.from_json(settings.to_json()) == settings


def test_settings_of_earlier_versions_are_onnx_runtime_in_fp32() -> None:
    read = SessionSettings.from_json({"threads": 2, "optimisation": "extended"})
    assert read == SessionSettings(2, "extended", "onnxruntime", "fp32")


@pytest.mark.parametrize("given", [{"runtime": "tvm"}, {"precision": "fp8"}])
def test_unknown_runtime_and_precision_are_refused(given: dict[str, Any]) -> None:
    (what,) = given
    with pytest.raises(ValueError, match=f"{what} must be one of .*; got '{given[what]}'"):
        SessionSettings(**given)


def test_openvino_has_no_levels_of_optimisation() -> None:
    with pytest.raises(ValueError, match="must be 'all', got 'extended'"):
        SessionSettings(optimisation="extended", runtime="openvino")


@pytest.mark.parametrize("facts", [{}, {"threads": 1}, {"threads": 1, "optimisation": "all", "spin": 1}])
def test_settings_with_missing_or_unknown_facts_are_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must hold exactly optimisation, precision, runtime, threads"):
        SessionSettings.from_json(facts)


def test_options_are_those_of_the_settings() -> None:
    options = SessionSettings(threads=2, optimisation="extended").options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_cpu_time_is_the_clock_at_one_thread_only() -> None:
    assert [SessionSettings(threads=n).clock for n in (1, 2)] == ["thread_cpu", "wall"]
