"""Teacher, control and student side by side in the report, the card, the terminal and the picture."""

import json
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from comparison_example import example_comparison
from matplotlib.colors import to_hex
from report_example import HOSTILE_NAME, example_report, markup, table_after
from rich.console import Console

from ssm_zoo.distill.report import print_table, write_report
from ssm_zoo.reports.comparison_plot import COLORS, draw_comparison
from ssm_zoo.reports.comparison_tables import comparison_rows, comparison_section
from ssm_zoo.reports.distillation_card import render_card, write_card
from ssm_zoo.reports.distillation_report import Comparison, parse_report
from ssm_zoo.reports.markdown import binary_size
from ssm_zoo.reports.results import limits

HEADING = "Beside teacher and control"


def compared_report() -> dict[str, Any]:
    return {**example_report(), "comparison": example_comparison()}


def comparison(report: dict[str, Any] | None = None) -> Comparison:
    found = parse_report(compared_report() if report is None else report).comparison
    assert found is not None
    return found


def tables(text: str) -> list[list[list[str]]]:
    """Cells of all tables of the comparison, without their headers."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|") and not inside:
            found.append([])
        inside = line.startswith("|")
        if inside:
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[2:] for rows in found]


def test_the_tables_hold_the_numbers_of_the_report() -> None:
    models = example_comparison()["models"]
    positions, repeats, recalls, choices, continuations, speeds = tables(comparison_section(comparison()))
    assert [cells[0] for cells in positions] == ["0-128", "128-256", "256-512", "512-1,024", "1,024-2,048"]
    for index, cells in enumerate(positions):
        rows = [model["by_position"][index] for model in models]
        assert cells[1] == f"{rows[0]['tokens']:,}"
        assert cells[2:5] == [f"{row['loss']:.4f}" for row in rows]
        assert cells[5:] == [f"{row['kl']:.4f}" for row in rows[1:]]
    for index, cells in enumerate(repeats):
        rows = [model["repeat"][index] for model in models]
        assert cells == [f"{rows[0]['distance']:,} tokens", *(f"{row['loss']:.4f}" for row in rows)]
    for index, cells in enumerate(recalls):
        rows = [model["recall"][index] for model in models]
        assert cells[:2] == [str(rows[0]["pairs"]), f"{rows[0]['distance']:,}"]
        assert cells[2:5] == [f"{row['accuracy']:.1%}" for row in rows]
        assert cells[5:] == [f"{1 / rows[0]['pairs']:.1%}", "16"]
    assert choices == [
        ["`teacher`", "50.0%", "37.5% to 56.2%", "75.0%", "50.0%", "100.0%"],
        ["`window + sinks`", "37.5%", "25.0% to 43.8%", "25.0%", "50.0%", "50.0%"],
        ["`distil`", "46.9%", "34.4% to 53.1%", "62.5%", "50.0%", "87.5%"],
    ]
    assert continuations == [
        ["`teacher`", "100.0%", "32", "0.0%"],
        ["`window + sinks`", "50.0%", "2", "6.2%"],
        ["`distil`", "87.5%", "24.5", "1.6%"],
    ]
    assert len(speeds) == 9
    # 0.06 + 6e-6 * 2048 s for the teacher, 0.06 + 1e-7 * 2048 s for the student; read at 500 and 526 tokens/s.
    assert speeds[0][2:] == ["13.8", "1", "133", "500", "1", "90 MiB", "100.0%"]
    assert speeds[2] == ["2,048", "`distil`", "16.6", "1.2", "110", "526", "1.05", "4.22 MiB", "4.7%"]
    assert speeds[8] == ["32,768", "`distil`", "15.8", "4.06", "117", "—", "—", "4.22 MiB", "0.3%"]


def test_report_and_card_have_the_section_and_the_picture(tmp_path: Path) -> None:
    report = compared_report()
    write_report(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    write_card(tmp_path, report)
    for name in ("report.md", "README.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count("](plots/comparison.png)") == 1, name
        assert table_after(text, HEADING)[0][:3] == ["0-128", "508", "3.6000"], name
        assert "measured once at the end in 101 seconds" in text
    assert matplotlib.image.imread(tmp_path / "plots" / "comparison.png").shape[1] > 1200
    del report["comparison"]
    write_report(tmp_path, report)
    assert not (tmp_path / "plots" / "comparison.png").exists()
    assert HEADING not in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [lambda report: report.pop("comparison"), lambda r: r.update(comparison=None)])
def test_reports_without_a_comparison_are_read(change: Any) -> None:
    report = compared_report()
    change(report)
    assert parse_report(report).comparison is None
    assert HEADING not in render_card(report)


def test_the_terminal_shows_repeats_recall_speed_and_cache_in_its_width() -> None:
    stream = StringIO()
    print_table(compared_report(), Console(file=stream, width=80, force_terminal=False))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    start = next(index for index, cells in enumerate(rows) if cells[0].startswith("KL at"))
    assert rows[start:] == [
        ["KL at 1,024-2,048", "—", "0.4900", "0.1300"],
        ["repeat loss at 416", "0.3000", "1.1320", "0.5080"],
        ["repeat loss at 1,500", "0.3000", "3.3000", "1.0500"],
        ["recall 4 at 0/256/1024", "98/98/98 %", "88/69/25 %", "96/91/76 %"],
        ["recall 16 at 0/256/1024", "94/94/94 %", "84/64/6 %", "91/86/71 %"],
        ["recall 64 at 0/256/1024", "74/74/74 %", "64/45/2 %", "72/67/52 %"],
        ["choice: right/teacher's", "50/100 %", "38/50 %", "47/88 %"],
        ["tokens/s at 2,048", "13.8", "16.6", "16.6"],
        ["cache at 2,048", "90 MiB", "4.22 MiB", "4.22 MiB"],
        ["tokens/s at 8,192", "9.16", "16.4", "16.4"],
        ["cache at 8,192", "360 MiB", "4.22 MiB", "4.22 MiB"],
        ["tokens/s at 32,768", "3.9", "15.8", "15.8"],
        ["cache at 32,768", "1.41 GiB", "4.22 MiB", "4.22 MiB"],
    ]


def test_the_picture_shows_the_numbers_in_one_colour_for_each_model() -> None:
    compared = comparison()
    figure = draw_comparison(compared)
    assert figure is not None
    losses, divergences, repeats, recalls, choices, speeds, caches = figure.axes
    for line, model in zip(losses.lines, compared.models, strict=True):
        assert list(line.get_ydata()) == [row.loss for row in model.by_position]
        assert line.get_color() == COLORS[model.kind]
    for line, model in zip(divergences.lines, compared.models[1:], strict=True):
        assert list(line.get_ydata()) == [row.kl for row in model.by_position]
    bars = [(bar.get_height(), to_hex(bar.get_facecolor())) for bar in repeats.patches]
    expected = [(row.loss, COLORS[model.kind].lower()) for model in compared.models for row in model.repeat]
    assert bars == expected
    # For each number of pairs three models and the level of chance.
    assert len(recalls.lines) == 12
    assert list(recalls.lines[2].get_ydata()) == [row.accuracy for row in compared.models[2].recall[:3]]
    assert list(recalls.lines[3].get_ydata()) == [0.25, 0.25]
    heights = [[0.5, 0.75, 1.0], [0.375, 0.25, 0.5], [0.46875, 0.625, 0.875]]  # right, consistent, as the teacher
    assert [bar.get_height() for bar in choices.patches] == [value for own in heights for value in own]
    for axes, values in (
        (speeds, [[1 / row.decode_seconds for row in model.decoding] for model in compared.models]),
        (caches, [[row.cache_bytes / 2**20 for row in model.decoding] for model in compared.models]),
    ):
        assert [list(line.get_ydata()) for line in axes.lines] == values
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2k", "8k", "32k"]
    assert [text.get_text() for text in speeds.texts] == ["1.2x", "1.79x", "4.06x"]
    assert [text.get_text() for text in caches.texts] == ["1/21.3", "1/85.3", "1/341"]


@pytest.mark.parametrize(
    ("part", "panels"),
    [("by_position", 5), ("repeat", 6), ("recall", 6), ("choice", 6), ("decoding", 5), ("continuations", 7), (None, 0)],
)
def test_what_was_not_measured_is_left_out(part: str | None, panels: int) -> None:
    report = compared_report()
    for model in report["comparison"]["models"]:
        for name in ("by_position", "repeat", "recall", "choice", "decoding", "continuations"):
            if part in (name, None):
                model[name] = None if name in ("choice", "continuations") else []
    compared = comparison(report)
    figure = draw_comparison(compared)
    assert (0 if figure is None else len(figure.axes)) == panels
    assert len(tables(comparison_section(compared))) == (0 if part is None else 5)
    assert (comparison_rows(compared) == []) == (part is None)


def test_values_that_are_not_finite_and_hostile_names_are_drawn(tmp_path: Path) -> None:
    report = compared_report()
    model = report["comparison"]["models"][2]
    model["name"] = HOSTILE_NAME
    model["by_position"][1]["loss"] = model["by_position"][2]["kl"] = float("nan")
    model["repeat"][0]["loss"] = float("inf")
    figure = draw_comparison(comparison(report))
    assert figure is not None
    figure.savefig(BytesIO(), format="png", dpi=50)
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert markup(text)[0] == []
    assert table_after(text, HEADING)[1][4] == "—"


def test_the_limits_name_the_lengths_that_were_measured() -> None:
    assert "Its loss was measured on texts of up to 2,048." in " ".join(limits(parse_report(compared_report())))
    assert "Longer contexts were not tested." in " ".join(limits(parse_report(example_report())))


def test_models_that_do_not_stand_side_by_side_are_refused() -> None:
    report = compared_report()
    report["comparison"]["models"].pop()
    message = r"`comparison\.models` must be of the kinds 'teacher', 'control' and 'stage', got \['teacher', 'c.*\]"
    with pytest.raises(ValueError, match=message):
        parse_report(report)
    report = compared_report()
    report["comparison"]["models"][1]["repeat"].pop()
    message = r"`comparison\.models\.1\.repeat` must be at the teacher's \[416, 1500\], got \[416\]"
    with pytest.raises(ValueError, match=message):
        parse_report(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (4_423_680, "4.22 MiB"), (2**30 * 3 // 2, "1.5 GiB")],
)
def test_sizes_are_in_the_largest_unit(value: int, text: str) -> None:
    assert binary_size(value) == text
