"""The figure of a training: its loss over the steps, the held-out losses, and what selective layers select."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..harness.whole_files import write_whole

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, ORANGE = "#0072B2", "#E69F00"


def write_loss_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the curve of a report into a PNG file, so that it is never seen half-written.

    A second panel has the selection rate of every selective layer, where there are such layers.
    """
    selective = [point for point in report["history"] if "selection_rate" in point]
    figure = Figure(figsize=(7.0, 7.0 if selective else 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1 + bool(selective), 1, sharex=True, squeeze=False).flat)
    _draw_losses(panels[0], report)
    if selective:
        _draw_selection(panels[1], selective)
    panels[-1].set_xlabel("optimiser step")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    points, measured = report["history"], report["evaluations"]
    axes.plot([p["step"] for p in points], [p["loss"] for p in points], color=BLUE, linewidth=1.4, label="training")
    losses = [evaluation["loss"] for evaluation in measured]
    label = f"held out: {losses[0]:.3f} before, {losses[-1]:.3f} after"
    # Two points make no curve.
    line = "-" if len(losses) > 2 else ""
    axes.plot([e["step"] for e in measured], losses, color=ORANGE, marker="o", linestyle=line, label=label)
    axes.set_ylabel("loss (nats per token)")


def _draw_selection(axes: Axes, points: list[dict[str, Any]]) -> None:
    steps = [point["step"] for point in points]
    for layer, rates in enumerate(zip(*(point["selection_rate"] for point in points), strict=True)):
        axes.plot(steps, rates, linewidth=1.4, label=f"selective layer {layer}")
    axes.set_ylim(0, 1)
    axes.set_ylabel("selected share of the tokens")
