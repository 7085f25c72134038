import functools
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lookup_tables import export
from lookup_tables.export import to_onnx

Example = tuple[nn.Module, tuple[Tensor, ...]]


class Residual(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.narrow, self.widen = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.hardsigmoid(self.widen(torch.relu(self.narrow(self.pool(x)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, weights = self.attention(x, x, x)
        return attended, weights


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(x)  # no ONNX operator


def on_meta(module: nn.Module, *shapes: tuple[int, ...]) -> Example:
    return module.eval().to("meta"), tuple(torch.empty(shape, device="meta") for shape in shapes)


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 10))


def optimised(model: bytes, level: onnxruntime.GraphOptimizationLevel, path: str) -> Counter[str]:
    """The operators that ONNX Runtime would run."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = path
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def runs(model: bytes) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    given = {i.name: np.ones(i.shape, dtype=np.float32) for i in session.get_inputs()}
    return list(session.run(None, given))


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (Residual(8, 3), [(1, 8, 6, 6)]),
        (head(), [(1, 8, 4, 4)]),
        (SqueezeExcite(8), [(1, 8, 4, 4)]),
        pytest.param(
            nn.Sequential(Residual(8, 5), SqueezeExcite(8), head()), [(1, 8, 6, 6)], marks=pytest.mark.slow
        ),
        pytest.param(Attention(), [(1, 5, 8)], marks=pytest.mark.slow),
    ],
    ids=["residual", "head", "squeeze-excite", "network", "attention"],
)
def test_runtime_runs_the_operators_of_the_deployed_file(
    module: nn.Module, shapes: list[tuple[int, ...]], tmp_path: object
) -> None:
    example = on_meta(module, *shapes)
    real, inputs = export._materialised("it", *example)
    plain = torch.onnx.export(real, inputs, dynamo=True, external_data=False, verbose=False)
    assert plain is not None
    deployed = plain.model_proto.SerializeToString()
    ours = to_onnx({"it": example})["it"]
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_ENABLE_ALL, levels.ORT_ENABLE_EXTENDED):
        found = optimised(ours, level, f"{tmp_path}/a.onnx")
        assert found == optimised(deployed, level, f"{tmp_path}/b.onnx")


def test_one_export_by_dynamo_serves_many_modules_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    by_dynamo: list[int] = []
    slow = export._by_dynamo
    monkeypatch.setattr(export, "_by_dynamo", lambda some: (by_dynamo.append(len(some)), slow(some))[1])
    blocks = {f"{w}/{k}": on_meta(Residual(w, k), (1, w, 6, 6)) for w in (4, 6, 8) for k in (3, 5)}
    models = to_onnx(blocks)
    assert sum(by_dynamo) == 1
    shapes = [tuple(runs(models[name])[0].shape) for name in blocks]
    assert shapes == [(1, w, 6, 6) for w in (4, 6, 8) for _ in (3, 5)]


def test_module_whose_operators_follow_each_other_as_in_others_needs_no_export_by_dynamo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_dynamo: list[str] = []
    slow = export._by_dynamo
    monkeypatch.setattr(export, "_by_dynamo", lambda some: (by_dynamo.extend(some), slow(some))[1])
    conv, relu = nn.Conv2d(4, 4, 1), nn.ReLU()
    chains = {
        "to relu": [conv, relu],
        "from relu": [relu, conv],
        "both": [conv, relu, conv],
        "pool": [conv, nn.MaxPool2d(2), relu, conv],
        "again": [relu, conv, relu],
    }
    models = to_onnx({name: on_meta(nn.Sequential(*chain), (1, 4, 6, 6)) for name, chain in chains.items()})
    assert sorted(by_dynamo) == ["again", "pool"]  # the others have no way that these lack
    assert operators_of(models["both"]) == ("Conv", "Relu", "Conv")


@pytest.mark.parametrize(
    ("module", "shape", "operators"),
    [
        (nn.ZeroPad2d((0, 1, 0, 1)), (1, 2, 4, 4), ("Pad",)),
        (nn.Linear(4, 3, bias=False), (1, 4), ("Gemm",)),
        (nn.Linear(4, 3, bias=False), (1, 2, 4), ("MatMul",)),
        (nn.Linear(4, 3), (1, 4), ("Gemm",)),
    ],
)
def test_older_exporter_writes_what_dynamo_does(
    module: nn.Module, shape: tuple[int, ...], operators: tuple[str, ...]
) -> None:
    example = export._materialised("it", *on_meta(module, shape))
    quick = export._by_torchscript(example)
    assert quick is not None
    assert tuple(node.op_type for node in quick.graph.node) == operators
    assert export._operators(quick) == export._operators(export._by_dynamo({"it": example})["it"])


def test_widths_of_a_padding_by_axes_stay() -> None:
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2])
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 2])
    numbers = {"widths": [0, 1], "axes": [0]}
    constants = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()]
    node = onnx.helper.make_node("Pad", ["x", "widths", "", "axes"], ["y"])
    graph = onnx.helper.make_graph([node], "pad", [given], [made], constants)
    opset = onnx.helper.make_opsetid("", 20)
    plain = export._plain(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))
    assert [*plain.graph.node[0].input] == ["x", "widths", "", "axes"]
    assert runs(plain.SerializeToString())[0].shape == (3, 2)


def test_modules_that_the_exporters_treat_differently_all_go_through_dynamo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "_operators", lambda model: object())
    blocks = {str(w): on_meta(Residual(w, 3), (1, w, 6, 6)) for w in (4, 6, 8)}
    models = to_onnx(blocks)
    assert list(models) == list(blocks)
    assert all(np.isfinite(runs(model)[0]).all() for model in models.values())


def test_batchnorm_is_folded_and_values_are_of_the_usual_size() -> None:
    (model,) = to_onnx({"block": on_meta(Residual(8, 3), (1, 8, 6, 6))}).values()
    assert [node.op_type for node in onnx.load_from_string(model).graph.node] == [
        "Conv",
        "Relu",
        "Conv",
        "Add",
    ]
    assert 1e-3 < np.abs(runs(model)[0]).mean() < 1e3


def test_model_does_not_depend_on_what_is_exported_beside_it() -> None:
    one, other = on_meta(Residual(8, 3), (1, 8, 6, 6)), on_meta(head(), (1, 8, 4, 4))
    assert to_onnx({"other": other, "one": one})["one"] == to_onnx({"one": one})["one"]


def test_several_inputs_and_outputs_stay_apart() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": x + y, "product": x * y}

    models = to_onnx({str(n): on_meta(Both(), (1, n), (1, n)) for n in (3, 4)})
    for n in (3, 4):
        total, product = runs(models[str(n)])
        assert (total.tolist(), product.tolist()) == ([[2.0] * n], [[1.0] * n])


def test_nothing_of_this_machine_is_in_a_model() -> None:
    (model,) = to_onnx({"block": on_meta(SqueezeExcite(8), (1, 8, 6, 6))}).values()
    assert b".py" not in model
    assert b"SqueezeExcite" not in model


def test_module_that_cannot_be_exported_is_named() -> None:
    modules = {"good": on_meta(Residual(4, 3), (1, 4, 6, 6)), "bad": on_meta(Broken(), (3, 3))}
    with pytest.raises(ValueError, match="cannot export 'bad'"):
        to_onnx(modules)


def test_module_that_does_not_run_is_named_with_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"'bad' does not run on inputs of shapes \[\(1, 3, 6, 6\)\]"):
        to_onnx({"bad": on_meta(Residual(4, 3), (1, 3, 6, 6))})


def test_module_whose_numbers_overflow_is_refused() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x * 0)

    with pytest.raises(ValueError, match="'log' gives numbers that are not finite"):
        to_onnx({"log": on_meta(Logarithm(), (1, 3))})


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    with torch.device("meta"):  # `.to` would part them
        tied = Tied()
    real, _ = export._materialised("tied", tied, (torch.empty(1, 4, device="meta"),))
    assert real.second.weight is real.first.weight


def test_progress_reaches_the_total() -> None:
    told: list[tuple[int, int]] = []
    to_onnx(
        {str(w): on_meta(Residual(w, 3), (1, w, 6, 6)) for w in (4, 6)},
        lambda done, total: told.append((done, total)),
    )
    assert (told[0], told[-1]) == ((0, 2), (2, 2))


def test_a_padding_is_exported_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    to_onnx({"pad": on_meta(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 2, 1)), (1, 2, 4, 4))})
    assert not recwarn.list


def operators_of(model: bytes) -> tuple[str, ...]:
    return tuple(node.op_type for node in onnx.load_from_string(model).graph.node)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


@pytest.mark.parametrize("log_is_on", [False, True])  # torch's own exports leave it on
def test_operator_that_the_older_exporter_does_not_know_is_exported_in_silence(
    log_is_on: bool, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(
        functools.partial(torch._C._jit_set_onnx_log_enabled, torch._C._jit_is_onnx_log_enabled())
    )
    torch._C._jit_set_onnx_log_enabled(log_is_on)
    assert "DFT" in operators_of(to_onnx({"spectrum": on_meta(Spectrum(), (1, 4))})["spectrum"])
    assert "graph(" not in capfd.readouterr().out
    assert torch._C._jit_is_onnx_log_enabled() is log_is_on


def test_channel_shuffle_needs_one_export_by_dynamo_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    by_dynamo: list[str] = []
    slow = export._by_dynamo
    monkeypatch.setattr(export, "_by_dynamo", lambda some: (by_dynamo.extend(some), slow(some))[1])
    blocks = {
        str(width): on_meta(nn.Sequential(nn.Conv2d(4, width, 1), nn.ChannelShuffle(2)), (1, 4, 5, 5))
        for width in (4, 8, 12)
    }
    models = to_onnx(blocks)
    assert by_dynamo == ["4"]
    assert {operators_of(model) for model in models.values()} == {("Conv", "Reshape", "Transpose", "Reshape")}
