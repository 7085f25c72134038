"""The commands of nn-Meter: take in its predictors, build them for this machine, ask them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

nn_meter_app = typer.Typer(help="nn-Meter's latency predictors.", no_args_is_help=True)

Folder = Annotated[
    Path | None, typer.Option(help="of all predictors; default: in the user's data folder, under hwnas")
]


@nn_meter_app.command("import")
def import_predictor(
    source: Annotated[Path, typer.Argument(help="a predictor of nn-Meter: its folder or its zip")],
    name: Annotated[str | None, typer.Option(help="of the predictor; default: the folder's or zip's")] = None,
    allow_unknown: Annotated[
        bool, typer.Option(help="take files that differ from what nn-Meter published; nothing in them is run")
    ] = False,
    folder: Folder = None,
) -> None:
    """Convert nn-Meter's pickled forests, once, to arrays; no pickle is executed."""
    from hwnas.cli import told_errors

    console = Console()
    with told_errors(console):
        from hwnas.progress import bars
        from profilers.nn_meter import import_predictor as imported

        with bars(console) as report:
            made = imported(source, name=name, folder=folder, allow_unknown=allow_unknown, progress=report)
        console.print(f"predictor  {made.name}\nfiles  {made}", soft_wrap=True)


@nn_meter_app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="of the predictor")] = "this-machine",
    networks: Annotated[int, typer.Option(help="how many random networks have their kernels timed")] = 200,
    calibrating: Annotated[int, typer.Option(help="how many others their sum is calibrated on")] = 48,
    resolution: Annotated[int, typer.Option(help="of the images; larger ones are not covered")] = 32,
    channels: Annotated[int, typer.Option(help="of a layer, at most")] = 640,
    largest_mmacs: Annotated[float, typer.Option(help="millions of MACs of a kernel, at most")] = 12.0,
    threads: Annotated[int, typer.Option(min=1, help="of the ONNX Runtime session")] = 1,
    optimisation: Annotated[
        Literal["all", "extended", "basic", "disabled"],
        typer.Option(help="ONNX Runtime's graph optimisation"),
    ] = "all",
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
    folder: Folder = None,
) -> None:
    """Time kernels on this machine, and fit an nn-Meter to them; the same command goes on."""
    from hwnas.cli import told_errors

    console = Console()
    with told_errors(console):
        from hwnas.progress import bars
        from lookup_tables import SessionSettings
        from profilers.nn_meter.build import BuildSettings, build_predictor

        with bars(console) as report:
            predictor = build_predictor(
                name,
                SessionSettings(threads, optimisation),
                build=BuildSettings(networks, calibrating, resolution, channels, largest_mmacs, seed),
                folder=folder,
                progress=report,
            )
        accuracy = predictor.facts["accuracy"]
        console.print(
            f"predictor  {name}: {', '.join(predictor.kernels)}\n"
            f"held-out error  MAPE {accuracy['mape_percent']:.2f} %, within 10 %: "
            f"{accuracy['within_10_percent']:.0f} %, Spearman {accuracy['spearman']:.3f} (on "
            f"{accuracy['subnets']} random networks, each predicted by a calibration to the others; noise "
            f"floor {accuracy['noise_floor_percent']:.2f} %)",
            highlight=False,
        )


@nn_meter_app.command("list")
def list_predictors(folder: Folder = None) -> None:
    """Print the predictors that nn-Meter knows, and where their files are, or come from."""
    from hwnas.cli import told_errors

    console = Console()
    with told_errors(console):
        from profilers.nn_meter.package import default_folder, registered

        printed = Table("predictor", "kernels", "files")
        for name, facts in registered(folder or default_folder()).items():
            files = facts.get("package_location") or f"not here; see {facts['download']}"
            printed.add_row(name, str(len(facts["kernel_predictors"])), files)
        console.print(printed)


@nn_meter_app.command("profile")
def profile(
    predictor: Annotated[str, typer.Argument(help="name of a predictor")],
    architecture: Annotated[
        Path | None, typer.Option(help="architecture.json; default: cheapest, middle and dearest")
    ] = None,
    space: Annotated[
        str, typer.Option(help="a ready-made space, NAME:small, or my_module:MyNetwork")
    ] = "small-mobilenet",
    input_shape: Annotated[str, typer.Option(help="channels x height x width")] = "1x28x28",
    num_classes: Annotated[int, typer.Option(min=1)] = 10,
    allow_partial: Annotated[
        bool, typer.Option(help="leave out what is not covered, and say how much that is")
    ] = False,
    folder: Folder = None,
) -> None:
    """Print the latency of an architecture by a predictor, and how much of it is covered."""
    from hwnas.cli import parsed_shape, read_architecture, told_errors

    console = Console()
    with told_errors(console):
        import torch

        from hwnas.loading import load_space
        from profilers.nn_meter import NnMeterPredictor, NnMeterProfiler

        shape = parsed_shape(input_shape)
        found = load_space(space, num_classes, shape[0])
        loaded = NnMeterPredictor.load(predictor, folder)
        profiler = NnMeterProfiler(found, torch.zeros(1, *shape), loaded, allow_partial)
        ends = profiler.cost
        shown = {"cheapest": ends.minimum(), "default": found.default(), "dearest": ends.maximum()}
        if architecture is not None:
            shown = {architecture.name: read_architecture(architecture, found)}
        printed = Table("", "ms", "coverage", title=f"{space} by {predictor}")
        for name, found_architecture in shown.items():
            canonical = found.canonical(found_architecture)
            printed.add_row(name, f"{profiler.profile(canonical):.4f}", str(profiler.coverage(canonical)))
        console.print(printed)
