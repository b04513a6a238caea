"""Colours, sizes and axes that the figures of reports share.

Figures are matplotlib `Figure` objects that render with Agg; pyplot, which keeps figures for the whole process, is not
used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#7F7F7F"
TITLE, LABEL, TICK = 12, 11, 10


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def label_axes(axes: Axes, title: str, horizontal: str) -> None:
    """Set title, label of the horizontal axis, and the sizes of both and of the ticks."""
    axes.set_title(title, fontsize=TITLE, parse_math=False)
    axes.set_xlabel(horizontal, fontsize=LABEL)
    axes.tick_params(labelsize=TICK)


def plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers, several per decade if there are few decades."""
    decades = math.log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e5 else f"{value:.0e}")
    axis.set_minor_formatter(NullFormatter())
