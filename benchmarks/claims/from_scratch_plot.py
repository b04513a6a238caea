"""Draw a result file of `from_scratch.py`: held-out loss at equal tokens and in equal time, a row for each family."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Our class as it starts; our class from the initial weights of transformers'.
OURS, PEER = "ours", "theirs in our class"
# Line colour and words of each side.
SIDES = {OURS: ("C0", "ours"), PEER: ("C1", "transformers'")}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what the summaries of `rows` are about into `path`."""
    summaries = [row for row in rows if row["purpose"] == "summary"]
    figure, axes = plt.subplots(len(summaries), 2, figsize=(12, 4 * len(summaries)), squeeze=False)
    for summary, (tokens, seconds) in zip(summaries, axes, strict=True):
        for arm in SIDES:
            curves(tokens, rows, summary, f"{arm}, equal tokens", scale=1.0)
        ours, theirs = summary["seconds_per_step"]["ours"], summary["seconds_per_step"]["theirs"]
        curves(seconds, rows, summary, f"{OURS}, equal tokens", scale=ours)
        curves(seconds, rows, summary, f"{PEER}, equal time", scale=theirs)
        about = next(row for row in rows if row["purpose"] == "trial" and row["family"] == summary["family"])
        tokens.set(title=f"{summary['family']}, {about['parameters'] / 1e6:.1f} M parameters: equal tokens")
        tokens.set_xlabel(f"step of {about['batch']} windows")
        seconds.set(title=f"equal time: {ours:.2f} and {theirs:.2f} s a step", xlabel="CPU seconds")
        title = None
        if confirmed := summary.get("confirmed"):
            difference = f"{confirmed['largest_difference']:.0e}"
            title = f"transformers' class, {confirmed['steps']} steps: training loss within {difference}"
        for axis in (tokens, seconds):
            axis.set_ylabel("held-out loss, nats per token")
            axis.legend(title=title, fontsize="small", title_fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(axis: Axes, rows: list[dict[str, Any]], summary: dict[str, Any], side: str, scale: float) -> None:
    """Draw the mean of a side's seeds as a line and their range as a band; `scale` is the x of a step."""
    arm, _, purpose = side.rpartition(", ")
    wanted = summary[side]
    setting = {key: wanted[key] for key in ("rate", "initializer_range", "steps")}
    setting |= {"family": summary["family"], "arm": arm, "purpose": purpose}
    runs = [row for row in rows if setting.items() <= row.items() and row["seed"] in wanted["seeds"]]
    steps = [point["step"] * scale for point in runs[0]["curve"]]
    losses = [[run["curve"][i]["held_out"] for run in runs] for i in range(len(steps))]
    color, words = SIDES[arm]
    label = f"{words}, rate {wanted['rate']:g}, range {wanted['initializer_range']:g}: {wanted['mean']:.3f}"
    axis.plot(steps, [mean(found) for found in losses], color=color, marker=".", label=label)
    axis.fill_between(steps, [min(found) for found in losses], [max(found) for found in losses], color=color, alpha=0.3)
