"""Draw a result file of `gpu_kernels.py`: one picture per op, and the roofline of all.

A picture holds a panel per mode, the time of our side and of each peer over the length (or the batch, or case by
case), on logarithmic axes, with the time that the counted bytes and FLOPs need at the measured ceilings.

    python benchmarks/kernels/kernel_plots.py benchmarks/results/kernels-20261124T120000Z.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    """Return all rows of a file that hold a measurement, including the ceilings."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["status"] == "measured"]


def series(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return points (size, milliseconds) by shape and side; the size is the length, or the batch of a step."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        swept = "L" if "L" in row["sizes"] else "B"
        shape = " ".join(f"{symbol}{size}" for symbol, size in row["sizes"].items() if symbol != swept)
        point = (row["sizes"][swept], 1000 * row["seconds"]["median"])
        lines.setdefault((f"{shape} {row['dtype']}", row["peer"] or "ours"), []).append(point)
        if row["peer"] is None:
            floor = (row["sizes"][swept], 1000 * row["floor_seconds"])
            lines.setdefault((f"{shape} {row['dtype']}", "roofline"), []).append(floor)
    return lines


def draw_op(op: str, rows: list[Row], path: Path) -> None:
    """Time over size, a column of panels per mode and a row per shape."""
    modes = sorted({row["mode"] for row in rows})
    shapes = sorted({shape for shape, _ in series(rows)})
    size = (6.5 * len(modes), 4.5 * len(shapes))
    figure, axes = plt.subplots(len(shapes), len(modes), figsize=size, squeeze=False, layout="constrained")
    sides = ["ours", "roofline", *sorted({row["peer"] for row in rows if row["peer"]})]
    for column, mode in enumerate(modes):
        lines = series([row for row in rows if row["mode"] == mode])
        for axis, shape in zip(axes[:, column], shapes, strict=True):
            for index, side in enumerate(sides):
                points = sorted(lines.get((shape, side), []))
                if points:
                    style = {"ours": "ko-", "roofline": "k:"}.get(side, f"C{index % 10}.-")
                    axis.plot(*zip(*points, strict=True), style, label=side)
            swept = "L" if "L" in rows[0]["sizes"] else "B"
            axis.set(title=f"{op}, {mode}\n{shape}", xlabel=swept, ylabel="ms, median", xscale="log", yscale="log")
            if axis.lines:
                axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_roofline(rows: list[Row], ceilings: Row, path: Path) -> None:
    """Draw FLOP/s over FLOPs per byte of our kernels, with the measured ceilings."""
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    ours = [row for row in rows if row["peer"] is None]
    _ceilings(axis, [row["flops"] / row["bytes"] for row in ours], ceilings)
    for index, op in enumerate(sorted({row["op"] for row in ours})):
        points = [(row["flops"] / row["bytes"], row["flops_per_s"]) for row in ours if row["op"] == op]
        axis.plot(*zip(*points, strict=True), "os^vDP*Xd"[index % 9], label=op)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte, counted", ylabel="FLOP/s, measured")
    axis.set_title(ceilings.get("gpu", ceilings["hardware"]))
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ceilings(axis: Axes, intensities: list[float], ceilings: Row) -> None:
    low, high = min(intensities) / 2, max(intensities) * 2
    for dtype, style in (("bfloat16", "k-"), ("float32", "k--")):
        roof = ceilings[f"{dtype}_flops_per_s"]
        ridge = roof / ceilings["copy_bytes_per_s"]
        at = sorted({low, min(max(ridge, low), high), high})
        axis.plot(at, [min(roof, x * ceilings["copy_bytes_per_s"]) for x in at], style, label=f"copy, {dtype} product")


def draw(path: Path) -> list[Path]:
    """Draw what a result file holds, beside it; returns the pictures."""
    rows = load(path)
    ceilings = [row for row in rows if row["case"] == "ceilings"]
    rows = [row for row in rows if row["case"] != "ceilings"]
    if not (rows and ceilings):
        raise ValueError(f"{path}: holds no measured case")
    pictures = []
    for op in sorted({row["op"] for row in rows}):
        pictures.append(path.with_name(f"{path.stem}-{op}.png"))
        draw_op(op, [row for row in rows if row["op"] == op], pictures[-1])
    pictures.append(path.with_name(f"{path.stem}-roofline.png"))
    draw_roofline(rows, ceilings[-1], pictures[-1])
    return pictures


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="kernel_plots.py", description="Draw a result file of gpu_kernels.py.")
    parser.add_argument("file", type=Path, help="the .jsonl file; the pictures appear beside it")
    for picture in draw(parser.parse_args(arguments).file):
        print(f"wrote {picture}")


if __name__ == "__main__":
    main(sys.argv[1:])
