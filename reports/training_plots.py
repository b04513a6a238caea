"""The figures of a training: loss over the steps, held-out losses, selection rates, retrieval and ranking."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..harness.whole_files import write_whole
from .plot_style import BLUE, GREY, ORANGE

_MEASURES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@10": "recall@10", "accuracy@1": "first is right"}
_RANKING = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map": "MAP", "recall@10": "recall@10"}


def write_loss_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the curve of a report into a PNG file, so that it is never seen half-written.

    A second panel shows the selection rates of selective layers, if there are any.
    """
    selective = [point for point in report["history"] if "selection_rate" in point]
    figure = Figure(figsize=(7.0, 7.0 if selective else 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1 + bool(selective), 1, sharex=True, squeeze=False).flat)
    _draw_losses(panels[0], report)
    if selective:
        _draw_selection(panels[1], selective)
    panels[-1].set_xlabel("optimiser step")
    _save(figure, path)


def write_embedder_plot(report: dict[str, Any], path: Path) -> None:
    """Draw an embedder's loss, and its retrieval before and after, into a PNG file, never seen half-written."""
    figure = Figure(figsize=(7.0, 7.0), layout="constrained")
    loss, retrieval = figure.subplots(2, 1)
    _draw_curve(loss, report)
    loss.set_xlabel("optimiser step")
    loss.set_ylabel("InfoNCE (nats per pair)")
    _draw_retrieval(retrieval, report)
    _save(figure, path)


def write_reranker_plot(report: dict[str, Any], path: Path) -> None:
    """Draw a reranker's loss, and its ranking before and after, into a PNG file, never seen half-written."""
    figure = Figure(figsize=(7.0, 7.0), layout="constrained")
    loss, ranking = figure.subplots(2, 1)
    _draw_curve(loss, report)
    loss.set_xlabel("optimiser step")
    loss.set_ylabel(f"loss ({report['settings']['loss']})")
    first = report["first_stage"]
    systems = [
        (f"held out, {one['name']}", one, color)
        for one, color in zip(report["evaluations"], (ORANGE, BLUE), strict=True)
    ]
    systems += [(first["name"], first, GREY)] if first else []
    width = 0.8 / len(systems)
    for index, (label, measured, color) in enumerate(systems):
        places = [place + (index - (len(systems) - 1) / 2) * width for place in range(len(_RANKING))]
        ranking.bar(places, [measured[key] for key in _RANKING], width, color=color, label=label)
    ranking.set_xticks(range(len(_RANKING)), list(_RANKING.values()))
    ranking.set_ylim(0, 1)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _draw_curve(axes: Axes, report: dict[str, Any]) -> None:
    points = report["history"]
    axes.plot([p["step"] for p in points], [p["loss"] for p in points], color=BLUE, linewidth=1.4, label="training")


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    measured = report["evaluations"]
    _draw_curve(axes, report)
    losses = [evaluation["loss"] for evaluation in measured]
    label = f"held out: {losses[0]:.3f} before, {losses[-1]:.3f} after"
    # Two points are not joined by a line.
    line = "-" if len(losses) > 2 else ""
    axes.plot([e["step"] for e in measured], losses, color=ORANGE, marker="o", linestyle=line, label=label)
    axes.set_ylabel("loss (nats per token)")


def _draw_selection(axes: Axes, points: list[dict[str, Any]]) -> None:
    steps = [point["step"] for point in points]
    for layer, rates in enumerate(zip(*(point["selection_rate"] for point in points), strict=True)):
        axes.plot(steps, rates, linewidth=1.4, label=f"selective layer {layer}")
    axes.set_ylim(0, 1)
    axes.set_ylabel("selected share of the tokens")


def _draw_retrieval(axes: Axes, report: dict[str, Any]) -> None:
    chance, width = report["chance"], 0.38
    size = chance["pools"][0]["size"]
    names = [*_MEASURES.values(), f"right among {size}"]
    for shift, evaluation, color in zip((-0.5, 0.5), report["evaluations"], (ORANGE, BLUE), strict=True):
        pool = evaluation["pools"][0]
        values = [*(evaluation[key] for key in _MEASURES), pool["accuracy"]]
        places = [place + shift * width for place in range(len(values))]
        axes.bar(places, values, width, color=color, label=f"held out, {evaluation['name']}")
        below, above = pool["accuracy"] - pool["low"], pool["high"] - pool["accuracy"]
        axes.errorbar(places[-1:], values[-1:], yerr=[[below], [above]], color="black", capsize=3, linestyle="none")
    levels = [*(chance[key] for key in _MEASURES), chance["pools"][0]["accuracy"]]
    for place, level in enumerate(levels):
        axes.hlines(level, place - width, place + width, colors="black", linestyles="dashed", linewidth=1)
    axes.plot([], [], color="black", linestyle="dashed", linewidth=1, label="chance")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1)
