"""The figure of an embedder's training: its loss over the steps, and retrieval before and after."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..harness.whole_files import write_whole
from .training_plots import BLUE, ORANGE

_MEASURES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@10": "recall@10", "accuracy@1": "first is right"}


def write_embedder_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report of a run into a PNG file, so that it is never seen half-written."""
    figure = Figure(figsize=(7.0, 7.0), layout="constrained")
    loss, retrieval = figure.subplots(2, 1)
    points = report["history"]
    loss.plot([p["step"] for p in points], [p["loss"] for p in points], color=BLUE, linewidth=1.4, label="training")
    loss.set_xlabel("optimiser step")
    loss.set_ylabel("InfoNCE (nats per pair)")
    _draw_retrieval(retrieval, report)
    for axes in (loss, retrieval):
        axes.grid(alpha=0.3)
        axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


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
