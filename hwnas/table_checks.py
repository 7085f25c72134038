"""Commands that look at finished tables: ``hwnas table validate`` and ``hwnas table diff``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hwnas.cli import described_accuracy, described_session, parsed_shape, table_app, told_errors


@table_app.command("validate")
def table_validate(
    path: Annotated[Path, typer.Argument(help="a latency table of this machine")],
    networks: Annotated[int, typer.Option(min=1, help="how many, spread over the space")] = 30,
    space: Annotated[str | None, typer.Option("--space", help="default: what the table names")] = None,
    input_shape: Annotated[str, typer.Option(help="channels x height x width, as it was built")] = "1x28x28",
    num_classes: Annotated[int, typer.Option(min=1, help="as it was built")] = 10,
    plot: Annotated[Path | None, typer.Option(help="a picture to draw: predicted against measured")] = None,
    seed: Annotated[int, typer.Option(help="of the choice of networks; another takes others")] = 1,
) -> None:
    """Measure networks that a table has not seen. Exit code 1 if it is not to be trusted."""
    console = Console()
    with told_errors(console):
        import torch

        from hwnas.latency_table import validate_latency_table
        from hwnas.loading import load_space
        from hwnas.progress import bars
        from lookup_tables import LookupTable

        table = LookupTable.load(path)
        shape = parsed_shape(input_shape)
        with bars(console) as report:
            found = validate_latency_table(
                load_space(space or table.space, num_classes, shape[0]),
                torch.zeros(1, *shape),
                table,
                networks=networks,
                seed=seed,
                progress=report,
            )
        count = len(found.measured_us)
        said = f"{found.inside} of {count} networks lie in it ({100 * found.inside / count:.0f} %)"
        holds = "[green]covers what it claims" if found.covers else "[red]covers less than it claims"
        printed = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        printed.add_row("[bold]when built", described_accuracy(table.accuracy))
        printed.add_row("[bold]now", described_accuracy(found.accuracy))
        printed.add_row("[bold]interval", f"{said}; claimed are {100 * found.coverage:.0f} %: {holds}")
        console.print(printed, highlight=False)
        if plot is not None:
            from hwnas.table_plot import draw_predictions

            interval = (table.accuracy.interval_low, table.accuracy.interval_high)
            title = f"{table.space}, new networks: MAPE {found.accuracy.mape_percent:.2f} %"
            draw_predictions(found.predicted_us, found.measured_us, interval, title, plot)
            console.print(f"plot  {plot}")
        doubt = table.with_calibration(table.calibration, found.accuracy).doubt()
        if not found.is_quiet:
            console.print(
                "[yellow]invalid: the machine is too restless for this to say anything; close other programs "
                "and validate again"
            )
        elif doubt is not None:
            console.print(f"[red]{escape(doubt)}", highlight=False, soft_wrap=True)
        if doubt is not None or not found.is_quiet or not found.covers:
            raise typer.Exit(1)


@table_app.command("diff")
def table_diff(
    first: Annotated[Path, typer.Argument(help="a latency table")],
    second: Annotated[Path, typer.Argument(help="another device's, or of another date")],
    entries: Annotated[int, typer.Option(help="how many entries are listed, most changed first")] = 10,
) -> None:
    """Compare two tables: what differs between their devices, and by how much each entry is slower."""
    console = Console()
    with told_errors(console):
        from lookup_tables import LookupTable, difference

        tables = [LookupTable.load(path) for path in (first, second)]
        found = difference(*tables)
        printed = Table("", str(first), str(second))
        for name, values in {
            "device": [table.device.cpu for table in tables],
            "session": [described_session(table) for table in tables],
            "measured": [table.date for table in tables],
            "entries": [str(len(table.entries)) for table in tables],
            "scale": [f"{table.calibration.scale:.3f}" for table in tables],
            "us a site": [f"{table.calibration.per_site_us:.2f}" for table in tables],
            "us a network": [f"{table.calibration.constant_us:.2f}" for table in tables],
            "held-out error": [described_accuracy(table.accuracy) for table in tables],
        }.items():
            printed.add_row(name, *map(escape, values))
        console.print(printed, highlight=False)
        for fact in found.facts:
            console.print(f"[yellow]differs[/] {escape(fact)}", highlight=False, soft_wrap=True)
        ratios = list(found.ratios.values())
        summary = f"{len(ratios)} entries in common, {found.only_first} and {found.only_second} in one alone"
        if ratios:
            summary += (
                f"; the second takes {ratios[0]:.2f} to {ratios[-1]:.2f} times the first, "
                f"{statistics.median(ratios):.2f} in the median"
            )
        console.print(summary, highlight=False, soft_wrap=True)
        changed = sorted(found.ratios.items(), key=lambda item: -max(item[1], 1 / item[1]))[:entries]
        if changed:
            listed = Table("entry", "first µs", "second µs", "ratio")
            for key, ratio in changed:
                one, other = (table.entries[key].p10_us for table in tables)
                listed.add_row(
                    escape(tables[0].entries[key].name), f"{one:.1f}", f"{other:.1f}", f"{ratio:.2f}"
                )
            console.print(listed)
