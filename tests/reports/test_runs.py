"""`ssm-zoo report` puts runs side by side that can be compared, and refuses the others."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparison_example import example_comparison
from report_example import HOSTILE_NAME, example_report, markup
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.reports.runs import compare_runs, runs_markdown
from ssm_zoo.reports.runs_plot import draw_runs

SOURCES = {"teacher": {"source": "example-org/Teacher-135M", "commit": "a" * 40}}


def save_run(folder: Path, report: dict[str, Any], sources: dict[str, Any] | None = None, heldout: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    marker = {"kind": "ssm-zoo distillation run", "format": 1, "recipe": {"sources": sources or SOURCES}}
    (folder / "run.json").write_text(json.dumps(marker))
    if heldout:
        progress = folder / "checkpoints" / "checkpoint-3-0" / "progress.json"
        progress.parent.mkdir(parents=True)
        progress.write_text(json.dumps({"data": {"train": "x", "heldout": heldout}}))
    return folder


def with_comparison(**changes: Any) -> dict[str, Any]:
    report = {**example_report(), "comparison": example_comparison(), **changes}
    control = {**copy.deepcopy(report["evaluations"][2]), "name": "window + sinks", "kind": "control", "layers": []}
    report["evaluations"].insert(2, control)
    return report


def another() -> dict[str, Any]:
    """A run of one stage without a comparison."""
    report = example_report()
    report["stages"] = report["stages"][:1]
    report["evaluations"] = report["evaluations"][:4]
    return report


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    first = save_run(tmp_path / "first", with_comparison(), heldout="b" * 64)
    return [first, save_run(tmp_path / "second", another(), heldout="b" * 64)]


def test_the_rows_are_those_of_the_reports(runs: list[Path]) -> None:
    found = compare_runs(runs)
    assert [(row.run, row.kind, row.trained_tokens) for row in found.rows] == [
        ("first", "teacher", 0), ("first", "control", 0), ("first", "start", 0), ("first", "stage", 51_200),
        ("first", "stage", 153_600), ("first", "stage", 204_800),
        ("second", "teacher", 0), ("second", "start", 0), ("second", "stage", 51_200),
    ]  # fmt: skip
    teacher, control, _, _, _, last = found.rows[:6]
    assert last.gap == pytest.approx(3.7215 - 3.6741) and last.kl == 0.1012 and last.top1_agreement == 0.8123
    models = {model["kind"]: model for model in example_comparison()["models"]}
    for row in (teacher, control, last):
        recall = [cell["accuracy"] for cell in models[row.kind]["recall"]]
        assert row.recall == pytest.approx(sum(recall) / len(recall))
        longest = models[row.kind]["decoding"][-1]
        assert row.tokens_per_second == pytest.approx(1 / longest["decode_seconds"])
        assert row.cache_bytes == longest["cache_bytes"]
    assert last.times_teacher == pytest.approx((0.06 + 6e-6 * 32768) / (0.06 + 1e-7 * 32768))
    assert last.by_position[-1].end == 2048 and not teacher.by_position
    assert found.rows[4].recall is None and found.rows[8].recall is None
    assert found.context == 32768
    assert found.notes == [
        "The runs were not trained on the same number of tokens: 204,800, 51,200.",
        "One run has no comparison at the end (evaluation.final: false).",
    ]


def test_only_what_all_runs_measured_is_compared(tmp_path: Path) -> None:
    fewer = example_comparison()
    for model in fewer["models"]:
        model["decoding"], model["recall"], model["by_position"] = (
            model["decoding"][:2],
            model["recall"][3:],
            model["by_position"][:3],
        )
    folders = [save_run(tmp_path / "a" / "run", with_comparison())]
    folders.append(save_run(tmp_path / "b" / "run", with_comparison(comparison=fewer)))
    found = compare_runs(folders)
    assert found.context == 8192
    assert found.recall_lists == [(pairs, distance) for pairs in (16, 64) for distance in (0, 256, 1024)]
    assert {part.end for row in found.rows for part in row.by_position} == {128, 256, 512}
    assert [run.name for run in found.runs] == [str(folder) for folder in folders]  # equal names
    a, b = ([row for row in found.rows if row.run == run.name] for run in found.runs)
    assert [row.model_copy(update={"run": ""}) for row in a] == [row.model_copy(update={"run": ""}) for row in b]


def test_other_dtypes_and_seeds_are_told(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / "a", with_comparison())]
    for name, changes in (("b", {"dtype": "bfloat16"}), ("c", {"seed": 7})):
        report = with_comparison()
        report["recipe"] |= changes
        folders.append(save_run(tmp_path / name, report))
    rounding = "The runs were measured in different dtypes, bfloat16 and float32. Rounding is part of the KL."
    drawn = "The runs have different seeds, so their recall was measured on different keys and values."
    assert compare_runs(folders[:2]).notes == [rounding]
    assert compare_runs(folders[::2]).notes == [drawn]
    assert compare_runs(folders).notes == [rounding, drawn]
    without = with_comparison(comparison=None)
    without["recipe"]["seed"] = 7
    assert drawn not in compare_runs([folders[0], save_run(tmp_path / "d", without)]).notes


def test_the_command_prints_and_saves_one_table_and_one_picture(runs: list[Path]) -> None:
    result = CliRunner().invoke(app, ["report", "first", "second"])
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    assert {path.name for path in Path("report").iterdir()} == {"runs.md", "runs.png", "runs.json"}
    assert f"written to {Path('report').absolute()}: runs.md" in result.stdout
    saved = Path("report/runs.md").read_text()
    assert saved.replace("![2 runs](runs.png)\n\n", "") in result.stdout
    table = [line for line in saved.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 8 + 2 + 2  # the teacher once
    assert "| `first` | after `distil` | 204,800 | 3.7215 | +0.0474 | 0.1012 | 81.2% |" in saved
    swapped = runs_markdown(compare_runs(runs[::-1]))  # the teacher's row is that of a run with a comparison
    assert next(line for line in saved.splitlines() if "| teacher |" in line) in swapped
    numbers = json.loads(Path("report/runs.json").read_text())
    assert [row["kl"] for row in numbers["rows"]][5] == 0.1012
    assert CliRunner().invoke(app, ["report", "second"]).exit_code == 0  # an earlier report is replaced
    assert "# 1 run with" in Path("report/runs.md").read_text()
    (Path("report") / "mine.txt").write_text("mine")
    refused = CliRunner().invoke(app, ["report", "second"])
    assert refused.exit_code == 2 and "holds something other than an earlier report" in refused.stderr


def test_the_picture_has_a_panel_for_each_quantity(runs: list[Path]) -> None:
    titles = [axes.get_title() for axes in draw_runs(compare_runs(runs)).axes]
    assert len(titles) == 7 and "Cache at 32,768 tokens" in titles
    assert len(draw_runs(compare_runs(runs[1:])).axes) == 3


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["teacher"].update(source="other/x"), r"the teacher must be the same, got other/x and e"),
        (lambda report: report["data"].update(heldout_sources=["b.txt"]), "the held-out text must be the same, got b"),
        (lambda report: report["data"].update(heldout_tokens=3), "number of held-out tokens must be the same, got 3"),
        (lambda report: report["evaluations"][0].update(loss=3.7), "teacher's held-out loss must be the same, got 3.7"),
        (lambda report: report["evaluations"][0].update(tokens=9), "number of scored predictions must be the same"),
        (lambda report: report["recipe"].update(evaluation={"repeat_distance": 9}), "evaluation.repeat_distance must"),
        (lambda report: report.pop("student"), r"has a damaged report\. report: `student` is missing"),
        (lambda report: report.update(kind="training"), r"second must be a finished distillation, got .* 'training'"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    report = another()
    report["recipe"]["evaluation"] = {"repeat_distance": 8}
    first = save_run(tmp_path / "first", copy.deepcopy(report))
    change(report)
    with pytest.raises(ValueError, match=message):
        compare_runs([first, save_run(tmp_path / "second", report)])


def test_fingerprints_decide_where_both_runs_have_them(tmp_path: Path) -> None:
    first = save_run(tmp_path / "first", another(), heldout="b" * 64)
    sources = {"teacher": {"source": "elsewhere", "commit": "b" * 40}}
    with pytest.raises(ValueError, match=r"the teacher's commit must be the same, got bbbbbbbbbbbb… and aaaaaaaaaaaa…"):
        compare_runs([first, save_run(tmp_path / "teacher", another(), sources)])
    with pytest.raises(ValueError, match=r"the held-out tokens must be the same, got cccccccccccc… and bbbbbbbbbbbb…"):
        compare_runs([first, save_run(tmp_path / "text", another(), heldout="c" * 64)])
    assert len(compare_runs([first, save_run(tmp_path / "no-checkpoint", another())]).runs) == 2


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    for name, message in (("nothing", "there is no folder"), ("empty", "not the folder of a run"), ("half", "Resume")):
        if name != "nothing":
            (tmp_path / name).mkdir()
        if name == "half":
            (tmp_path / name / "run.json").write_text("{}")
        with pytest.raises(ValueError, match=f"RUN: .*{message}"):
            compare_runs([tmp_path / name])
    twice = save_run(tmp_path / "run", another())
    with pytest.raises(ValueError, match="run is named twice"):
        compare_runs([twice, tmp_path / "." / "run"])


def test_names_in_a_report_are_no_markup(tmp_path: Path) -> None:
    report = another()
    report["teacher"]["source"] = report["data"]["heldout_sources"][0] = HOSTILE_NAME
    report["hardware"]["cpu"] = HOSTILE_NAME
    report["stages"][0]["name"] = report["evaluations"][-1]["name"] = HOSTILE_NAME
    text = runs_markdown(compare_runs([save_run(tmp_path / "run", report)]))
    html, targets, headings = markup(text)
    assert html == [] and targets == [] and len(headings) == 1
