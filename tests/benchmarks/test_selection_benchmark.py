"""Choices of layers are compared by the student before any training, and its control."""

import json
from pathlib import Path
from typing import Any

import pytest
import selection
from teachers import save_teacher, small_text, trained_teacher

ROWS = {"first": [0, 2], "second": [1, 3], "again": [0, 2]}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line, for a tiny teacher and short texts."""
    save_teacher(tmp_path / "teacher", trained_teacher())
    for name, length in (("LENGTH", 64), ("CALIBRATION_LENGTH", 32), ("REPEAT_DISTANCE", 100)):
        monkeypatch.setattr(selection, name, length)
    monkeypatch.setattr(selection, "read_texts", lambda _, split: [small_text(200, seed=len(split))])
    evidence = {"methods": {name: {"layers": layers, "rows": []} for name, layers in ROWS.items()}}
    (tmp_path / "selection.json").write_text(json.dumps(evidence))
    paths = [str(tmp_path / name) for name in ("teacher", "selection.json")]
    return [*paths, "--calibration-tokens", "128", "--tokens", "256"]


def test_each_choice_has_a_student_and_its_control(arguments: list[str], tmp_path: Path) -> None:
    selection.main([*arguments, "--methods", "first", "second", "--output", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").iterdir()
    selection.main([*arguments, "--resume", str(path)])
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 6 and all(row["layers"] == ROWS[row["method"]] for row in rows)
    by_place = {(row["student"], row["method"]): row for row in rows}
    for student, models in (("window", ["scores"]), ("mamba2", ["scores", "control"])):
        first, second, again = (by_place[student, method] for method in ROWS)
        assert first.keys() >= {*models} and ("control" in first) == (student == "mamba2")
        for name in models:
            assert first[name] == again[name] and first[name]["kl"] != second[name]["kl"] > 0
            assert first[name]["repeat_loss"] > 0 and first["predictions"] == 4 * 63
    with pytest.raises(SystemExit, match="rows with calibration_tokens 128, got 256"):
        selection.main([*arguments[:3], "256", "--tokens", "256", "--resume", str(path)])


def test_a_method_that_was_not_measured_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        selection.main([*arguments, "--methods", "third"])
    assert "--methods must be among first, second, again" in capsys.readouterr().err
