"""One picture of teacher, control and student side by side: loss, divergence, recall, answers, speed and cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

from .comparison_tables import comparison_names
from .distillation_report import Compared, Comparison
from .markdown import short
from .plot_style import BLUE, GREEN, GREY, LABEL, TICK, label_axes, new_figure, plain_ticks

__all__ = ["COLORS", "draw_comparison"]

COLORS = {"teacher": "#000000", "control": GREEN, "stage": BLUE}
"""Colours of the three models in every panel."""
_MARKERS = {"teacher": "s", "control": "D", "stage": "o"}
# The control's are larger, since the student's often lie on them.
_SIZES = {"teacher": 5, "control": 7, "stage": 5}
_WIDTH, _HEIGHT = 4.0, 3.1  # of a panel, in inches


def draw_comparison(comparison: Comparison) -> Figure | None:
    """Draw a panel for each measurement that was made; None if there is none."""
    teacher = comparison.teacher
    panels: list[Callable[[Axes, Comparison], None]] = []
    if teacher.by_position:
        panels += [_losses, _divergences]
    panels += [draw for draw, found in ((_repeat, teacher.repeat), (_recall, teacher.recall)) if found]
    if teacher.choice is not None:
        panels.append(_choice)
    if teacher.decoding:
        panels += [_speed, _cache]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(_WIDTH * columns, 6.0), _HEIGHT * rows + 0.4)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        panel(axes, comparison)
    handles = [
        Line2D([], [], linewidth=2, label=name, **_look(model))
        for model, name in zip(comparison.models, comparison_names(comparison), strict=True)
    ]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=LABEL + 1, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _losses(axes: Axes, comparison: Comparison) -> None:
    """Draw the loss by position."""
    for model in comparison.models:
        _line(axes, model, [row.loss for row in model.by_position])
    _positions(axes, comparison, "Held-out loss by position")


def _divergences(axes: Axes, comparison: Comparison) -> None:
    """Draw the divergence from the teacher by position."""
    for model in comparison.models[1:]:
        _line(axes, model, [row.kl for row in model.by_position])
    axes.set_ylim(bottom=0.0)
    _positions(axes, comparison, "KL(teacher || model) by position")


def _positions(axes: Axes, comparison: Comparison, title: str) -> None:
    """Label the bins of positions with their ends."""
    ends = [row.end for row in comparison.teacher.by_position]
    axes.set_xticks(range(len(ends)), labels=[_thousands(end) for end in ends])
    label_axes(axes, title, "token position, up to")
    axes.set_ylabel("nats per token", fontsize=LABEL)


def _repeat(axes: Axes, comparison: Comparison) -> None:
    """Draw bars of the repeat losses by distance."""
    width = 0.27
    for number, model in enumerate(comparison.models):
        places = [index + (number - 1) * width for index in range(len(model.repeat))]
        heights = [row.loss or 0.0 for row in model.repeat]
        axes.bar(places, heights, width=0.92 * width, color=COLORS[model.kind])
        for place, row in zip(places, model.repeat, strict=True):
            text = "none" if row.loss is None else f"{row.loss:.2f}"
            axes.text(place, row.loss or 0.0, text, ha="center", va="bottom", fontsize=TICK - 1)
    axes.margins(y=0.12)
    distances = [f"{row.distance:,}" for row in comparison.teacher.repeat]
    axes.set_xticks(range(len(distances)), labels=distances)
    label_axes(axes, "Loss on a passage read before", "tokens between both")
    axes.set_ylabel("nats per token", fontsize=LABEL)


def _recall(axes: Axes, comparison: Comparison) -> None:
    """Draw the recall over the distance, in a group for each number of pairs, with the level of chance."""
    places: list[float] = []
    labels: list[str] = []
    start = 0.0
    for pairs, group in groupby(enumerate(comparison.teacher.recall), key=lambda item: item[1].pairs):
        rows = list(group)
        own = [start + index for index in range(len(rows))]
        for offset, model in zip((-0.08, 0.0, 0.08), comparison.models, strict=True):
            values = [model.recall[index].accuracy for index, _ in rows]
            shifted = [place + offset for place in own]
            axes.plot(shifted, values, linewidth=1.6, **_look(model))
        ends = [own[0] - 0.35, own[-1] + 0.35]
        axes.plot(ends, [rows[0][1].chance] * 2, color=GREY, linestyle=":", linewidth=1.4)
        axes.text((own[0] + own[-1]) / 2, 1.06, f"{pairs} pairs", ha="center", va="bottom", fontsize=TICK)
        places += own
        labels += [_thousands(row.distance) for _, row in rows]
        start = own[-1] + 1.5
    axes.set_xticks(places, labels=labels)
    axes.set_ylim(-0.05, 1.2)
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    label_axes(axes, "Key-value recall", "tokens between list and query; dotted: chance")


def _choice(axes: Axes, comparison: Comparison) -> None:
    """Draw bars of the answers to multiple-choice questions: right ones, consistent ones, and the teacher's."""
    width = 0.27
    for number, model in enumerate(comparison.models):
        if model.choice is not None:
            heights = [model.choice.accuracy, model.choice.consistency, model.choice.agreement]
            places = [index + (number - 1) * width for index in range(len(heights))]
            axes.bar(places, heights, width=0.92 * width, color=COLORS[model.kind])
    axes.plot([-0.45, 0.45], [0.25, 0.25], color=GREY, linestyle=":", linewidth=1.4)
    axes.set_xticks(range(3), labels=["right", "consistent", "as the teacher"])
    axes.set_ylim(0.0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    label_axes(axes, "Multiple choice in four orders", "dotted: chance")


def _speed(axes: Axes, comparison: Comparison) -> None:
    """Draw the tokens per second of decoding over the context."""
    rates = [[1 / row.decode_seconds for row in model.decoding] for model in comparison.models]
    _over_contexts(axes, comparison, rates, "Decoding, one text", "tokens per second", lambda ratio: f"{short(ratio)}x")


def _cache(axes: Axes, comparison: Comparison) -> None:
    """Draw the size of the cache over the context."""
    sizes = [[row.cache_bytes / 2**20 for row in model.decoding] for model in comparison.models]
    _over_contexts(axes, comparison, sizes, "Cache, one text", "MiB", lambda ratio: f"1/{short(1 / ratio)}")


def _over_contexts(
    axes: Axes,
    comparison: Comparison,
    values: list[list[float]],
    title: str,
    unit: str,
    ratio: Callable[[float], str],
) -> None:
    """Draw lines over the context on logarithmic axes, and write the student's ratio to the teacher at its points."""
    contexts = [row.context for row in comparison.teacher.decoding]
    for model, own in zip(comparison.models, values, strict=True):
        axes.plot(contexts, own, linewidth=1.8, **_look(model))
    for context, student, teacher in zip(contexts, values[-1], values[0], strict=True):
        text = ratio(student / teacher)
        above = student >= teacher
        axes.annotate(
            text,
            (context, student),
            textcoords="offset points",
            xytext=(0, 7 if above else -7),
            ha="center",
            va="bottom" if above else "top",
            fontsize=TICK,
            color=COLORS["stage"],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.2)
    plain_ticks(axes.yaxis, [value for own in values for value in own])
    axes.set_xticks(contexts, labels=[_thousands(context) for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    label_axes(axes, title, "context, tokens; blue: student / teacher")
    axes.set_ylabel(unit, fontsize=LABEL)


def _look(model: Compared) -> dict[str, Any]:
    """Return colour and marker of a model."""
    return {"color": COLORS[model.kind], "marker": _MARKERS[model.kind], "markersize": _SIZES[model.kind]}


def _line(axes: Axes, model: Compared, values: list[float | None]) -> None:
    """Draw a line over the bins; a value that is not finite leaves a gap."""
    heights = [math.nan if value is None else value for value in values]
    axes.plot(range(len(heights)), heights, linewidth=1.8, **_look(model))


def _thousands(value: int) -> str:
    """Format a number of tokens shortly: 512, 1k, 2.5k."""
    return str(value) if value < 1000 else f"{value / 1024:.3g}k"
