"""The figures of a distillation report: training curves, held-out scores, and errors by layer and by head.

Figures are drawn as `ssm_zoo.reports.plot_style` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .comparison_plot import draw_comparison
from .distillation_report import Evaluation, LayerErrors, Report
from .markdown import number, percent, short
from .plot_style import BLUE, GREEN, GREY, LABEL, ORANGE, TICK, TITLE, label_axes, new_figure, plain_ticks

_SERIES = (ORANGE, BLUE, GREEN, "#D55E00", "#CC79A7", "#56B4E9")
_BARS = {"zeroed": GREY, "control": GREEN, "start": ORANGE, "stage": BLUE}
# Ratio of the largest to the smallest value from which an axis is logarithmic.
_LOG_RATIO = 10.0
# Most cells of a heat map that have room for their numbers.
_ANNOTATED_CELLS = 72


def draw(report: Report) -> dict[str, Figure]:
    """Return all figures for which the report has data, by file name.

    "heldout.png" always exists; "losses.png" needs a training curve, "comparison.png" the comparison at the end,
    "layers.png" and "heads.png" an evaluation with errors of layers and of heads.
    """
    figures = {"losses.png": _losses(report), "heldout.png": _heldout(report)}
    figures |= {"layers.png": _layers(report), "heads.png": _heads(report)}
    figures["comparison.png"] = None if report.comparison is None else draw_comparison(report.comparison)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _losses(report: Report) -> Figure | None:
    """Draw the training loss over the steps, in one panel for each stage."""
    stages = [stage for stage in report.stages if any(point.loss is not None for point in stage.history)]
    if not stages:
        return None
    columns = min(3, len(stages))
    rows = math.ceil(len(stages) / columns)
    figure = new_figure(max(4.6 * columns, 6.0), 3.6 * rows)
    for index, stage in enumerate(stages):
        axes = figure.add_subplot(rows, columns, index + 1)
        points = [(point.step, point.loss) for point in stage.history if point.loss is not None]
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=BLUE, linewidth=1.6, marker="o" if len(points) < 30 else None, markersize=3.5)
        if _wide(losses):
            axes.set_yscale("log")
            plain_ticks(axes.yaxis, losses)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.3)
        label_axes(
            axes, f"{stage.name}\n{stage.objective.replace('_', ' ')}, {stage.tokens:,} tokens", "optimiser step"
        )
        axes.set_ylabel(fill(stage.loss_name, 30), fontsize=LABEL, parse_math=False)
    figure.suptitle("Training loss", fontsize=TITLE)
    return figure


def _heldout(report: Report) -> Figure:
    """Draw bars of loss, KL and top-1 agreement for all evaluations but the teacher's, whose loss is a line."""
    teacher = report.evaluation("teacher").loss
    rows = [part for part in report.evaluations if part.kind != "teacher"]
    figure = new_figure(13.0, 1.9 + 0.48 * len(rows))
    losses, divergences, agreements = figure.subplots(1, 3, sharey=True)
    if teacher is None:
        _bars(losses, rows, [part.loss for part in rows], number)
        label_axes(losses, "Held-out loss", "nats per token, lower is better")
    else:
        _bars(
            losses,
            rows,
            [part.loss for part in rows],
            lambda loss: f"{number(loss)} ({number(None if loss is None else loss - teacher, sign=True)})",
            room=1.6,
        )
        losses.axvline(teacher, color="black", linestyle="--", linewidth=1.4)
        explained = f"nats per token, lower is better\ndashed: teacher, {number(teacher)}; in brackets: gap to it"
        label_axes(losses, "Held-out loss", explained)
    _bars(divergences, rows, [part.kl for part in rows], number)
    label_axes(divergences, "KL(teacher || student)", "nats per token, lower is better")
    _bars(agreements, rows, [part.top1_agreement for part in rows], percent)
    label_axes(agreements, "Top-1 agreement with the teacher", "share of tokens, higher is better")
    agreements.set_xlim(0.0, 1.25)
    agreements.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    agreements.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    losses.set_yticks(range(len(rows)), labels=[_title(part) for part in rows], fontsize=LABEL, parse_math=False)
    losses.invert_yaxis()
    return figure


def _layers(report: Report) -> Figure | None:
    """Draw the relative output error of the converted layers, as a line for each evaluation that measured it."""
    parts = [part for part in report.students if any(row.output_error is not None for row in part.layers)]
    if not parts:
        return None
    figure = new_figure(9.0, 4.6)
    axes = figure.add_subplot()
    values: list[float] = []
    for index, part in enumerate(parts):
        measured = [(row.layer, row.output_error) for row in part.layers if row.output_error is not None]
        layers, errors = zip(*sorted(measured), strict=True)
        values += errors
        axes.plot(
            layers,
            errors,
            label=_title(part),
            marker="o",
            markersize=4.5,
            linewidth=1.6,
            color=_SERIES[index % len(_SERIES)],
            linestyle=("-", "--", ":")[index // len(_SERIES) % 3],
        )
    axes.axhline(1.0, color=GREY, linewidth=1.0, linestyle=":", label="error of an output of zeros")
    if _wide(values):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, values)
    else:
        axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    label_axes(axes, "Output error of the converted mixers, on the teacher's hidden states", "layer")
    axes.set_ylabel("relative error ||y - t|| / ||t||", fontsize=LABEL)
    legend = figure.legend(loc="outside right upper", fontsize=TICK, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _heads(report: Report) -> Figure | None:
    """Draw heat maps of the matrix error by layer and head, for the first and last evaluation that measured it."""
    parts = [part for part in report.students if any(row.matrix_error for row in part.layers)]
    if not parts:
        return None
    shown = [parts[0]] if len(parts) == 1 else [parts[0], parts[-1]]
    grids = [_grid([row for row in part.layers if row.matrix_error]) for part in shown]
    finite = np.concatenate([grid[np.isfinite(grid)] for _, grid in grids])
    if finite.size == 0:
        return None
    rows, columns = (max(grid.shape[axis] for _, grid in grids) for axis in (0, 1))
    figure = new_figure(2.6 + len(shown) * min(max(0.42 * columns, 3.4), 7.0), min(max(1.9 + 0.3 * rows, 3.6), 11.0))
    norm = _color_scale(finite)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    image = None
    for axes, part, (layers, grid) in zip(panels, shown, grids, strict=True):
        colors = matplotlib.colormaps["viridis_r"].with_extremes(bad="0.85")
        image = axes.imshow(np.ma.masked_invalid(grid), cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
        step = math.ceil(len(layers) / 32)
        axes.set_yticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
        axes.set_ylabel("layer", fontsize=LABEL)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        label_axes(axes, _title(part), "head")
        if grid.size <= _ANNOTATED_CELLS:
            _annotate(axes, grid, norm)
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), shrink=0.95)
    bar.set_label("relative error of the mixing matrix\n||M - A|| / ||A||, lower is better", fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    if isinstance(norm, LogNorm):
        plain_ticks(bar.ax.yaxis, [float(finite.min()), float(finite.max())])
    return figure


def _title(part: Evaluation) -> str:
    return f"after {part.name}" if part.kind == "stage" else part.name


def _wide(values: Sequence[float]) -> bool:
    """Return whether the values are positive and span more than a linear axis can show."""
    return min(values) > 0 and max(values) / min(values) >= _LOG_RATIO


def _bars(
    axes: Axes,
    rows: Sequence[Evaluation],
    values: Sequence[float | None],
    text: Callable[[float | None], str],
    *,
    room: float = 1.3,
) -> None:
    """Draw a horizontal bar with its number for each value; the axis ends at `room` times the longest bar."""
    axes.barh(
        range(len(rows)),
        [value or 0.0 for value in values],
        color=[_BARS[part.kind] for part in rows],
        height=0.66,
    )
    longest = max((value for value in values if value is not None), default=0.0) or 1.0
    for place, value in enumerate(values):
        shown = "no finite value" if value is None else text(value)
        axes.text((value or 0.0) + 0.015 * longest, place, shown, va="center", fontsize=TICK)
    axes.set_xlim(0.0, room * longest)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _grid(rows: Sequence[LayerErrors]) -> tuple[list[int], np.ndarray]:
    """Return layer numbers, and their errors as (layers, most heads), NaN if a layer has fewer heads."""
    rows = sorted(rows, key=lambda row: row.layer)
    grid = np.full((len(rows), max(len(row.matrix_error) for row in rows)), np.nan)
    for place, row in enumerate(rows):
        grid[place, : len(row.matrix_error)] = [math.nan if error is None else error for error in row.matrix_error]
    return [row.layer for row in rows], grid


def _color_scale(values: np.ndarray) -> Normalize:
    low, high = float(values.min()), float(values.max())
    return LogNorm(low, high) if _wide([low, high]) else Normalize(0.0, high or 1.0)


def _annotate(axes: Axes, grid: np.ndarray, norm: Normalize) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color: Any = "white" if norm(value) > 0.5 else "black"
            axes.text(column, row, short(float(value)), ha="center", va="center", fontsize=9, color=color)
