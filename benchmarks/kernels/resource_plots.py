"""Draw the rows of `resources.py`: for each case and device the predicted time over the roofline; spills are marked.

python benchmarks/kernels/resource_plots.py benchmarks/results/kernel_resources-20261201T065959Z.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]


def draw(rows: Iterable[Row], path: Path) -> None:
    """Draw a panel per device: a bar from the roofline to the predicted time of each kernel, in their order."""
    rows = [row for row in rows if row["kernel"] != "sum"]
    panels = list(dict.fromkeys((name, row["target"]) for row in rows for name in row["predicted"]))
    labels = list(dict.fromkeys(_label(row) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 + 4 * len(panels), 0.19 * len(labels) + 1.5), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, (device, target) in zip(axes[0], panels, strict=True):
        _panel(axis, [row for row in rows if row["target"] == target], device, labels)
        axis.set(title=f"{device} ({target})", xscale="log", xlabel="ms of a launch, predicted")
    axes[0, 0].set_yticks(range(len(labels)), labels, fontsize="x-small")
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=4)
    figure.suptitle("Triton kernels compiled without a GPU: predicted time of a launch against its roofline")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(axis: Axes, rows: list[Row], device: str, labels: list[str]) -> None:
    places = [labels.index(_label(row)) for row in rows]
    found = [row["predicted"][device] for row in rows]
    floors = [math.nan if one["floor_seconds"] is None else 1000 * one["floor_seconds"] for one in found]
    low, middle, high = ([1000 * one["seconds"][end] for one in found] for end in ("low", "middle", "high"))
    axis.hlines(places, low, high, color="C0", lw=3, alpha=0.4, label="predicted, 0.28 to 0.6 instructions a cycle")
    axis.plot(middle, places, "C0o", ms=3, label="predicted, 0.4")
    axis.plot(floors, places, "k|", ms=6, label="roofline of the launch's bytes and products")
    spilled = [(x, y) for x, y, row in zip(middle, places, rows, strict=True) if row["spill_store_bytes"]]
    if spilled:
        axis.plot(*zip(*spilled, strict=True), "rx", ms=7, label="spills registers")
    axis.grid(alpha=0.3)


def _label(row: Row) -> str:
    """Return the kernel, its number among the variants of a case, and the case."""
    case = row["case"].replace("bfloat16", "").replace("forward+backward", "training")
    return f"{row['kernel'].replace('_triton', '').replace('_kernel', '')} {row['variant']}: {case}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="resource_plots.py", description="Draw a result file of resources.py.")
    parser.add_argument("file", type=Path, help="the .jsonl file; the picture appears beside it")
    path = parser.parse_args(arguments).file
    draw(map(json.loads, path.read_text(encoding="utf-8").splitlines()), path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main(sys.argv[1:])
