"""Draw a result file of `retrieval.py`: what each arm finds, before and after its finetuning, for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from mixer_arms import ARMS

MEASURES = {"top1": "top-1 among {pool}", "ndcg": "nDCG@10 among all"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the summary of `rows` into `path`."""
    summary = next(row for row in rows if row["purpose"] == "summary")
    tasks = summary["tasks"]
    figure, axes = plt.subplots(len(tasks), 2, figsize=(12, 4.2 * len(tasks)), squeeze=False)
    for (name, task), row in zip(tasks.items(), axes, strict=True):
        for axis, (measure, words) in zip(row, MEASURES.items(), strict=True):
            bars(axis, task, measure)
            about = f"{task['queries']} queries, {task['documents']} documents"
            axis.set(title=f"{name}, {about}", ylabel=words.format(pool=summary["pool"]))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(axis: Axes, task: dict[str, Any], measure: str) -> None:
    """Draw a pair of bars for each arm: mean and range over the seeds."""
    for place, (arm, found) in enumerate(task["arms"].items()):
        color = f"C{list(ARMS).index(arm)}"
        for shift, state, shade in ((-0.2, "before", 0.35), (0.2, "after", 1.0)):
            value = found[state][measure]
            error = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            label = f"{state} InfoNCE" if not place else None
            drawn = axis.bar(place + shift, value["mean"], 0.38, color=color, alpha=shade, yerr=error, capsize=3)
            axis.bar_label(drawn, fmt="%.3f", fontsize="small", padding=2)
            if label:
                drawn.set_label(label)
    axis.axhline(task["bm25"][measure], color="black", linewidth=1, label=f"BM25 {task['bm25'][measure]:.3f}")
    chance = task["chance"][measure]
    axis.axhline(chance, color="gray", linestyle="--", linewidth=1, label=f"chance {chance:.3f}")
    axis.set_xticks(range(len(task["arms"])), [ARMS[arm] for arm in task["arms"]], fontsize="small")
    axis.set_ylim(0, 1.15 * max(axis.get_ylim()[1], task["bm25"][measure]))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3, axis="y")
