"""Predicted against measured latency as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def draw_predictions(
    predicted_us: Sequence[float],
    measured_us: Sequence[float],
    interval: tuple[float, float],
    title: str,
    path: Path,
) -> None:
    """Draws a point for each network, the diagonal, and the bands of 10 % and of the table's interval.

    Args:
        predicted_us, measured_us: of each network.
        interval: ``measured / predicted - 1`` lies between these two.
        title: above the plot.
        path: of the picture; its suffix says the format.

    Raises:
        ValueError: matplotlib, an extra, is not installed; or it does not know the format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("plots are drawn by matplotlib, an extra: pip install hwnas[plots]") from error
    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    predicted = [us / 1e3 for us in predicted_us]
    measured = [us / 1e3 for us in measured_us]
    ends = [0.9 * min(*predicted, *measured), 1.1 * max(*predicted, *measured)]
    for low, high, alpha, label in (
        (-0.1, 0.1, 0.12, "within 10 %"),
        (*interval, 0.25, f"the table's interval ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f} %)"),
    ):
        axes.fill_between(
            ends,
            [(1 + low) * x for x in ends],
            [(1 + high) * x for x in ends],
            alpha=alpha,
            lw=0,
            label=label,
        )
    axes.plot(ends, ends, color="black", lw=0.8)
    axes.scatter(predicted, measured, s=18, color="black", zorder=3, label=f"{len(predicted)} networks")
    axes.set(xlabel="predicted, ms", ylabel="measured, ms", title=title, xlim=ends, ylim=ends, aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
