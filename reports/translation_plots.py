"""The figure of an evaluation of translations: scores by source length, and the recall of names by frequency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..harness.whole_files import write_whole
from .plot_style import BLUE, GREY, ORANGE, label_axes, new_figure

_WIDTH = 0.27
_FREQUENCIES = {"unseen": "not in training", "regular": "1 to 15 pairs", "frequent": "16 or more"}


def write_translation_plot(results: dict[str, Any], path: Path) -> None:
    """Draw the results of `ssm-zoo evaluate translation` into a PNG file, never seen half-written.

    Args:
        results: "systems", the results of `score_translations` of the model and of the copied sources, in this order.
        path: the file.
    """
    (name, model), (_, copied) = results["systems"].items()
    figure = new_figure(10.0, 4.2)
    lengths, recall = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_lengths(lengths, model["by_length"], copied["by_length"])
    label_axes(lengths, f"{name}: BLEU {model['bleu']:.1f}, chrF {model['chrf']:.1f}", "words of the source")
    _draw_recall(recall, model["entities"])
    label_axes(recall, "names and numbers kept", "training pairs that have them")
    for axes in (lengths, recall):
        axes.grid(axis="y", alpha=0.3)
    lengths.legend(ncols=3, loc="upper center")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw_lengths(axes: Axes, model: list[dict[str, Any]], copied: list[dict[str, Any]]) -> None:
    series = [
        ("BLEU", model, "bleu", BLUE),
        ("chrF", model, "chrf", ORANGE),
        ("chrF of the source", copied, "chrf", GREY),
    ]
    for shift, (label, rows, key, color) in enumerate(series, start=-1):
        places = [place + shift * _WIDTH for place in range(len(rows))]
        axes.bar(places, [row[key] for row in rows], _WIDTH, color=color, label=label)
    names = [f"{row['from']}+" if row["to"] is None else f"{row['from']}-{row['to']}" for row in model]
    axes.set_xticks(range(len(model)), [f"{name}\n({row['texts']:,})" for name, row in zip(names, model, strict=True)])
    axes.set_ylabel("score")
    # Room for the legend above the highest bar.
    axes.set_ylim(0, 1.2 * max(1.0, *(row[key] for _, rows, key, _ in series for row in rows)))


def _draw_recall(axes: Axes, entities: dict[str, Any]) -> None:
    bins = {"all": entities} | {label: entities[key] for key, label in _FREQUENCIES.items() if key in entities}
    there = {label: found for label, found in bins.items() if found["recall"] is not None}
    axes.bar(range(len(there)), [found["recall"] for found in there.values()], 0.6, color=BLUE)
    axes.set_xticks(range(len(there)), [f"{label}\n({found['entities']:,})" for label, found in there.items()])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share")
