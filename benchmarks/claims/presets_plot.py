"""Table and picture of the runs of `presets.py`: mean and range over the seeds of each preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Field, title of the panel, and the teacher's field.
PANELS = (
    ("gap", "gap to the teacher (nats/token)", None),
    ("kl", "KL (nats/token)", None),
    ("repeat_loss", "loss on a repeated passage", "teacher_repeat_loss"),
)


def by_preset(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of runs that ended well, by preset."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["preset"], []).extend([row] if row["loss"] is not None else [])
    return found


def spread(rows: list[dict[str, Any]], name: str) -> tuple[float, float, float] | None:
    """Return mean, lowest and highest value of a field; None if a run lacks it."""
    values = [row[name] for row in rows]
    if not values or None in values:
        return None
    return sum(values) / len(values), min(values), max(values)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table."""
    columns = ("loss", "gap", "kl", "top1_agreement", "repeat_loss", "seconds_per_1000_tokens")
    lines = [
        f"| preset | mixer | layers | tokens | factor | seeds | {' | '.join(columns)} |",
        "|---" * (6 + len(columns)) + "|",
    ]
    for preset, runs in by_preset(rows).items():
        if not runs:
            lines.append(f"| {preset} | diverged " + "| " * (4 + len(columns)) + "|")
            continue
        first = runs[0]
        cells = []
        for name in columns:
            found = spread(runs, name)
            wide = found is not None and len(runs) > 1
            cells.append(
                "—" if found is None else f"{found[0]:.3f}" + (f" ({found[1]:.3f}-{found[2]:.3f})" if wide else "")
            )
        known = [preset, first["mixer"], first["layers"], first["trained_tokens"], f"{first['factor']:g}", len(runs)]
        lines.append(f"| {' | '.join(map(str, known))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw gap, KL and repeat loss of each preset into `path`: before training (hollow) and after it."""
    found = {preset: runs for preset, runs in by_preset(rows).items() if runs}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 0.5 * len(found) + 2), sharey=True, squeeze=False)
    for axis, (name, title, theirs) in zip(axes[0], PANELS, strict=True):
        for place, runs in enumerate(found.values()):
            after = spread(runs, name)
            if after is not None:
                mean, low, high = after
                axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
            # The gap before training follows from the losses.
            before = [
                row["start"]["loss"] - row["teacher_loss"] if name == "gap" else row["start"][name]
                for row in runs
                if row["start"]["loss"] is not None
            ]
            if before and None not in before:
                axis.plot(sum(before) / len(before), place, "o", color="C0", fillstyle="none")
        if theirs and found:
            teacher = next(iter(found.values()))[0][theirs]
            if teacher is not None:
                axis.axvline(teacher, color="gray", linestyle="--", label="teacher")
                axis.legend(fontsize="small")
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(found)), list(found))
    axes[0][0].invert_yaxis()
    figure.suptitle("hollow: before training; filled: after it, with the range over seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
