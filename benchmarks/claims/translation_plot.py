"""Draw the tasks of `translation.py`: names kept by length and distance, BLEU by corpus, BLEU by joined sentences."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from translation_arms import ARMS
from translation_table import Rows, groups_of, label_of, tests_of


def draw_results(compared: dict[str, Rows], path: Path) -> None:
    """Draw the rows that are compared, by task of the command line, into `path`; nothing if all diverged."""
    panels: list[tuple[str, Rows, str]] = []
    for name, rows in compared.items():
        rows = [row for row in rows if "tests" in row]
        if not rows:
            continue
        if name == "synthetic":
            tests = tests_of(name, rows)
            lengths = dict.fromkeys(test.partition(",")[0] for test in tests)
            panels += [(name, rows, length) for length in lengths]
        else:
            panels.append((name, rows, ""))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), squeeze=False)
    for axis, (name, rows, chosen) in zip(axes[0], panels, strict=True):
        if name in ("synthetic", "length"):
            _lines(axis, name, rows, chosen)
        else:
            _bars(axis, name, rows)
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _lines(axis: Axes, name: str, rows: Rows, chosen: str) -> None:
    """Draw a line for each arm, with a band from the lowest to the highest seed."""
    score = "entity_recall" if name == "synthetic" else "bleu"
    tests = [test for test in tests_of(name, rows) if test.startswith(chosen)]
    places = [int(re.findall(r"\d+", test)[-1]) for test in tests]
    arms = list(ARMS)
    for (arm, concatenate), own in groups_of(rows).items():
        scores: list[list[Any]] = [[row["tests"][test][score] for row in own] for test in tests]
        color, line = f"C{arms.index(arm)}", "-" if concatenate == 1 else "--"
        label = label_of(arm, concatenate)
        axis.plot(places, [mean(of) for of in scores], line, marker="o", markersize=3, color=color, label=label)
        axis.fill_between(places, [min(of) for of in scores], [max(of) for of in scores], color=color, alpha=0.15)
    first = rows[0]["tests"]
    if name == "synthetic":
        axis.set(title=f"synthetic, {chosen} characters", xlabel="words of the sentence", ylim=(-0.03, 1.03))
        axis.set_ylabel("unseen names that are kept")
        return
    axis.plot(places, [first[test]["copied"]["bleu"] for test in tests], "k:", label="copied source")
    axis.set(title="en-de", xlabel="joined sentences", ylabel="BLEU")


def _bars(axis: Axes, name: str, rows: Rows) -> None:
    """Draw a bar for each arm and corpus, with the range of the seeds."""
    tests, arms = tests_of(name, rows), list(ARMS)
    groups = groups_of(rows)
    width = 0.8 / len(groups)
    for index, ((arm, _), own) in enumerate(groups.items()):
        for place, test in enumerate(tests):
            values = [row["tests"][test]["bleu"] for row in own]
            middle, at = mean(values), place + (index - (len(groups) - 1) / 2) * width
            ends = [[middle - min(values)], [max(values) - middle]]
            label = None if place else ARMS[arm]
            axis.bar(at, middle, width, color=f"C{arms.index(arm)}", yerr=ends, capsize=2, label=label)
    for place, test in enumerate(tests):
        copied = rows[0]["tests"][test]["copied"]["bleu"]
        axis.plot([place - 0.45, place + 0.45], [copied] * 2, "k:", label=None if place else "copied source")
    axis.set_xticks(range(len(tests)), [test.removeprefix("test_") for test in tests], fontsize="small")
    axis.set(title=name, ylabel="BLEU")
