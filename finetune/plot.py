"""The figure of a finetuning: training loss over the steps, with the held-out loss before and after."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..conversion.output_folder import write_whole

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_BLUE, _ORANGE = "#0072B2", "#E69F00"


def write_loss_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the curve of a report into a PNG file, so that it is never seen half-written."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    points = report["history"]
    axes.plot([p["step"] for p in points], [p["loss"] for p in points], color=_BLUE, linewidth=1.4, label="training")
    losses = [evaluation["loss"] for evaluation in report["evaluations"]]
    label = f"held out: {losses[0]:.3f} before, {losses[-1]:.3f} after"
    axes.plot([0, report["steps"]], [losses[0], losses[-1]], color=_ORANGE, marker="o", linestyle="", label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
