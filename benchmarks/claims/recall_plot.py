"""Draw a result file of `recall.py`: accuracy at the queries over the steps of training, for each number of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from recall_arms import ARMS


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the runs that the summary of `rows` is about, a line for each seed, into `path`."""
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    columns = -(-len(summary["pairs"]) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(6.5 * columns, 8), squeeze=False, sharex=True, sharey=True)
    for axis, pairs in zip(axes.flat, summary["pairs"], strict=False):
        for index, arm in enumerate(arm for arm in ARMS if arm in summary["arms"]):
            curves(axis, rows, summary, arm, str(pairs), f"C{index}")
        title = f"{pairs} pairs in {summary['length']} tokens, vocabulary {summary['vocabulary']}"
        axis.set(title=f"{title}, state {summary['state']}")
        axis.set(xlabel=f"step of {summary['batch']} sequences", ylabel="accuracy at the queries, validation")
        axis.set_ylim(-0.03, 1.03)
        axis.legend(title="accuracy on fresh sequences, mean of seeds", fontsize="small", title_fontsize="small")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(summary["pairs"]) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(axis: Axes, rows: list[dict[str, Any]], summary: dict[str, Any], arm: str, pairs: str, color: str) -> None:
    """Draw the runs of an arm, with a mark where the run ended because everything was solved."""
    found = summary["arms"][arm]
    setting = {
        key: summary[key] for key in ("length", "pairs", "vocabulary", "state", "initializer_range", "steps", "batch")
    }
    setting |= {"purpose": "result", "arm": arm, "rate": found["rate"]}
    label: str | None = f"{ARMS[arm]}, {found['parameters'] / 1e3:.1f} k parameters: {found[pairs]['mean']:.1%}"
    for run in rows:
        if setting.items() <= run.items() and run["seed"] in summary["seeds"]:
            steps = [point["step"] for point in run["curve"]]
            accuracy = [point["validation"][pairs]["accuracy"] for point in run["curve"]]
            axis.plot(steps, accuracy, color=color, label=label, alpha=0.8, linewidth=1.5)
            if run["trained"] < run["steps"]:
                axis.plot(steps[-1], accuracy[-1], color=color, marker="o")
            label = None
