"""One picture of long texts by position: loss, speed and memory, from `ssm-zoo evaluate length`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .plot_style import BLUE, GREEN, GREY, LABEL, ORANGE, label_axes, new_figure

__all__ = ["draw_length"]

_COLORS = (BLUE, ORANGE, GREEN, GREY, "#CC79A7", "#56B4E9", "#D55E00", "#000000")
Row = Mapping[str, Any]
_PANELS: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
    ("Loss by position", "nats per token", lambda row: math.nan if row["loss"] is None else row["loss"]),
    ("Reading", "tokens per second", lambda row: row["read"] / row["seconds"]),
    ("Cache", "MiB", lambda row: row["cache_bytes"] / 2**20),
    ("Memory of the process", "MiB", lambda row: row["memory_bytes"] / 2**20),
)


def draw_length(models: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw loss, speed, cache and memory over the position.

    Args:
        models: at most 8 models by name, each with the rows of `evaluate_long_texts`. A panel of which no row has a
            value is left out.
    """
    if not 1 <= len(models) <= len(_COLORS):
        raise ValueError(f"`models` must be 1 to {len(_COLORS)} models, got {len(models)}")
    panels = [panel for panel in _PANELS if panel[0] != "Loss by position" or _has_losses(models)]
    figure = new_figure(3.6 * len(panels), 3.4)
    for index, (title, unit, value) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for color, (name, rows) in zip(_COLORS, models.items(), strict=False):
            axes.plot([row["end"] for row in rows], [value(row) for row in rows], "o-", color=color, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if title != "Loss by position":
            axes.set_ylim(0, 1.15 * max(value(row) for rows in models.values() for row in rows))
        axes.grid(alpha=0.3)
        label_axes(axes, title, "token position, up to")
        axes.set_ylabel(unit, fontsize=LABEL)
    handles, names = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _has_losses(models: Mapping[str, Sequence[Row]]) -> bool:
    return any(row["loss"] is not None for rows in models.values() for row in rows)
