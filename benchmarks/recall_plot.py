"""Draw a result file of `recall.py`: accuracy at the queries over the steps of training, a panel for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from recall_arms import ARMS


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the runs that the summaries of `rows` are about, a line for each seed, into `path`."""
    summaries = [row for row in rows if row["purpose"] == "summary"]
    figure, axes = plt.subplots(1, len(summaries), figsize=(7 * len(summaries), 5), squeeze=False)
    for axis, summary in zip(axes[0], summaries, strict=True):
        for index, arm in enumerate(arm for arm in ARMS if arm in summary["arms"]):
            found = summary["arms"][arm]
            setting = {
                key: summary[key] for key in ("length", "pairs", "vocabulary", "initializer_range", "steps", "batch")
            }
            setting |= {"purpose": "result", "arm": arm, "rate": found["rate"]}
            runs = [row for row in rows if setting.items() <= row.items() and row["seed"] in summary["seeds"]]
            label = f"{ARMS[arm]}: {found['mean']:.1%}"
            for run in runs:
                steps = [point["step"] for point in run["curve"]]
                accuracy = [point["accuracy"] for point in run["curve"]]
                axis.plot(steps, accuracy, color=f"C{index}", label=label, alpha=0.8, linewidth=1.5)
                if run["solved"] is not None:
                    axis.plot(steps[-1], accuracy[-1], color=f"C{index}", marker="o")
                label = None
        axis.set(title=f"{summary['pairs']} pairs in {summary['length']} tokens, vocabulary {summary['vocabulary']}")
        axis.set(xlabel=f"step of {summary['batch']} sequences", ylabel="accuracy at the queries, validation")
        axis.set_ylim(-0.03, 1.05)
        axis.legend(title="accuracy on fresh sequences, mean of seeds", fontsize="small", title_fontsize="small")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
