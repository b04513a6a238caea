"""Pictures of mixing matrices: heads by layers, a model beside its teacher, their distance, and the rollout.

A panel is one matrix, with queries from top to bottom and keys from left to right. Its colours are relative to its own
largest weight, on a scale of square roots, since most weights of a row are small: blue for positive weights, red for
negative ones. What no head of a causal layer sees is grey.

Symbols: K heads, L queries, M keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from .plot_style import LABEL, TICK, TITLE, label_axes, new_figure

__all__ = ["MatrixRow", "draw_distances", "draw_matrices"]

_SEQUENTIAL, _DIVERGING = "Blues", "RdBu"
_UNSEEN = (0.86, 0.86, 0.86)
# Token labels need about this many inches each. A figure with labels has at most so many panels, tokens in all of them
# together, and tokens in one.
_TOKEN_INCHES, _LABELLED_PANELS, _LABELLED_TOKENS, _MOST_LABELS = 0.125, 12, 320, 64
_PANEL, _LARGE_PANEL, _SPACE = 84, 600, 8  # pixels of a panel at least, and if there are few; and between two of them
_USUAL_PIXELS, _MOST_PIXELS = 2_000_000, 24_000_000  # of a figure's panels
_DPI = 140
_LEFT, _HEADER = 110, 92  # pixels beside and above the panels


@dataclass(frozen=True)
class MatrixRow:
    """The panels of a layer.

    Attributes:
        layer: its number, or another name.
        mixers: for each model what mixes tokens in it; may be empty texts.
        matrices: for each model (K, L, M) weights; K may be 0.
        heads: for each model a label for each of the K panels.
    """

    layer: str
    mixers: tuple[str, ...]
    matrices: tuple[np.ndarray, ...]
    heads: tuple[tuple[str, ...], ...]


def draw_matrices(
    rows: Sequence[MatrixRow], names: Sequence[str], queries: Sequence[str], keys: Sequence[str], title: str
) -> Figure:
    """Draw matrices as a grid: heads from top to bottom, layers from left to right, the models one below the other or,
    if that would be too tall, beside each other.

    A few panels with few tokens get the tokens as labels; then layers and models are one below the other, and heads
    side by side.

    Args:
        rows: the layers.
        names: of the models.
        queries: texts of the L tokens.
        keys: texts of the M tokens.
        title: of the figure.
    """
    lines = [len(matrices) for row in rows for matrices in row.matrices if len(matrices)]
    panels, tokens = len(lines) * max(lines), max(len(queries), len(keys))
    if panels <= _LABELLED_PANELS and panels * tokens <= _LABELLED_TOKENS and tokens <= _MOST_LABELS:
        return _labelled(rows, names, queries, keys, title)
    return _mosaic(rows, names, title)


def draw_distances(layers: Sequence[dict[str, Any]]) -> Figure:
    """Draw the distance to the teacher by layer and head: Jensen-Shannon divergence, and the share of equal top keys.

    Args:
        layers: rows of `evaluation.attention_report.describe_stack` that have "to_teacher".
    """
    heads = max(len(row["to_teacher"]["js"]["heads"]) for row in layers)
    width, height = min(max(2.6 + 0.36 * len(layers), 5.0), 18.0), min(max(1.1 + 0.3 * heads, 1.9), 9.0)
    figure = new_figure(width, 2 * height)
    panels = figure.subplots(2, 1)
    kinds = (("js", "Distance to the teacher", "JS divergence,\nbits", None, "viridis_r"),)
    kinds += (("same_top", "Same top token as the teacher", "share of\nthe queries", 1.0, "viridis"),)
    for axes, (key, title, unit, limit, colors) in zip(panels, kinds, strict=True):
        grid = np.full((heads, len(layers)), math.nan)
        for index, row in enumerate(layers):
            values = row["to_teacher"][key]["heads"]
            grid[: len(values), index] = [math.nan if value is None else value for value in values]
        limit = limit or max(np.nan_to_num(grid).max(), 1e-3)
        colormap = matplotlib.colormaps[colors].with_extremes(bad="0.9")
        image = axes.imshow(
            np.ma.masked_invalid(grid), cmap=colormap, vmin=0.0, vmax=limit, aspect="auto", interpolation="nearest"
        )
        step = math.ceil(len(layers) / 40)
        axes.set_xticks(range(0, len(layers), step), labels=[_layer_label(row) for row in layers][::step])
        shown = next((row["heads"] for row in layers if len(row["to_teacher"]["js"]["heads"]) == heads), None)
        names = [str(head) for head in shown] if shown and len(shown) == heads else ["mean"] * heads
        step = math.ceil(heads / 16)
        axes.set_yticks(range(0, heads, step), labels=names[::step])
        axes.set_ylabel("head", fontsize=LABEL)
        label_axes(axes, title, "layer")
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        bar.set_label(unit, fontsize=LABEL)
        bar.ax.tick_params(labelsize=TICK)
    return figure


def _layer_label(row: dict[str, Any]) -> str:
    return f"{row['layer']}\nmean" if row["to_teacher"]["of"] == "mean" else str(row["layer"])


def _labelled(
    rows: Sequence[MatrixRow], names: Sequence[str], queries: Sequence[str], keys: Sequence[str], title: str
) -> Figure:
    """Draw a panel with axes for each matrix: a row of panels for each layer and model."""
    lines = [(row, model) for row in rows for model in range(len(names)) if len(row.matrices[model])]
    columns = max(len(row.matrices[model]) for row, model in lines)
    width = max(2.4, _TOKEN_INCHES * len(keys) + 0.5)
    height = max(2.4, _TOKEN_INCHES * len(queries) + 0.8)
    figure = new_figure(1.6 + width * columns, 1.3 + height * len(lines))
    grid = figure.subplots(len(lines), columns, squeeze=False)
    counts = [len(row.matrices[model]) for row, model in lines]
    for line, (panels, (row, model)) in enumerate(zip(grid, lines, strict=True)):
        for column, axes in enumerate(panels):
            if column >= len(row.matrices[model]):
                axes.set_axis_off()
                continue
            matrices = row.matrices[model]
            colors = _colored(matrices[column], _unseen(matrices), _is_signed(matrices))
            axes.imshow(colors, interpolation="nearest", aspect="auto")
            head = row.heads[model][column]
            axes.set_title(f"head {head}" if head.isdecimal() else head, fontsize=LABEL, parse_math=False)
            lowest = all(count <= column for count in counts[line + 1 :])
            _token_ticks(axes.xaxis, keys if lowest else [], rotation=90)
            _token_ticks(axes.yaxis, queries if column == 0 else [])
        label = " ".join(
            filter(None, (f"layer {row.layer}" if row.layer.isdecimal() else row.layer, row.mixers[model]))
        )
        panels[0].set_ylabel(f"{names[model]}\n{label}", fontsize=LABEL, parse_math=False)
    axes = list(figure.axes)
    for signed, label in _scales(rows):
        shrink = min(0.9, 5.0 / figure.get_figheight())
        _fill_bar(figure.colorbar(_mappable(signed), ax=axes, shrink=shrink, aspect=30, pad=0.01), signed, label)
    figure.suptitle(title, fontsize=TITLE, parse_math=False)
    return figure


def _token_ticks(axis: Any, tokens: Sequence[str], **options: Any) -> None:
    axis.set_ticks(range(len(tokens)), labels=[printable(token) for token in tokens], fontsize=7, **options)
    for label in axis.get_ticklabels():
        label.set_parse_math(False)
    axis.set_tick_params(length=0)


def _mosaic(rows: Sequence[MatrixRow], names: Sequence[str], title: str) -> Figure:
    """Draw all panels of a model as one image, pixel by pixel; long texts are reduced to the largest weights of small
    squares."""
    length = max(max(matrix.shape[1:]) for row in rows for matrix in row.matrices if len(matrix))
    heads = [max(len(row.matrices[model]) for row in rows) for model in range(len(names))]
    largest = math.isqrt(_MOST_PIXELS // (len(rows) * sum(heads)))  # side of a panel
    pool = math.ceil(length / largest)
    side = math.ceil(length / pool)
    wanted = min(_LARGE_PANEL, max(_PANEL, math.isqrt(_USUAL_PIXELS // (len(rows) * sum(heads)))), largest)
    scale = max(1, math.ceil(wanted / side))  # pixels of a weight
    panel = scale * side + _SPACE
    labels = [_layer_labels(rows, model) for model in range(len(names))]
    tops = [44 + (12 * max(map(len, each)) if _turned(each) else 30) for each in labels]
    sizes = [(panel * len(rows) - _SPACE, panel * count - _SPACE) for count in heads]
    stacked = (_LEFT + sizes[0][0], sum(top + size[1] for top, size in zip(tops, sizes, strict=True)))
    if stacked[1] > 1.5 * stacked[0]:  # the models beside each other
        places = [(_LEFT + index * (_LEFT + sizes[0][0]), max(tops)) for index in range(len(names))]
    else:
        ends = accumulate(top + size[1] + _SPACE for top, size in zip(tops, sizes, strict=True))
        places = [(_LEFT, end - _SPACE - size[1]) for end, size in zip(ends, sizes, strict=True)]
    scales = _scales(rows)
    right = max(left + size[0] for (left, _), size in zip(places, sizes, strict=True))
    width = max(right + 20, 560 + 500 * len(scales))
    height = _HEADER + 10 + max(top + size[1] for (_, top), size in zip(places, sizes, strict=True))
    figure = new_figure(width / _DPI, height / _DPI)
    figure.set_layout_engine("none")
    for model, ((left, top), size) in enumerate(zip(places, sizes, strict=True)):
        mixers = {row.mixers[model] for row in rows if len(row.matrices[model])}
        text = f"{names[model]}: {mixers.pop()}" if len(mixers) == 1 and mixers != {""} else names[model]
        heading = 1 - (_HEADER + top - tops[model] + 24) / height
        figure.text(left / width, heading, text, fontsize=LABEL, weight="bold", parse_math=False)
        bottom = 1 - (_HEADER + top + size[1]) / height
        axes = figure.add_axes((left / width, bottom, size[0] / width, size[1] / height))
        axes.imshow(_image(rows, model, panel, scale, pool), interpolation="nearest", aspect="auto")
        _mosaic_ticks(axes, rows, model, labels[model], panel)
    figure.text(_LEFT / width, 1 - 50 / height, title, fontsize=TITLE, parse_math=False)
    for index, (signed, label) in enumerate(reversed(scales)):
        left = width - 40 - 420 - 500 * index
        axes = figure.add_axes((left / width, 1 - 40 / height, 400 / width, 18 / height))
        bar = figure.colorbar(_mappable(signed), cax=axes, orientation="horizontal")
        _fill_bar(bar, signed, label)
    return figure


def _image(rows: Sequence[MatrixRow], model: int, panel: int, scale: int, pool: int) -> np.ndarray:
    """Return the pixels of all panels of a model, each `panel` wide with the space behind it."""
    heads = max(len(row.matrices[model]) for row in rows)
    image = np.full((panel * heads, panel * len(rows), 3), 255, dtype=np.uint8)
    for column, row in enumerate(rows):
        matrices = row.matrices[model]
        unseen = _unseen(matrices) if len(matrices) else None
        for line, matrix in enumerate(matrices):
            block = (
                _colored(*_pooled(matrix, unseen, pool), _is_signed(matrices))
                .repeat(scale, axis=0)
                .repeat(scale, axis=1)
            )
            top, left = line * panel, column * panel
            image[top : top + block.shape[0], left : left + block.shape[1]] = np.round(255 * block)
    return image[:-_SPACE, :-_SPACE]


def _layer_labels(rows: Sequence[MatrixRow], model: int) -> list[str]:
    """Return the labels of the layers: their numbers, with their mixers if these differ."""
    mixed = len({row.mixers[model] for row in rows if len(row.matrices[model])}) > 1
    counts = {row.heads[model] for row in rows if len(row.matrices[model])}
    labels = []
    for row in rows:
        parts = [row.layer, row.mixers[model] if mixed and len(row.matrices[model]) else ""]
        if len(counts) > 1 and len(row.heads[model]) == 1 and not row.heads[model][0].isdecimal():
            parts.append(f"({row.heads[model][0]})")
        labels.append(" ".join(filter(None, parts)))
    return labels


def _turned(labels: Sequence[str]) -> bool:
    return max(map(len, labels)) > 3


def _mosaic_ticks(axes: Axes, rows: Sequence[MatrixRow], model: int, labels: Sequence[str], panel: int) -> None:
    """Label the layers above, and the heads of the layer that has most of them on the left."""
    middle = (panel - _SPACE) / 2
    heads = max(rows, key=lambda row: len(row.heads[model])).heads[model]
    axes.xaxis.tick_top()
    axes.text(-10, -8, "layer", fontsize=LABEL, ha="right", va="bottom")
    axes.set_xticks([middle + column * panel for column in range(len(rows))], labels=labels)
    axes.set_yticks([middle + line * panel for line in range(len(heads))], labels=heads)
    axes.tick_params(labelsize=TICK, length=0)
    if _turned(labels):
        axes.tick_params(axis="x", labelrotation=90)
    for label in (*axes.get_yticklabels(), *axes.get_xticklabels()):
        label.set_parse_math(False)
    if all(head.isdecimal() for head in heads):
        axes.set_ylabel("head", fontsize=LABEL)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _unseen(matrices: np.ndarray) -> np.ndarray | None:
    """Return the (L, M) places above the diagonal that no head uses, if it is all of them; otherwise None."""
    above = np.triu(np.ones(matrices.shape[1:], dtype=bool), 1)
    square = matrices.shape[1] == matrices.shape[2]
    return above if square and not np.any(matrices[:, above]) else None


def _pooled(matrix: np.ndarray, unseen: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Reduce (L, M) weights to the one with the largest absolute value of each square of `size` by `size`."""
    if size == 1:
        return matrix, unseen
    rows, columns = (math.ceil(length / size) for length in matrix.shape)
    wide = np.zeros((rows * size, columns * size), dtype=matrix.dtype)
    wide[: matrix.shape[0], : matrix.shape[1]] = matrix
    squares = wide.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(rows, columns, size * size)
    found = np.take_along_axis(squares, np.abs(squares).argmax(-1)[..., None], axis=-1)[..., 0]
    return found, None if unseen is None else np.triu(np.ones(found.shape, dtype=bool), 1)


def _is_signed(matrices: np.ndarray) -> bool:
    """Return whether a layer has negative weights."""
    return bool(np.any(matrices < 0))


def _colored(matrix: np.ndarray, unseen: np.ndarray | None, signed: bool) -> np.ndarray:
    """Return the (L, M, 3) colours of (L, M) weights."""
    largest = np.abs(matrix).max()
    relative = matrix / largest if largest > 0 else np.zeros_like(matrix)
    roots = np.sign(relative) * np.sqrt(np.abs(relative))
    colors = matplotlib.colormaps[_DIVERGING](roots / 2 + 0.5) if signed else matplotlib.colormaps[_SEQUENTIAL](roots)
    found = colors[..., :3]
    if unseen is not None:
        found[unseen] = _UNSEEN
    return found


def _scales(rows: Sequence[MatrixRow]) -> list[tuple[bool, str]]:
    """Return the scales that are in use, and their labels: of layers without and with negative weights."""
    signs = {_is_signed(matrices) for row in rows for matrices in row.matrices if len(matrices)}
    found = [(False, "weight, relative to the largest of its panel")] if False in signs else []
    return [*found, (True, "signed weight, relative to the largest of its panel")] if True in signs else found


def _mappable(signed: bool) -> ScalarMappable:
    if signed:
        return ScalarMappable(norm=FuncNorm((_root, _square), vmin=-1.0, vmax=1.0), cmap=_DIVERGING)
    return ScalarMappable(norm=PowerNorm(0.5, 0.0, 1.0), cmap=_SEQUENTIAL)


def _fill_bar(bar: Any, signed: bool, label: str) -> None:
    """Set the ticks and the label of a bar of colours."""
    places = [-1.0, -0.25, 0.0, 0.25, 1.0] if signed else [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
    bar.set_ticks(places, labels=[f"{100 * place:g} %" if place else "0" for place in places])
    bar.set_label(label, fontsize=TICK)
    bar.ax.tick_params(labelsize=TICK - 1)
    bar.ax.minorticks_off()


def _root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Any) -> Any:
    return np.sign(values) * np.square(values)


def printable(token: str) -> str:
    """Return a token's text as a label: without outer spaces, with line breaks as escapes, at most 14 characters.

    Characters that the font of the figures lacks become boxes.
    """
    text = token.strip(" ") or ("␣" * len(token) if token else "∅")
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    font = get_font(findfont(FontProperties()))
    text = "".join(letter if font.get_char_index(ord(letter)) else "□" for letter in text)
    return text if len(text) <= 14 else f"{text[:13]}…"
