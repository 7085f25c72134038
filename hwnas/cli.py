"""The command line."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hwnas.nn_meter_cli import nn_meter_app

if TYPE_CHECKING:
    from hwnas.certificate import Certificate
    from hwnas.space import ModelSpace
    from lookup_tables import Accuracy, LookupTable

# Torch and Lightning are imported by the commands: `hwnas --help` answers at once.
app = typer.Typer(
    help="Name a device and a latency; get the most accurate network that keeps to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
table_app = typer.Typer(help="Latency tables of devices.", no_args_is_help=True)
app.add_typer(table_app, name="table")
spaces_app = typer.Typer(help="Ready-made spaces.", no_args_is_help=True)
app.add_typer(spaces_app, name="spaces")
app.add_typer(nn_meter_app, name="nnmeter")


class TableMethod(StrEnum):
    """Ways to measure the sites of a table."""

    isolated = "isolated"
    slope = "slope"
    profiled = "profiled"


class Optimisation(StrEnum):
    """ONNX Runtime's graph optimisation levels."""

    all = "all"
    extended = "extended"
    basic = "basic"
    disabled = "disabled"


class Runtime(StrEnum):
    """What runs the files."""

    onnxruntime = "onnxruntime"
    openvino = "openvino"


class Precision(StrEnum):
    """What the files compute in."""

    fp32 = "fp32"
    int8 = "int8"


SpaceName = Annotated[
    str, typer.Option("--space", help="a ready-made space, NAME:small, or my_module:MyNetwork")
]
DataName = Annotated[
    str,
    typer.Option(
        "--data",
        help="fashion-mnist, digits, cifar10, cifar100, imagenet-folder, or my_module:my_datamodule",
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="of the session")]
Level = Annotated[Optimisation, typer.Option(help="ONNX Runtime's graph optimisation")]
AskedThreads = Annotated[int | None, typer.Option(min=1, help="of the session; default: the table's, or 1")]
AskedLevel = Annotated[
    Optimisation | None,
    typer.Option(help="ONNX Runtime's graph optimisation; default: the table's, or all"),
]
RuntimeOption = Annotated[Runtime, typer.Option(help="what runs the files")]
PrecisionOption = Annotated[
    Precision, typer.Option(help="int8: every site and network is quantised before it is measured")
]
Seed = Annotated[int, typer.Option(help="of everything that is drawn")]


@app.command()
def search(
    space: SpaceName = "small-mobilenet",
    data: DataName = "fashion-mnist",
    data_folder: Annotated[Path | None, typer.Option(help="where the data's files lie")] = None,
    device: Annotated[
        Path | None, typer.Option("--device", help="a latency table; default: this machine is measured")
    ] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="the budget, in milliseconds")] = None,
    budget: Annotated[
        str, typer.Option(help="the budget between the space's cheapest (0%) and dearest (100%) network")
    ] = "50%",
    strategy: Annotated[
        str, typer.Option(help="proxyless, darts, gumbel-darts, random-one-shot, enas")
    ] = "proxyless",
    epochs: Annotated[int, typer.Option(min=1, help="of the search")] = 4,
    train_epochs: Annotated[int, typer.Option(min=1, help="of the subnet that was found")] = 6,
    warmup_epochs: Annotated[
        int | None, typer.Option(min=0, help="of the search, weights alone; default: 1 of several")
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="that evolution makes on the supernet of random-one-shot and enas")
    ] = 60,
    batch_size: Annotated[int | None, typer.Option(min=1, help="default: the data's own")] = None,
    lr: Annotated[float, typer.Option(help="peak learning rate of the search")] = 0.1,
    train_lr: Annotated[float, typer.Option(help="peak learning rate of the training")] = 0.1,
    arc_learning_rate: Annotated[float, typer.Option(help="of the architecture parameters")] = 0.01,
    threads: AskedThreads = None,
    optimisation: AskedLevel = None,
    runtime: Annotated[
        Runtime | None, typer.Option(help="what runs the file; default: the table's, or onnxruntime")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="measure and export in INT8; default: as the table, or fp32")
    ] = False,
    allow_other_device: Annotated[bool, typer.Option(help="take a table of another machine")] = False,
    accelerator: Annotated[str, typer.Option(help="Lightning's: cpu, gpu, auto")] = "auto",
    devices: Annotated[str, typer.Option(help="Lightning's: how many, or auto")] = "1",
    precision: Annotated[str, typer.Option(help="Lightning's: 32-true, bf16-mixed, …")] = "32-true",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="folder of the run; the same command goes on in it")] = Path(
        "runs/search"
    ),
) -> None:
    """Search under a latency budget: from a space to a certified ONNX file."""
    console = Console(log_path=False)
    with told_errors(console):
        from hwnas.progress import bars
        from hwnas.search import Search, SearchSettings

        settings = SearchSettings(
            space=space,
            data=data,
            data_folder=None if data_folder is None else str(data_folder),
            strategy=strategy,
            device_table=None if device is None else str(device),
            allow_other_device=allow_other_device,
            max_latency_ms=max_latency_ms,
            budget_percent=percent(budget),
            epochs=epochs,
            train_epochs=train_epochs,
            warmup_epochs=min(1, epochs - 1) if warmup_epochs is None else warmup_epochs,
            trials=trials,
            batch_size=batch_size,
            lr=lr,
            train_lr=train_lr,
            arc_learning_rate=arc_learning_rate,
            threads=threads,
            optimisation=None if optimisation is None else optimisation.value,
            runtime=None if runtime is None else runtime.value,
            int8=int8,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            seed=seed,
        )
        with bars(console) as report:
            job = Search(settings, out, report, say=console.log)
            certificate = job.run()
        print_certificate(console, certificate)
        console.print(f"network  {out / 'subnet.onnx'}\ncheck it  hwnas verify {out / 'subnet.onnx'}")
        if not certificate.passed:
            raise typer.Exit(1)


@table_app.command("build")
def table_build(
    out: Annotated[Path, typer.Option(help="the table's file; the same command goes on in it")] = Path(
        "latency_table.json"
    ),
    space: SpaceName = "small-mobilenet",
    input_shape: Annotated[str, typer.Option(help="channels x height x width")] = "1x28x28",
    num_classes: Annotated[int, typer.Option(min=1)] = 10,
    threads: Threads = 1,
    optimisation: Level = Optimisation.all,
    runtime: RuntimeOption = Runtime.onnxruntime,
    precision: PrecisionOption = Precision.fp32,
    method: Annotated[
        TableMethod | None,
        typer.Option(
            help="of measuring sites; default: as the table has it, else profiled, where that can be"
        ),
    ] = None,
    seed: Seed = 0,
    remote: Annotated[
        str | None, typer.Option(help="measure on user@host[:port] by ssh; default: on this machine")
    ] = None,
    ssh_option: Annotated[
        list[str] | None,
        typer.Option(help="as after ssh -o, such as IdentityFile=~/.ssh/pi; may be repeated"),
    ] = None,
    remote_python: Annotated[
        str, typer.Option(help="on the remote device, from its home folder; needs numpy and onnxruntime")
    ] = "python3",
    adb: Annotated[
        str | None, typer.Option(help="measure on the Android device of this serial, or 'auto': the only one")
    ] = None,
    perf_test: Annotated[
        str | None,
        typer.Option(help="onnxruntime_perf_test for --adb: a path on the device, or a file here to push"),
    ] = None,
) -> None:
    """Measure every distinct site of a space, on this machine or on another device."""
    console = Console()
    with told_errors(console):
        import torch

        from hwnas.latency_table import build_latency_table
        from hwnas.loading import load_space
        from hwnas.progress import bars
        from hwnas.table_commands import other_device
        from lookup_tables import SessionSettings

        shape = parsed_shape(input_shape)
        with bars(console) as report:
            table = build_latency_table(
                load_space(space, num_classes, shape[0]),
                torch.zeros(1, *shape),
                out,
                name=space,
                settings=SessionSettings(threads, optimisation.value, runtime.value, precision.value),
                method=None if method is None else method.value,
                seed=seed,
                progress=report,
                device=other_device(remote, ssh_option or [], remote_python, adb, perf_test),
            )
        print_table(console, table, entries=0)
        console.print(f"table  {out}")


@table_app.command("show")
def table_show(
    path: Annotated[Path, typer.Argument(help="a latency table")],
    entries: Annotated[int, typer.Option(help="how many entries are listed, dearest first")] = 20,
    plot: Annotated[
        Path | None, typer.Option(help="a picture to draw: predicted against measured, held out")
    ] = None,
) -> None:
    """Print a table: device, settings, its own error, and its entries."""
    console = Console()
    with told_errors(console):
        from lookup_tables import LookupTable, held_out

        table = LookupTable.load(path)
        print_table(console, table, entries)
        if plot is not None:
            from hwnas.table_plot import draw_predictions

            accuracy = table.accuracy
            predicted, measured = held_out(table)
            title = f"{table.space}, each network held out: MAPE {accuracy.mape_percent:.2f} %"
            draw_predictions(
                predicted, measured, (accuracy.interval_low, accuracy.interval_high), title, plot
            )
            console.print(f"plot  {plot}")


@app.command()
def profile(
    architecture: Annotated[
        Path | None, typer.Option(help="architecture.json; default: cheapest, middle and dearest")
    ] = None,
    space: SpaceName = "small-mobilenet",
    input_shape: Annotated[str, typer.Option(help="channels x height x width")] = "1x28x28",
    num_classes: Annotated[int, typer.Option(min=1)] = 10,
    device: Annotated[Path | None, typer.Option("--device", help="a latency table")] = None,
    allow_other_device: Annotated[bool, typer.Option(help="take a table of another machine")] = True,
) -> None:
    """Print what an architecture costs: multiply-adds, parameters, latency."""
    console = Console()
    with told_errors(console):
        import torch

        from hwnas.loading import load_space
        from lookup_tables import LookupTable
        from profilers import FlopsProfiler, LatencyProfiler, ParamsProfiler, Profiler

        shape = parsed_shape(input_shape)
        found = load_space(space, num_classes, shape[0])
        example = torch.zeros(1, *shape)
        profilers: list[Profiler] = [FlopsProfiler(found, example), ParamsProfiler(found)]
        if device is not None:
            table = LookupTable.load(device)
            profilers.append(LatencyProfiler(found, example, table, allow_other_device=allow_other_device))
        ends = profilers[-1].cost
        shown = {"cheapest": ends.minimum(), "default": found.default(), "dearest": ends.maximum()}
        if architecture is not None:
            shown = {architecture.name: read_architecture(architecture, found)}
        printed = Table("", *shown, title=f"{space}: {found.size:,} networks")
        for profiler in profilers:
            numbers = [profiler.profile(found.canonical(a)) for a in shown.values()]
            printed.add_row(
                profiler.unit, *(f"{n:,.4f}" if profiler.unit == "ms" else f"{n:,.0f}" for n in numbers)
            )
        console.print(printed)


@app.command()
def export(
    architecture: Annotated[Path, typer.Argument(help="architecture.json")],
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint of the subnet, or of the supernet")],
    out: Annotated[Path, typer.Option(help="the ONNX file")] = Path("subnet.onnx"),
    space: SpaceName = "small-mobilenet",
    data: Annotated[
        str | None, typer.Option("--data", help="recalibrates BatchNorm and tests the file on this data")
    ] = None,
    data_folder: Annotated[Path | None, typer.Option(help="where the data's files lie")] = None,
    input_shape: Annotated[str, typer.Option(help="channels x height x width, without --data")] = "1x28x28",
    num_classes: Annotated[int, typer.Option(min=1, help="without --data")] = 10,
    dynamic_batch: Annotated[bool, typer.Option(help="leave the batch open")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="compute in INT8, ranges from training images of --data")
    ] = False,
    ort: Annotated[
        bool, typer.Option("--ort", help="also in ONNX Runtime's mobile format, beside the ONNX file")
    ] = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="compare with openvino, ncnn, mnn or litert; repeatable, or all"),
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="a budget: the file is measured and gets a certificate")
    ] = None,
    device: Annotated[
        Path | None, typer.Option("--device", help="a latency table: what it predicts is in the certificate")
    ] = None,
    allow_other_device: Annotated[bool, typer.Option(help="take a table of another machine")] = False,
    threads: AskedThreads = None,
    optimisation: AskedLevel = None,
) -> None:
    """Write the file of an architecture with the weights of a checkpoint, and check that very file."""
    console = Console()
    with told_errors(console):
        from hwnas.engines import ENGINES
        from hwnas.subnet_export import export_from_checkpoint

        exported = export_from_checkpoint(
            architecture,
            checkpoint,
            out,
            space=space,
            data=data,
            data_folder=None if data_folder is None else str(data_folder),
            input_shape=parsed_shape(input_shape),
            num_classes=num_classes,
            dynamic_batch=dynamic_batch,
            int8=int8,
            ort=ort,
            engines=ENGINES if engine == ["all"] else engine or (),
            max_latency_ms=max_latency_ms,
            device_table=device,
            allow_other_device=allow_other_device,
            threads=threads,
            optimisation=None if optimisation is None else optimisation.value,
        )
        if exported.mobile_usability is not None:
            console.print(exported.mobile_usability, markup=False, highlight=False)
        facts = {"file": exported.file, "parity_max_abs_diff": exported.parity_max_abs_diff}
        if exported.test_accuracy is not None:
            facts["test_accuracy"] = exported.test_accuracy
        facts |= {f"parity {name}": found for name, found in exported.engines.items()}
        for name, fact in facts.items():
            console.print(f"{name:<22} {fact}", markup=False)
        if exported.certificate is not None:
            print_certificate(console, exported.certificate)
            if not exported.certificate.passed:
                raise typer.Exit(1)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="a certified file, *.onnx or *.ort")],
) -> None:
    """Measure a certified file again: does its promise hold here? Exit code 0 or 1."""
    console = Console()
    with told_errors(console):
        from hwnas.certificate import verify as verified

        with console.status("measuring"):
            result = verified(path)
        print_certificate(console, result.certificate)
        for difference in result.other_device:
            console.print(f"[yellow]another device than the certificate's: {difference}")
        verdict = "[green]holds" if result.holds else "[red]does not hold"
        console.print(f"here and now: {verdict}[/]: {result.reason}", highlight=False)
        if not result.holds:
            raise typer.Exit(1)


@spaces_app.command("check")
def spaces_check() -> None:
    """Count every published network of the ready-made spaces. Exit code 1 if one is not equal."""
    console = Console()
    with told_errors(console):
        from hwnas.spaces import SPACES, conformance

        printed = Table("space", "network", "multiply-adds", "parameters", "equal", "published")
        all_equal = True
        for space_name, space in SPACES.items():
            for name, published in space.published.items():
                found = conformance(space_name, space, name)
                all_equal &= found.is_equal
                must_be = f"[red]no[/]: {published.macs:,} and {published.params:,}"
                said = ". ".join(filter(None, (published.reported, published.note)))
                printed.add_row(
                    space_name,
                    name,
                    f"{found.macs:,}",
                    f"{found.params:,}",
                    "[green]yes" if found.is_equal else must_be,
                    escape(said),
                )
        console.print(printed)
        if not all_equal:
            raise typer.Exit(1)


# ---- what the commands share


@contextmanager
def told_errors(console: Console) -> Iterator[None]:
    """Tells what went wrong in a line; with ``HWNAS_TRACEBACK=1`` the whole traceback is shown."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("[yellow]stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:  # also those of the user's own space or data
        if os.environ.get("HWNAS_TRACEBACK"):
            raise
        console.print("[red]error:[/]", escape(told(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def told(error: Exception) -> str:
    """What an error says, in a line; with its kind where it was not written for the command line."""
    from hwnas.search import SearchFailedError
    from hwnas.strategies import NonFiniteLossError

    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"'{error.filename}' cannot be read or written: {error.strerror}. "
            "Name another path, or give access to this one"
        )
    text = " ".join(str(error).split())
    if text and isinstance(
        error, ValueError | TypeError | FileNotFoundError | SearchFailedError | NonFiniteLossError
    ):
        return text
    return f"{type(error).__name__}: {text or 'no more is known'} (HWNAS_TRACEBACK=1 shows where)"


def percent(text: str) -> float:
    """``50%`` or ``50`` as 50.0."""
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise ValueError(f"a budget is a share of the span such as 50%; got {text!r}") from None


def parsed_shape(text: str) -> tuple[int, ...]:
    """``1x28x28`` as numbers."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"an input shape is channels x height x width, such as 1x28x28; got {text!r}")
    return tuple(int(part) for part in parts)


def read_architecture(path: Path, space: ModelSpace) -> dict[str, Any]:
    from hwnas.run_folder import read_json

    return space.validate(read_json(path, "architecture"))


def print_certificate(console: Console, certificate: Certificate) -> None:
    predicted = "nothing: no latency table was given, or none is of this file's format or precisions"
    if certificate.predicted_ms is not None and certificate.predicted_interval_ms is not None:
        low, high = certificate.predicted_interval_ms
        predicted = f"{certificate.predicted_ms:.4f} ms  ({low:.4f} to {high:.4f})"
    session = certificate.runtime["session"]
    printed = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    accuracy = certificate.test_accuracy
    rows = {
        "budget": f"{certificate.budget_ms:.4f} ms",
        "predicted": predicted,
        "measured": f"{certificate.measured_ms:.4f} ms  (median {certificate.measured_median_ms:.4f}, "
        f"p90 {certificate.measured_p90_ms:.4f}, noise floor {certificate.noise_floor_percent:.2f} %, "
        f"clock {certificate.clock})",
        "test accuracy": "-" if accuracy is None else f"{100 * accuracy:.2f} %",
        "session": ", ".join(f"{name} {value}" for name, value in session.items()),
        "torch against file": f"{certificate.parity_max_abs_diff:.2g}",
        "size": f"{certificate.macs / 1e6:.2f} M multiply-adds, {certificate.params:,.0f} parameters",
        "architecture": json.dumps(certificate.architecture),
        "certificate": ("[green]passed" if certificate.passed else "[red]not passed")
        + f"[/]: {certificate.reason}",
    }
    for name, value in rows.items():
        printed.add_row(f"[bold]{name}", value)
    console.print(printed, highlight=False)


def described_session(table: LookupTable) -> str:
    settings, device = table.settings, table.device
    runtime = f"ONNX Runtime {device.onnxruntime}, optimisation {settings.optimisation}"
    if settings.runtime == "openvino":
        runtime = f"OpenVINO {device.openvino}"
    return f"{runtime}, {settings.threads} thread(s), {settings.precision}"


def print_table(console: Console, table: LookupTable, entries: int) -> None:
    accuracy, calibration = table.accuracy, table.calibration
    methods = Counter(entry.method for entry in table.entries.values())
    printed = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in {
        "space": table.space,
        "device": f"{table.device.cpu}, {table.device.cores} cores",
        "session": described_session(table),
        "measured": table.date,
        "entries": ", ".join(f"{count} {method}" for method, count in methods.most_common()),
        "calibration": f"{calibration.scale:.3f} x sum {calibration.per_site_us:+.2f} us x sites "
        f"{calibration.constant_us:+.2f} us",
        "held-out error": described_accuracy(accuracy),
        "interval": f"measured is predicted {100 * accuracy.interval_low:+.1f} to "
        f"{100 * accuracy.interval_high:+.1f} %, in {100 * accuracy.coverage:.0f} % of cases",
    }.items():
        printed.add_row(f"[bold]{name}", value)
    console.print(printed, highlight=False)
    if doubt := table.doubt():
        console.print(f"[yellow]warning: {escape(doubt)}", highlight=False, soft_wrap=True)
    if entries:
        listed = Table("entry", "latency µs", "median", "p90")
        dearest = sorted(table.entries.values(), key=lambda entry: -entry.p10_us)
        for entry in dearest[:entries]:
            listed.add_row(entry.name, *(f"{n:.1f}" for n in (entry.p10_us, entry.median_us, entry.p90_us)))
        console.print(listed)


def described_accuracy(accuracy: Accuracy) -> str:
    return (
        f"MAPE {accuracy.mape_percent:.2f} %, within 5 %: {accuracy.within_5_percent:.0f} %, within 10 %: "
        f"{accuracy.within_10_percent:.0f} %, Spearman {accuracy.spearman:.3f} (on {accuracy.subnets} "
        f"networks; noise floor {accuracy.noise_floor_percent:.2f} %)"
    )


# Its commands need what stands above.
from hwnas import table_checks as table_checks  # noqa: E402
from hwnas import table_commands as table_commands  # noqa: E402
