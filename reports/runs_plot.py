"""The picture of several runs side by side: likeness over training tokens, and what was measured at the end."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from .markdown import count
from .plot_style import BLUE, GREEN, GREY, LABEL, ORANGE, TICK, label_axes, new_figure
from .runs import Row, RunsReport

__all__ = ["draw_runs"]

# Okabe and Ito's, without the grey of the teacher.
_COLORS = (BLUE, ORANGE, GREEN, "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_STYLES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT = 4.0, 3.1  # of a panel, in inches


def draw_runs(report: RunsReport) -> Figure:
    """Draw a panel for each quantity that was measured, with a colour for each run.

    Args:
        report: from `ssm_zoo.reports.runs.compare_runs`.
    """
    looks = {
        run.name: (_COLORS[index % len(_COLORS)], _STYLES[index // len(_COLORS) % len(_STYLES)])
        for index, run in enumerate(report.runs)
    }
    panels: list[Callable[[Axes], None]] = []

    def over_tokens(title: str, unit: str, value: Callable[[Row], float | None]) -> None:
        if any(value(row) is not None for row in report.rows if row.kind in ("start", "stage")):
            panels.append(lambda axes: _over_tokens(axes, report, looks, title, unit, value))

    def bars(title: str, unit: str, value: Callable[[Row], float | None]) -> None:
        if any(value(row) is not None for row in report.rows):
            panels.append(lambda axes: _bars(axes, report, looks, title, unit, value))

    over_tokens("KL(teacher || student)", "nats per token", lambda row: row.kl)
    over_tokens("Top-1 agreement", "", lambda row: row.top1_agreement)
    over_tokens("Loss on a passage read before", "nats per token", lambda row: row.repeat_loss)
    if any(row.by_position for row in report.rows):
        panels.append(lambda axes: _by_position(axes, report, looks))
    bars("Key-value recall, mean", "", lambda row: row.recall)
    context = "" if report.context is None else f" at {count(report.context)} tokens"
    bars(f"Decoding{context}", "times the teacher's", lambda row: row.times_teacher)
    mebibyte = 2**20
    bars(f"Cache{context}", "MiB", lambda row: None if row.cache_bytes is None else row.cache_bytes / mebibyte)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(_WIDTH * columns, _HEIGHT * lines + 0.5)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        panel(axes)
    handles = [
        Line2D([], [], color=color, linestyle=style, label=f"{index}: {name}")  # pyright: ignore[reportArgumentType]
        for index, (name, (color, style)) in enumerate(looks.items(), start=1)
    ]
    handles.append(Line2D([], [], color=GREY, linestyle=":", label="teacher"))
    handles.append(Line2D([], [], color="black", marker="D", linestyle="", label="control (window + sinks)"))
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=LABEL, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _of(report: RunsReport, run: str, *kinds: str) -> list[Row]:
    return [row for row in report.rows if row.run == run and row.kind in kinds]


def _height(value: float | None) -> float:
    return math.nan if value is None else value


def _over_tokens(
    axes: Axes,
    report: RunsReport,
    looks: dict[str, tuple[str, str]],
    title: str,
    unit: str,
    value: Callable[[Row], float | None],
) -> None:
    """Draw a line over the training tokens for each run, its control as a diamond at 0, and the teacher's value."""
    for run, (color, style) in looks.items():
        rows = _of(report, run, "start", "stage")
        tokens = [row.trained_tokens for row in rows]
        axes.plot(tokens, [_height(value(row)) for row in rows], color=color, linestyle=style, marker="o", markersize=4)
        for row in _of(report, run, "control"):
            axes.plot([0], [_height(value(row))], color=color, marker="D", markersize=6, markerfacecolor="none")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}M" if tokens >= 1e6 else f"{tokens / 1e3:g}k")
    _finish(axes, report, title, "training tokens", unit, value)


def _by_position(axes: Axes, report: RunsReport, looks: dict[str, tuple[str, str]]) -> None:
    """Draw the divergence by position of each run's student, and that of its control thinly."""
    ends: list[int] = []
    for run, (color, style) in looks.items():
        for row in _of(report, run, "control", "stage"):
            if row.by_position:
                ends = [part.end for part in row.by_position]
                heights = [_height(part.kl) for part in row.by_position]
                thin = row.kind == "control"
                axes.plot(
                    range(len(ends)),
                    heights,
                    color=color,
                    linestyle=style,
                    linewidth=0.8 if thin else 1.8,
                    marker="D" if thin else "o",
                    markersize=4,
                    markerfacecolor="none" if thin else color,
                )
    axes.set_xticks(range(len(ends)), labels=[str(end) if end < 1000 else f"{end / 1024:.3g}k" for end in ends])
    axes.set_ylim(bottom=0.0)
    label_axes(axes, "KL by position", "token position, up to")
    axes.set_ylabel("nats per token", fontsize=LABEL)


def _bars(
    axes: Axes,
    report: RunsReport,
    looks: dict[str, tuple[str, str]],
    title: str,
    unit: str,
    value: Callable[[Row], float | None],
) -> None:
    """Draw a bar for the student of each run at the end, its control as a diamond, and the teacher's value."""
    for place, (run, (color, _)) in enumerate(looks.items()):
        heights = [value(row) for row in _of(report, run, "stage")]
        if heights and heights[-1] is not None:
            axes.bar([place], [heights[-1]], color=color)
            text = f"{heights[-1]:.0%}" if not unit else f"{heights[-1]:.3g}"
            axes.text(place, heights[-1], text, ha="center", va="bottom", fontsize=TICK - 1)
        for row in _of(report, run, "control"):
            axes.plot([place], [_height(value(row))], color="black", marker="D", markersize=6, linestyle="")
    axes.set_xticks(range(len(looks)), labels=[str(index + 1) for index in range(len(looks))])
    axes.set_xlim(-0.6, len(looks) - 0.4)
    axes.margins(y=0.15)
    if unit == "MiB":  # a factor of hundreds between teacher and student
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)
    _finish(axes, report, title, "run", unit, value)


def _finish(
    axes: Axes, report: RunsReport, title: str, across: str, unit: str, value: Callable[[Row], float | None]
) -> None:
    """Draw the teacher's value, and label the axes; no unit means a share, shown in percent."""
    teacher = next((found for row in report.rows if row.kind == "teacher" and (found := value(row)) is not None), None)
    if teacher is not None:
        axes.axhline(teacher, color=GREY, linestyle=":")
    if not unit:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    label_axes(axes, title, across)
    axes.set_ylabel(unit, fontsize=LABEL)
