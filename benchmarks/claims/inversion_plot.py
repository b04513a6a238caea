"""Draw a result file of `inversion.py`: accuracy over the width, and of the last place at one width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from mixer_arms import ARMS, LLAMA, MAMBA2, MIXER

COLORS = {MIXER: "C2", LLAMA: "C1", MAMBA2: "C4"}
# Groups of bars: what is compared, and the embedding's standard deviation.
GROUPS = {
    ("all", 1.0): "all places",
    ("all", 0.05): "all places,\nsmall embedding",
    ("last", 1.0): "last place only",
    ("last", 0.05): "last place only,\nsmall embedding",
}
LINES = {1.0: "-", 0.05: "--"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the summary of `rows` into `path`."""
    summary = next(row for row in rows if row["purpose"] == "summary")
    figure, axes = plt.subplots(1, 3, figsize=(17, 5), sharey=True, width_ratios=(1, 1, 1.5))
    for axis, trained in zip(axes, (False, True), strict=False):
        widths(axis, summary, trained)
        state = f"trained for {summary['steps']} steps" if trained else "untrained"
        axis.set(title=f"{state}, hidden states of all places", xlabel="width; dashed: small embedding")
    axes[0].set_ylabel("share of tokens read rightly")
    bars(axes[2], summary)
    axes[2].set(title=f"width {summary['tuned_width']}")
    for axis in axes:
        axis.axhline(
            summary["chance"], color="gray", linestyle="--", linewidth=1, label=f"chance {summary['chance']:.4f}"
        )
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def widths(axis: Axes, summary: dict[str, Any], trained: bool) -> None:
    """Draw the accuracy over the width for both embeddings: mean and range over the seeds of each arm."""
    for arm, color in COLORS.items():
        for embedding, line in LINES.items():
            key = (arm, trained, "all", embedding)
            found = [
                cell
                for cell in summary["cells"]
                if (cell["arm"], cell["trained"], cell["places"], cell["embedding"]) == key
            ]
            found.sort(key=lambda cell: cell["width"])
            places = [cell["width"] for cell in found]
            label = ARMS[arm] if embedding == 1 else None
            axis.plot(places, [cell["mean"] for cell in found], color=color, linestyle=line, marker="o", label=label)
            axis.fill_between(
                places, [cell["low"] for cell in found], [cell["high"] for cell in found], color=color, alpha=0.2
            )
    axis.set_xscale("log", base=2)


def bars(axis: Axes, summary: dict[str, Any]) -> None:
    """Draw the accuracy at the width where everything is measured, untrained models in pale colours: mean and range."""
    for group, (places, embedding) in enumerate(GROUPS):
        for index, (arm, color) in enumerate(COLORS.items()):
            for trained in (False, True):
                (cell,) = (
                    cell
                    for cell in summary["cells"]
                    if (cell["arm"], cell["trained"], cell["places"]) == (arm, trained, places)
                    and (cell["embedding"], cell["width"]) == (embedding, summary["tuned_width"])
                )
                at = group + 0.13 * (2 * index + trained - 2.5)
                error = [[cell["mean"] - cell["low"]], [cell["high"] - cell["mean"]]]
                shade = 1.0 if trained else 0.4
                axis.bar(at, cell["mean"], 0.12, color=color, alpha=shade, yerr=error, capsize=2)
    axis.set_xticks(range(len(GROUPS)), list(GROUPS.values()))
    axis.text(0.98, 0.97, "pale: untrained", transform=axis.transAxes, ha="right", va="top", fontsize="small")
