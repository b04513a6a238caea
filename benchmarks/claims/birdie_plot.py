"""Table and picture of a result file of `birdie.py`: accuracy by entries and over the steps, rates of the bandit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from birdie_task import ARMS, BANDIT, BLIND
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def table(summary: dict[str, Any]) -> str:
    """Return a Markdown table of the accuracy on fresh books, mean and range of the seeds, with chance below."""
    sizes = list(summary["chance"])
    lines = [
        f"| arm | learning rate | parameters | {' | '.join(f'{size} entries' for size in sizes)} |",
        f"|---|---:|---:|{'---:|' * len(sizes)}",
    ]
    for arm, found in summary["arms"].items():
        cells = [f"{found[s]['mean']:.1%} ({found[s]['low']:.1%} to {found[s]['high']:.1%})" for s in sizes]
        lines.append(f"| {arm} | {found['rate']:g} | {found['parameters']:,} | {' | '.join(cells)} |")
    for kind in next(iter(summary["chance"].values())):
        cells = [f"{summary['chance'][size][kind]:.1%}" for size in sizes]
        lines.append(f"| chance: {kind} | | | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the runs that the summary of `rows` is about into `path`."""
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    sizes = list(summary["chance"])
    arms = [arm for arm in ARMS if arm in summary["arms"]]
    figure, axes = plt.subplots(1, len(sizes) + 1, figsize=(5.2 * (len(sizes) + 1), 4.6), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=False):
        for index, arm in enumerate(arms):
            _curves(axis, rows, summary, arm, size, f"C{index}")
        axis.axhline(summary["chance"][size][BLIND], color="grey", linestyle=":", label="chance")
        axis.set(title=f"{size} entries", xlabel=f"step of {summary['batch']} rows", ylim=(-0.03, 1.03))
        axis.set_ylabel("numbers that are right, validation")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    _rates(axes[0][-1], rows, summary, arms)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _of_arm(rows: list[dict[str, Any]], summary: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    setting = {key: summary[key] for key in ("size", "initializer_range", "steps", "batch")}
    setting |= {"purpose": "result", "arm": arm, "rate": summary["arms"][arm]["rate"]}
    return [row for row in rows if setting.items() <= row.items() and row["seed"] in summary["seeds"]]


def _curves(axis: Axes, rows: list[dict[str, Any]], summary: dict[str, Any], arm: str, size: str, color: str) -> None:
    """Draw the runs of an arm, a line for each seed."""
    label: str | None = f"{arm}: {summary['arms'][arm][size]['mean']:.1%}"
    for run in _of_arm(rows, summary, arm):
        steps = [point["step"] for point in run["curve"]]
        axis.plot(steps, [point["validation"][size] for point in run["curve"]], color=color, label=label, alpha=0.8)
        label = None


def _rates(axis: Axes, rows: list[dict[str, Any]], summary: dict[str, Any], arms: list[str]) -> None:
    """Draw the rates of the first run of the first arm with a bandit."""
    chosen = next((arm for arm in arms if ARMS[arm][0] == BANDIT), None)
    if chosen is None:
        axis.axis("off")
        return
    curve = _of_arm(rows, summary, chosen)[0]["curve"]
    for index, name in enumerate(curve[0]["rates"]):
        line = "-" if index < 10 else "--"
        axis.plot(
            [p["step"] for p in curve], [p["rates"][name] for p in curve], line, color=f"C{index % 10}", label=name
        )
    axis.set(title=f"rates: {chosen}, one seed", xlabel="step", ylabel="share of the samples")
    axis.legend(fontsize="xx-small", ncols=2)
    axis.grid(alpha=0.3)
