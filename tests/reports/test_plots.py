"""The plots of a distillation report: what they show, and that they can be drawn of anything a run may measure."""

import math
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from report_example import CONVERTED, HEADS, example_report, hostile_report

from ssm_zoo.distill.report import write_report
from ssm_zoo.reports.distillation_plots import draw
from ssm_zoo.reports.distillation_report import parse_report

PLOTS = {"heads.png", "heldout.png", "layers.png", "losses.png"}


def test_plots_need_no_pyplot_and_are_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    write_report(tmp_path, hostile_report())
    for name in PLOTS:
        image = matplotlib.image.imread(tmp_path / "plots" / name)
        assert min(image.shape[:2]) > 300
        assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 20


def test_plots_show_the_numbers_of_the_report():
    report = parse_report(example_report())
    figures = draw(report)
    assert figures.keys() == PLOTS

    assert len(figures["losses.png"].axes) == 3
    for axes, stage in zip(figures["losses.png"].axes, report.stages, strict=True):
        assert axes.get_title().startswith(stage.name)
        assert axes.get_ylabel().replace("\n", " ") == stage.loss_name
        line = axes.lines[0]
        assert list(line.get_ydata()) == [point.loss for point in stage.history]
        assert list(line.get_xdata()) == [point.step for point in stage.history]
    # 1.3 to 0.053 spans a decade, the others do not.
    assert [axes.get_yscale() for axes in figures["losses.png"].axes] == ["linear", "log", "linear"]

    rows = report.evaluations[1:]
    losses, divergences, agreements = figures["heldout.png"].axes
    assert [label.get_text() for label in losses.get_yticklabels()] == [
        "mixers zeroed",
        "step 0",
        "after matrices",
        "after align",
        "after distil",
    ]
    for axes, values in (
        (losses, [part.loss for part in rows]),
        (divergences, [part.kl for part in rows]),
        (agreements, [part.top1_agreement for part in rows]),
    ):
        assert [bar.get_width() for bar in axes.patches] == values
    assert list(losses.lines[0].get_xdata()) == [3.6741, 3.6741]
    assert losses.texts[-1].get_text() == "3.7215 (+0.0474)"

    axes = figures["layers.png"].axes[0]
    for line, part in zip(axes.lines, report.students, strict=False):
        assert list(line.get_xdata()) == CONVERTED
        assert list(line.get_ydata()) == [row.output_error for row in part.layers]
    assert [line.get_label() for line in axes.lines[:4]] == [
        "step 0",
        "after matrices",
        "after align",
        "after distil",
    ]

    panels = [axes for axes in figures["heads.png"].axes if axes.images]
    for axes, part in zip(panels, (report.students[0], report.students[-1]), strict=True):
        assert np.array_equal(np.asarray(axes.images[0].get_array()), [row.matrix_error for row in part.layers])
        assert [int(label.get_text()) for label in axes.get_yticklabels()] == CONVERTED
    assert panels[0].images[0].norm is panels[1].images[0].norm


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda row: row.update(matrix_error=[], half_life=[]), id="attention"),
        pytest.param(lambda row: row.update(matrix_error=[math.nan] * HEADS, half_life=[None] * HEADS), id="nan"),
        pytest.param(lambda row: row["matrix_error"].pop(), id="fewer-heads-in-one-layer"),
        pytest.param(lambda row: row.update(output_error=0.0, matrix_error=[0.0] * HEADS), id="exact"),
        pytest.param(lambda row: row.update(output_error=12345.6, matrix_error=[1e7] * HEADS), id="huge"),
    ],
)
def test_unusual_layers_are_drawn(change: Callable[[dict[str, Any]], object]):
    report = example_report()
    change(report["evaluations"][-1]["layers"][0])
    for row in report["evaluations"][2]["layers"]:
        change(row)
    figures = draw(parse_report(report))
    for name in ("layers.png", "heads.png"):
        stream = BytesIO()
        figures[name].savefig(stream, format="png", dpi=60)
        assert stream.getvalue().startswith(b"\x89PNG")
