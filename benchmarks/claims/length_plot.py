"""Draw a result file of `length.py`: held-out loss over context, and by position in the longest window."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from length_models import ARMS
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the summaries of `rows` into `path`."""
    summaries = {row["arm"]: row for row in rows if row["purpose"] == "summary"}
    figure = Figure(figsize=(15.0, 4.6), layout="constrained")
    over_context, by_position, difference = figure.subplots(1, 3)
    for arm in (arm for arm in ARMS if arm in summaries):
        draw_arm(summaries[arm], over_context, by_position, difference)
    some = next(iter(summaries.values()))
    trained, longest = some["length"], max(some["lengths"])
    over_context.set_xscale("log", base=2)
    over_context.set_xticks(some["lengths"], labels=[f"{length}" for length in some["lengths"]])
    over_context.set(xlabel=f"tokens of context (trained on {trained}); the same targets", title="all targets")
    by_position.set(xlabel="place of the target", title=f"one window of {longest} tokens")
    title = f"the same, less the loss in pieces of {trained} tokens"
    difference.set(xlabel=f"place of the target, {trained} together", title=title)
    difference.axhline(0.0, color="0.6", linewidth=0.8)
    for axis in (by_position, difference):
        axis.axvline(trained, color="0.6", linestyle=":", linewidth=1.0)
    for axis in (over_context, by_position, difference):
        axis.set_ylabel("held-out loss, nats per token" if axis is not difference else "difference, nats per token")
    title = f"mean and range; loss at {longest} less that at {trained}"
    over_context.legend(fontsize="small", title=title, title_fontsize="small")
    figure.savefig(path, dpi=120)


def draw_arm(summary: dict[str, Any], over_context: Axes, by_position: Axes, difference: Axes) -> None:
    """Draw a line in each picture: the mean over seeds, in the first picture with their range as a band."""
    words, color = ARMS[summary["arm"]]
    lengths = summary["lengths"]
    ends = [summary["held_out"][str(length)] for length in lengths]
    change = summary["change"][str(lengths[-1])]["mean"]
    label = f"{words}, {len(summary['seeds'])} seeds: {change:+.3f}"
    over_context.plot(lengths, [end["mean"] for end in ends], color=color, marker="o", label=label)
    low, high = ([end[side] for end in ends] for side in ("low", "high"))
    over_context.fill_between(lengths, low, high, color=color, alpha=0.25)
    whole, pieces = (summary["by_position"][str(length)] for length in (lengths[-1], lengths[0]))
    width = lengths[-1] // len(whole)
    by_position.plot([width * (index + 0.5) for index in range(len(whole))], whole, color=color, marker=".")
    # Whole pieces together: the first places of a piece have less before them than the last, and the line would zigzag.
    together = max(lengths[0] // width, 1)
    less = [a - b for a, b in zip(whole, pieces, strict=True)]
    means = [mean(less[first : first + together]) for first in range(0, len(less), together)]
    difference.plot([width * together * (index + 0.5) for index in range(len(means))], means, color=color, marker=".")
