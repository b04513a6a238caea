"""The report of a distillation: its check, numbers, sentences, files and plots, and the table for a terminal."""

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from report_example import CONVERTED, HEADS, HOSTILE, example_report, hostile_report, markup, table_after
from rich.console import Console

from ssm_zoo.distill.report import evaluation_table, print_table, write_report
from ssm_zoo.harness.published import DecorationWarning
from ssm_zoo.reports.distillation_report import parse_report
from ssm_zoo.reports.distillation_tables import verdict_list
from ssm_zoo.reports.results import limits, recovered_fraction, recovered_sentence, verdicts

PLOTS = {"heads.png", "heldout.png", "layers.png", "losses.png"}


def test_all_files_are_written_and_the_json_is_the_report(tmp_path: Path):
    report = example_report()
    write_report(tmp_path / "new" / "run", report)
    folder = tmp_path / "new" / "run"
    assert {path.name for path in folder.iterdir()} == {"plots", "report.json", "report.md"}
    assert {path.name for path in (folder / "plots").iterdir()} == PLOTS
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in PLOTS:
        assert text.count(f"](plots/{name})") == 1


def test_the_table_of_evaluations_holds_the_numbers_of_the_report(tmp_path: Path):
    report = example_report()
    write_report(tmp_path, report)
    rows = table_after((tmp_path / "report.md").read_text(encoding="utf-8"), "Evaluations")
    teacher = report["evaluations"][0]["loss"]
    assert len(rows) == len(report["evaluations"]) == 6
    for cells, part in zip(rows, report["evaluations"], strict=True):
        assert f"`{part['name']}`" in cells[0]
        assert cells[1] == f"{part['loss']:.4f}"
        if part["kind"] == "teacher":
            assert [cells[2], *cells[4:6]] == ["—"] * 3
        else:
            assert [cells[2], *cells[4:6]] == [
                f"{part['loss'] - teacher:+.4f}",
                f"{part['kl']:.4f}",
                f"{part['top1_agreement']:.1%}",
            ]
        assert cells[6] == ("—" if part["kind"] == "zeroed" else f"{part['repeat_loss']:.4f}")
        assert cells[7] == f"{part['trained_tokens']:,}"
    assert [cells[8] for cells in rows] == ["0", "0", "0", "120", "371", "682"]  # 120.5, + 250.25, + 310.75


def test_rows_for_programs_are_not_rounded():
    report = example_report()
    rows = evaluation_table(report)
    assert [row.name for row in rows] == [part["name"] for part in report["evaluations"]]
    assert rows[0].gap is None
    assert rows[-1].gap == 3.7215 - 3.6741
    assert rows[-1].trained_seconds == 120.5 + 250.25 + 310.75
    assert (rows[-1].kl, rows[-1].top1_agreement, rows[-1].trained_tokens) == (0.1012, 0.8123, 204_800)


def test_layers_and_stages_are_listed_with_their_numbers(tmp_path: Path):
    report = example_report()
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = table_after(text, "Layers")
    assert [int(cells[0]) for cells in rows] == CONVERTED
    first, last = (report["evaluations"][index]["layers"] for index in (2, -1))
    for cells, before, after in zip(rows, first, last, strict=True):
        assert cells[1] == f"{before['output_error']:.3g}"
        assert cells[4] == f"{after['output_error']:.3g}"
        assert cells[5] == f"{sum(before['matrix_error']) / HEADS:.3g}"
        assert cells[6] == f"{sum(after['matrix_error']) / HEADS:.3g}"
    assert rows[0][7] == "33 (9 to 129), 1 without decay"  # of 9, 17, 33, 65 and 129
    assert rows[1][7] == "27 (7 to 131)"  # of 7, 11, 19, 35, 67 and 131
    assert "| `align` | `hidden_state_alignment` | `mixers` | 102,400 | 100 | 256 | 4 | 0.002 | 250 |" in text
    assert "| `full_attention`, softmax attention over the whole context | 0, 2, 4, 6, 8, 10 | 6 |" in text


CASES = [
    pytest.param(
        {"loss": 3.95, "kl": 0.3, "top1_agreement": 0.7},
        False,
        "did not improve on the one before: the held-out loss rose from 3.9023 to 3.9500 nats per token "
        "(+0.0477); KL to the teacher rose from 0.2811 to 0.3000; top-1 agreement fell from 71.2% to 70.0%.",
        id="worse",
    ),
    pytest.param(
        {"loss": 3.90226, "kl": 0.2811, "top1_agreement": 0.7122},
        False,
        "did not improve on the one before: the held-out loss stayed at 3.9023; "
        "KL to the teacher stayed at 0.2811; top-1 agreement stayed at 71.2%.",
        id="better-by-less-than-is-shown",
    ),
    pytest.param(
        {"loss": 3.9, "kl": 0.3, "top1_agreement": 0.72},
        True,
        "lowered the held-out loss from 3.9023 to 3.9000 nats per token (-0.0023); "
        "KL to the teacher rose from 0.2811 to 0.3000; top-1 agreement rose from 71.2% to 72.0%.",
        id="better-but-further-from-the-teacher",
    ),
    pytest.param(
        {"loss": math.nan, "kl": math.inf, "top1_agreement": 0.0},
        False,
        "did not improve on the one before: the held-out loss is not finite.",
        id="diverged",
    ),
]


@pytest.mark.parametrize(("scores", "improved", "sentence"), CASES)
def test_every_stage_is_told_whether_it_improved(scores: dict[str, float], improved: bool, sentence: str):
    report = example_report()
    report["evaluations"][-1] |= scores
    found = verdicts(parse_report(report))
    assert [verdict.improved for verdict in found] == [True, True, improved]
    assert found[-1].sentence == sentence
    line = f"`distil` {sentence}"
    assert verdict_list(parse_report(report)).splitlines()[-1] == (f"- {line}" if improved else f"- **{line}**")


@pytest.mark.parametrize(
    ("zeroed", "student", "fraction"),
    [
        pytest.param(8.6688, 3.7215, (8.6688 - 3.7215) / (8.6688 - 3.6741), id="most"),
        pytest.param(8.0, 9.0, -1.0 / (8.0 - 3.6741), id="worse-than-nothing"),
        pytest.param(8.0, 3.5, (8.0 - 3.5) / (8.0 - 3.6741), id="better-than-the-teacher"),
        pytest.param(3.6741, 3.7, None, id="mixers-were-worth-nothing"),
        pytest.param(math.inf, 3.7, None, id="floor-not-finite"),
        pytest.param(8.0, math.nan, None, id="student-not-finite"),
    ],
)
def test_recovered_fraction(zeroed: float, student: float, fraction: float | None):
    report = example_report()
    report["evaluations"][1]["loss"], report["evaluations"][-1]["loss"] = zeroed, student
    found = recovered_fraction(parse_report(report))
    assert found == (None if fraction is None else pytest.approx(fraction, rel=1e-12))
    shown = "is not defined here" if fraction is None else f"= {fraction:.1%}, with L0 = {zeroed:.4f}"
    assert shown in recovered_sentence(parse_report(report))


def test_numbers_that_are_not_finite_become_null_and_read_back_the_same(tmp_path: Path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = example_report()
    report["evaluations"][2] |= {"loss": math.inf, "perplexity": math.inf, "kl": math.nan}
    report["evaluations"][2]["layers"][0]["matrix_error"][1] = math.nan
    report["stages"][0]["history"][3]["loss"] = -math.inf
    write_report(tmp_path, report)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    again = json.loads(text, parse_constant=refuse)
    assert again["evaluations"][2]["loss"] is None
    assert again["stages"][0]["history"][3]["loss"] is None
    assert again["evaluations"][2]["layers"][0]["matrix_error"][1] is None
    assert parse_report(again) == parse_report(report)


def test_limits_are_those_of_the_run():
    report = example_report()
    text = " ".join(limits(parse_report(report)))
    for expected in (
        "204,800 training tokens",
        "in-domain",
        "No benchmark",
        "up to 256 tokens",
        "biases",
        "10.0% of",
    ):
        assert expected in text
    report["data"]["heldout_sources"] = ["novel.txt"]
    report["stages"][0]["tokens"] = 10**9
    text = " ".join(limits(parse_report(report)))
    assert "in-domain" not in text
    assert "small budget" not in text
    report["data"]["heldout_in_training"] = ["novel.txt"]
    assert "and `novel.txt` was read in training, too: they say" in " ".join(limits(parse_report(report)))


def paths_of(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The places of all keys that the schema requires: of the last item of each list, not inside the recipe."""
    found: list[tuple[str | int, ...]] = []
    if isinstance(value, dict):
        for key, part in value.items():
            found.append((*prefix, key))
            if key not in ("recipe", "versions"):
                found += paths_of(part, (*prefix, key))
    elif isinstance(value, list) and value:
        found += paths_of(value[-1], (*prefix, len(value) - 1))
    return found


def test_every_missing_key_is_named_in_one_line():
    places = paths_of(example_report())
    assert len(places) == 61
    places = [place for place in places if place[-1] != "repeat_loss"]  # reports of before it was measured
    for place in places:
        report = example_report()
        parent: Any = report
        for key in place[:-1]:
            parent = parent[key]
        del parent[place[-1]]
        with pytest.raises(ValueError) as caught:
            parse_report(report)
        message = str(caught.value)
        assert message.startswith(f"report: `{'.'.join(map(str, place))}` is missing; required: "), message
        assert str(place[-1]) in message.split("required: ")[1]
        assert "\n" not in message


def set_at(*place: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        parent: Any = report
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(set_at("format", to=2), "report: `format` must be 1, got 2", id="format"),
        pytest.param(set_at("kind", to="x"), "report: `kind` must be 'distillation', got 'x'", id="kind"),
        pytest.param(
            set_at("evaluations", 3, "top1_agreement", to=7.0),
            "report: `evaluations.3.top1_agreement` must be at most 1, got 7.0",
            id="agreement",
        ),
        pytest.param(
            set_at("evaluations", 1, "loss", to="low"),
            "report: `evaluations.1.loss` must be a number, got 'low'",
            id="text-for-a-number",
        ),
        pytest.param(
            set_at("evaluations", 2, "kind", to="begin"),
            "report: `evaluations.2.kind` must be 'teacher', 'zeroed', 'control', 'start' or 'stage', got 'begin'",
            id="unknown-kind",
        ),
        pytest.param(
            set_at("teacher", to="a/b"),
            "report: `teacher` must be a mapping with the keys source, model_type, parameters, licence, got 'a/b'",
            id="text-for-a-mapping",
        ),
        pytest.param(
            lambda report: report["evaluations"].pop(0),
            "report: `evaluations` must have one of kind 'teacher', got 0",
            id="no-teacher",
        ),
        pytest.param(
            lambda report: report["evaluations"].pop(),
            "report: `evaluations` of kind 'stage' must follow the stages ['matrices', 'align', 'distil'], "
            "got ['matrices', 'align']",
            id="stage-not-evaluated",
        ),
        pytest.param(
            set_at("student", "layers", to=[1, 12]),
            "report: `student.layers` must be from 0 to 11, got 12",
            id="layer-that-is-not-there",
        ),
        pytest.param(
            set_at("student", "num_layers", to=13),
            "report: `student.mixer_types` must have num_layers = 13 names, got 12",
            id="names-of-mixers",
        ),
    ],
)
def test_a_bad_report_is_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
):
    report = example_report()
    change(report)
    with pytest.raises(ValueError) as caught:
        write_report(tmp_path / "run", report)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_a_stage_with_more_converted_layers_says_so():
    report = example_report()
    assert not [part for part in verdicts(parse_report(report)) if "converted layers" in part.sentence]
    before, after = report["evaluations"][-2:]
    before["layers"] = before["layers"][:1]
    *_, last = verdicts(parse_report(report))
    assert last.sentence.endswith(f". It has {len(after['layers'])} converted layers, the one before 1.")


def test_what_is_not_a_mapping_is_refused():
    with pytest.raises(ValueError, match=r"report: the top level must be a mapping with the keys format, .*, got \[\]"):
        parse_report([])


def test_keys_of_a_later_version_are_ignored():
    report = example_report()
    report["colour"] = "blue"
    report["teacher"]["age"] = 3
    assert parse_report(report) == parse_report(example_report())


def test_texts_from_outside_stay_texts(tmp_path: Path):
    write_report(tmp_path, hostile_report())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    html, targets, headings = markup(text)
    assert html == []
    assert set(targets) == {f"plots/{name}" for name in PLOTS}
    assert headings[1:] == [
        "What was done",
        "Evaluations",
        "Did every stage help?",
        "Layers",
        "What it writes",
        "Limits",
        "To repeat it",
    ]
    assert "\x1b" not in text
    # No name adds a column or ends a row.
    assert [len(cells) for cells in table_after(text, "Evaluations")] == [9] * 6
    assert [len(cells) for cells in table_after(text, "What was done")] == [3, 3, 3]
    fences = [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]
    assert HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}") + "\n" in fences


def test_what_a_run_did_not_measure_is_not_drawn(tmp_path: Path):
    write_report(tmp_path, example_report())
    report = example_report()
    for part in report["evaluations"]:
        part["layers"] = []
    for stage in report["stages"]:
        stage["history"] = []
    write_report(tmp_path, report)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["heldout.png"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Layers" not in text
    assert text.count("](plots/") == 1


def test_a_plot_that_fails_costs_a_warning_and_not_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_figure: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise ValueError("cannot find the font")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.warns(DecorationWarning, match="the plots: cannot find the font; going on without it"):
        write_report(tmp_path, example_report())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["plots", "report.json", "report.md"]
    assert "](plots/" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_write_that_fails_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, _content: bytes) -> int:
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    write_report(tmp_path, example_report())
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    # The same numbers in the same plots: what is left to be replaced is the text.
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name not in pictures}
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, hostile_report())
    after = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "plots"]
    assert {path: path.read_bytes() for path in after} == before


def printed(report: dict[str, Any], width: int = 80) -> str:
    stream = StringIO()
    print_table(report, Console(file=stream, width=width, force_terminal=False))
    return stream.getvalue()


def test_the_table_fits_a_terminal_and_names_are_no_styles():
    report = example_report()
    report["evaluations"][-1] |= {"name": "[red]end", "loss": 4.0}
    report["stages"][-1]["name"] = "[red]end"
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if "│" in line]
    assert [cell.strip() for cell in rows[-1].strip("│").split("│")] == [
        "after [red]end",
        "4.0000",
        "+0.3259",
        "0.1012",
        "81.2%",
        "0.9304",
        "204,800",
    ]
    assert "[red]end did not improve on the one before" in text.replace("\n", " ")
    assert "Recovered fraction (L0 - LS) / (L0 - LT) = 93.5%" in " ".join(text.split())


def test_reports_of_before_the_control_and_the_repeated_passage_are_read_and_newer_ones_show_both(tmp_path: Path):
    report = example_report()
    for part in report["evaluations"]:
        del part["repeat_loss"]
    write_report(tmp_path / "old", report)
    assert {cells[6] for cells in table_after((tmp_path / "old" / "report.md").read_text(), "Evaluations")} == {"—"}

    report = example_report()
    control = {**report["evaluations"][2], "name": "window + sinks", "kind": "control", "kl": 0.125, "layers": []}
    report["evaluations"].insert(2, control)
    write_report(tmp_path / "new", report)
    rows = table_after((tmp_path / "new" / "report.md").read_text(), "Evaluations")
    assert [cells[0] for cells in rows[1:4]] == ["`mixers zeroed`", "`window + sinks`", "`step 0`"]
    assert (rows[2][4], rows[2][6]) == ("0.1250", f"{control['repeat_loss']:.4f}")
