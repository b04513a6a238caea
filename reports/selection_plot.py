"""The picture of a selection: the score of each layer by each method, and of each key-value head."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from .plot_style import BLUE, GREY, LABEL, ORANGE, label_axes, new_figure

__all__ = ["draw_selection"]

_WIDTH, _HEIGHT = 8.0, 2.6  # of a panel, in inches
_TITLES = {
    "uniform": "Even distances",
    "ablation": "Harm when a layer's attention is zero",
    "restore": "Gain when a layer gets its attention back",
    "retrieval": "Attention to the passage that is copied",
}


def draw_selection(report: dict[str, Any]) -> Figure:
    """Draw a panel for each method and, if heads were measured, one for them.

    Args:
        report: content of `selection.json`.
    """
    methods, heads = report["methods"], report["heads"]
    panels = len(methods) + bool(heads)
    figure = new_figure(_WIDTH, _HEIGHT * panels + 0.4)
    for index, (name, method) in enumerate(methods.items()):
        axes = figure.add_subplot(panels, 1, index + 1)
        _layers(axes, name, method, report["teacher"]["num_layers"])
    if heads:
        _heads(figure, figure.add_subplot(panels, 1, panels), report)
    patches = [Patch(color=BLUE, label="converted"), Patch(color=ORANGE, label="kept")]
    figure.legend(handles=patches, loc="outside upper center", ncols=2, fontsize=LABEL, frameon=False)
    return figure


def _layers(axes: Axes, name: str, method: dict[str, Any], num_layers: int) -> None:
    """Draw a bar for each layer, in the colour of what the method would do with it."""
    scores = {row["layer"]: row["score"] for row in method["rows"]}
    every = range(num_layers)
    heights = [scores.get(layer, 1.0) for layer in every]
    colors = [BLUE if layer in method["layers"] else ORANGE for layer in every]
    axes.bar(every, [height if math.isfinite(height) else 0.0 for height in heights], color=colors)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.set_xlim(-0.5, num_layers - 0.5)
    if scores:
        axes.set_ylabel("weight" if name == "retrieval" else "nats per token", fontsize=LABEL)
    else:
        axes.set_yticks([])
    label_axes(axes, _TITLES[name], "layer")


def _heads(figure: Figure, axes: Axes, report: dict[str, Any]) -> None:
    """Draw a map of the heads' scores, with a frame around those that stay exact."""
    layers, heads = report["teacher"]["num_layers"], report["teacher"]["num_key_value_heads"]
    scores = [[math.nan] * layers for _ in range(heads)]
    for row in report["heads"]:
        scores[row["head"]][row["layer"]] = row["score"]
    image = axes.imshow(scores, aspect="auto", cmap="viridis", interpolation="nearest")
    for layer, head in report["exact_heads"]:
        axes.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.8))
    figure.colorbar(image, ax=axes)
    axes.set_yticks(range(heads))
    axes.set_ylabel("key-value head", fontsize=LABEL)
    label_axes(axes, f"Heads by {report['settings']['head_method']}; red: exact", "layer")
