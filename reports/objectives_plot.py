"""The figure of a training on several objectives: the loss and the rate of each over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..harness.whole_files import write_whole
from .plot_style import label_axes, new_figure

# Tableau's ten colours; further objectives have the same ones, dashed.
_COLOURS = 10


def write_objectives_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the training loss, the held-out loss before and after, and the rate of each objective into a PNG file.

    Args:
        report: report of the run, whose points have "loss/NAME" and "rate/NAME" and whose evaluations "objectives".
        path: file to write; it is never seen half-written.
    """
    figure = new_figure(9.0, 8.0)
    losses, rates = figure.subplots(2, 1, sharex=True)
    names = list(report["evaluations"][0]["objectives"])
    for index, name in enumerate(names):
        line = {"color": f"C{index % _COLOURS}", "linestyle": "-" if index < _COLOURS else "--", "linewidth": 1.3}
        _draw(losses, report, f"loss/{name}", name, line)
        _draw(rates, report, f"rate/{name}", name, line)
        measured = [(e["step"], e["objectives"][name]) for e in report["evaluations"]]
        losses.plot(*zip(*measured, strict=True), marker="o", linestyle="", markersize=4, color=line["color"])
    label_axes(losses, "Loss of each objective: training (lines) and held out (points)", "")
    losses.set_ylabel("loss (nats per target)")
    label_axes(rates, "Rate of each objective (share of the samples)", "optimiser step")
    rates.set_ylabel("rate")
    rates.set_ylim(bottom=0)
    losses.legend(fontsize=7, ncols=2)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _draw(axes: Axes, report: dict[str, Any], key: str, name: str, line: dict[str, Any]) -> None:
    points = [(point["step"], point[key]) for point in report["history"] if key in point]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, **line)
