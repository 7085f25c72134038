"""Commands for tables that are measured elsewhere: ``hwnas table bundle`` and ``hwnas table import``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hwnas.cli import (
    Level,
    Optimisation,
    Precision,
    PrecisionOption,
    Runtime,
    RuntimeOption,
    Seed,
    SpaceName,
    TableMethod,
    Threads,
    parsed_shape,
    print_table,
    table_app,
    told_errors,
)

if TYPE_CHECKING:
    from lookup_tables import OtherDevice


@table_app.command("bundle")
def table_bundle(
    folder: Annotated[Path, typer.Argument(help="new; the same command completes it")],
    space: SpaceName = "small-mobilenet",
    input_shape: Annotated[str, typer.Option(help="channels x height x width")] = "1x28x28",
    num_classes: Annotated[int, typer.Option(min=1)] = 10,
    threads: Threads = 1,
    optimisation: Level = Optimisation.all,
    runtime: RuntimeOption = Runtime.onnxruntime,
    precision: PrecisionOption = Precision.fp32,
    method: Annotated[
        TableMethod | None, typer.Option(help="of measuring sites; default: profiled, where that can be")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Write a folder that measures a space on another device, with Python, numpy and onnxruntime."""
    console = Console()
    with told_errors(console):
        import torch

        from hwnas.latency_table import bundle_latency_table
        from hwnas.loading import load_space
        from hwnas.progress import bars
        from lookup_tables import SessionSettings

        shape = parsed_shape(input_shape)
        with bars(console) as report:
            bundle_latency_table(
                load_space(space, num_classes, shape[0]),
                torch.zeros(1, *shape),
                folder,
                name=space,
                settings=SessionSettings(threads, optimisation.value, runtime.value, precision.value),
                method=None if method is None else method.value,
                seed=seed,
                progress=report,
            )
        console.print(
            f"bundle  {folder}\non the device   python3 {folder.name}/measure.py\n"
            f"back here       hwnas table import {folder}",
            highlight=False,
            soft_wrap=True,
        )


@table_app.command("import")
def table_import(
    path: Annotated[Path, typer.Argument(help="a measured bundle, or the results.jsonl of one")],
    out: Annotated[Path, typer.Option(help="the table's file")] = Path("latency_table.json"),
) -> None:
    """Check what another device has measured, and make its table of it."""
    console = Console()
    with told_errors(console):
        from lookup_tables import LookupTable, import_bundle

        table = import_bundle(path)
        if out.exists():
            there = LookupTable.load(out)
            differences = there.device.differences(table.device)
            facts = [(t.space, t.settings, t.protocol["method"]) for t in (there, table)]
            if differences or facts[0] != facts[1]:
                reason = "; ".join(differences) or "another space, method or other settings"
                raise ValueError(f"'{out}' holds another table ({reason}); import into another file by --out")
        table.save(out)
        print_table(console, table, entries=0)
        console.print(f"table  {out}")


def other_device(
    remote: str | None, ssh_options: Sequence[str], remote_python: str, adb: str | None, perf_test: str | None
) -> OtherDevice | None:
    """The device that the options of ``hwnas table build`` name; None: this machine."""
    from lookup_tables import AdbDevice, SshDevice

    if remote is not None and adb is not None:
        raise ValueError("a table is of one device: give --remote or --adb")
    if remote is not None:
        return SshDevice.named(remote, ssh_options, remote_python)
    if adb is None:
        return None
    if perf_test is None:
        raise ValueError(
            "--adb measures by onnxruntime_perf_test of an Android build: name it by --perf-test"
        )
    return AdbDevice(perf_test, None if adb == "auto" else adb)
