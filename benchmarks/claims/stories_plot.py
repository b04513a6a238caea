"""Draw a result file of `stories.py`: held-out loss over training time and over FLOPs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from mixer_arms import ARMS


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what the summary of `rows` is about into `path`."""
    summary = next(row for row in rows if row["purpose"] == "summary")
    figure, (by_time, by_flops) = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    curves(by_time, rows, summary, "equal time", "seconds_per_step", 1.0)
    curves(by_flops, rows, summary, "equal FLOPs", "flops_per_step", 1e-12)
    by_time.set(title=f"equal time: {summary['seconds']:g} s", xlabel="CPU seconds of training")
    by_flops.set(title="equal FLOPs", xlabel="TFLOPs of training")
    by_time.set_ylabel("held-out loss, nats per token")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(
    axis: Axes, rows: list[dict[str, Any]], summary: dict[str, Any], sense: str, per_step: str, unit: float
) -> None:
    """Draw the mean of each arm's seeds as a line and their range as a band, over what a step costs, best arm first."""
    for arm in summary[sense]["order"]:
        setting, loss = summary["settings"][arm], summary[sense][arm]
        wanted = {"purpose": "result", "arm": arm, "rate": setting["rate"], "embedding": setting["embedding"]}
        wanted |= {"steps": max(setting["steps"].values()), "batch": summary["batch"]}
        runs = [row for row in rows if wanted.items() <= row.items() and row["seed"] in summary["seeds"]]
        points = [[run["curve"][i]["held_out"] for run in runs] for i in range(len(runs[0]["curve"]))]
        costs = [point["step"] * setting[per_step] * unit for point in runs[0]["curve"]]
        color = f"C{list(ARMS).index(arm)}"
        label = f"{ARMS[arm]}: {loss['mean']:.3f} ({loss['low']:.3f} to {loss['high']:.3f})"
        axis.plot(costs, [mean(found) for found in points], color=color, marker=".", label=label)
        axis.fill_between(
            costs, [min(found) for found in points], [max(found) for found in points], color=color, alpha=0.2
        )
        end = setting["steps"][sense] * setting[per_step] * unit
        axis.axvline(end, color=color, linewidth=0.8, alpha=0.4)
    axis.legend(title=f"at {sense}: mean and range of the seeds", fontsize="small", title_fontsize="small")
    axis.grid(alpha=0.3)
