"""Draw a result file of `synthetic.py`: a panel for each task, with a line for each arm."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from synthetic_arms import ARMS


def draw_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the tasks of the summary in `rows` into `path`; nothing if it has none.

    Functions learned in context are drawn by the number of examples; other tasks by the scores in their tests. Lines
    are means over the seeds, and bands reach from the lowest to the highest seed.
    """
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    if not summary["tasks"]:
        return
    columns = min(3, len(summary["tasks"]))
    lines = -(-len(summary["tasks"]) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.8 * lines), squeeze=False)
    for axis, (task, about) in zip(axes.flat, summary["tasks"].items(), strict=False):
        for index, arm in enumerate(ARMS):
            if arm in about["arms"]:
                _arm(axis, rows, summary, task, arm, f"C{index}")
        axis.axhline(about["chance"], color="grey", linestyle=":", label="chance")
        axis.set_title(task.replace("_", " "))
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(summary["tasks"]) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _arm(axis: Axes, rows: list[dict[str, Any]], summary: dict[str, Any], task: str, arm: str, color: str) -> None:
    """Draw an arm of a task; with the first arm that has one, the estimator beside it too."""
    found = summary["tasks"][task]["arms"][arm]
    wanted = {"purpose": "result", "task": task, "arm": arm, "rate": found["rate"]}
    runs = [row for row in rows if wanted.items() <= row.items() and row["seed"] in summary["seeds"]]
    if "by_examples" in runs[0]:
        scores = [run["by_examples"] for run in runs]
        places: list[Any] = list(range(len(scores[0])))
        if not any(line.get_label() == "estimator" for line in axis.lines):
            axis.plot(places, runs[0]["baseline_by_examples"], color="black", linestyle="--", label="estimator")
        axis.set(xlabel="examples before, or query", ylabel=f"score, chance {summary['tasks'][task]['chance']:.2g}")
        axis.set_ylim(-0.1, 1.05)
    else:
        places = list(found["tests"])
        scores = [[run["tests"][test] for test in places] for run in runs]
        axis.set(xlabel="test (length)", ylabel="accuracy")
        axis.set_ylim(-0.03, 1.05)
        axis.tick_params(axis="x", labelrotation=30 if max(map(len, places)) > 6 else 0, labelsize="x-small")
    columns = list(zip(*scores, strict=True))
    marker = "o" if len(places) < 10 else None
    axis.plot(places, [mean(column) for column in columns], color=color, marker=marker, label=ARMS[arm])
    axis.fill_between(places, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15)
