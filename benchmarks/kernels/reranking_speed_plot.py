"""Draw a result file of `reranking_speed.py`: pairs per second and peak memory by length, scoring and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw rows into `path`: a column for each mode, a line for each arm."""
    modes, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "arm"))
    figure, axes = plt.subplots(2, len(modes), figsize=(5.2 * len(modes), 7), squeeze=False)
    for column, mode in enumerate(modes):
        for index, arm in enumerate(arms):
            own = sorted(
                (row for row in rows if (row["mode"], row["arm"]) == (mode, arm)), key=lambda row: row["length"]
            )
            lengths = [row["length"] for row in own]
            axes[0][column].plot(
                lengths, [row["pairs_per_second"] for row in own], marker="o", color=f"C{index}", label=arm
            )
            axes[1][column].plot(lengths, [row["bytes"] / 2**30 for row in own], marker="o", color=f"C{index}")
        axes[0][column].set(title=mode, ylabel="pairs per second", yscale="log")
        axes[1][column].set(xlabel="tokens of a pair", ylabel="peak memory, GiB", yscale="log")
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
        axes[0][column].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
