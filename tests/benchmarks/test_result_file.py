"""Every option that changes a result tells rows of a result file apart, also in rows that have their command only."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bounded_memory
import far_memory
import pytest
from circumstances import RESULTS
from result_file import ResultFile, finished_or, open_results, option_of

FAR = "far_memory-20261129T224927Z.jsonl"
BOUNDED = "bounded_memory-20261129T193000Z.jsonl"


class _BuiltError(Exception):
    """Raised in place of building a student."""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The specifications of the students that a script starts to build."""
    specs: list[Any] = []

    def build(_teacher: Any, spec: Any, layers: list[int]) -> None:
        specs.append((spec.kv_dtype, spec.exact_heads, layers))
        raise _BuiltError

    for script in (far_memory, bounded_memory):
        monkeypatch.setattr(script, "load_teacher", lambda _: SimpleNamespace(num_layers=2))
        monkeypatch.setattr(script, "read", lambda *_: SimpleNamespace())
        monkeypatch.setattr(script, "build_student", build)
    return specs


def test_rows_of_another_dtype_of_keys_and_values_are_not_done(built: list[Any]) -> None:
    known = ["/private/teacher", "--rules", "received", "oracle", "--resume", str(RESULTS / FAR)]
    far_memory.main(known)
    assert built == []  # all rows are there
    for change, expected in (
        (["--kv-dtype", "auto"], ("auto", [], [0, 1])),
        (["--tokens", "512"], ("int8", [], [0, 1])),
        (["--lengths", "512"], ("int8", [], [0, 1])),
    ):
        with pytest.raises(_BuiltError):
            far_memory.main([*known, *change])
        assert built.pop() == expected
    with pytest.raises(_BuiltError):
        far_memory.main(["other", *known[1:]])


def test_rows_of_other_layers_lengths_and_exact_heads_are_not_done(built: list[Any]) -> None:
    known = ["teacher", "--lengths", "256", "2048", "--resume", str(RESULTS / BOUNDED)]
    bounded_memory.main([*known, "--arms", "recall", "decays", "equal"])
    bounded_memory.main([*known, "--arms", "exact", "--exact", "18,2"])
    assert built == []
    for change, expected in (
        (["--arms", "exact", "--exact", "1,0"], ("int8", [(1, 0)], [0, 1])),
        (["--arms", "recall", "--layers", "1"], ("int8", [], [1])),
        (["--arms", "recall", "--lengths", "256"], ("int8", [], [0, 1])),
    ):
        with pytest.raises(_BuiltError):
            bounded_memory.main([*known, *change])
        assert built.pop() == expected


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser()
    found.add_argument("text", type=Path)
    found.add_argument("--seeds", type=int, nargs="+", default=[1])
    found.add_argument("--batch", type=int, default=4)
    found.add_argument("--output", type=Path, default=Path())
    found.add_argument("--resume", type=Path)
    return found


def opened(*arguments: str) -> Any:
    options = parser().parse_args(arguments)
    return open_results(options, parser(), "claims/x.py", list(arguments), free=["seeds"])


def test_a_file_is_continued_with_its_options_only(tmp_path: Path) -> None:
    file = opened("/a/stories.txt", "--output", str(tmp_path))
    file.add({"seed": 1})
    assert json.loads(file.path.read_text())["options"] == {"batch": 4, "text": "stories.txt"}
    again = opened("/b/stories.txt", "--seeds", "2", "--resume", str(file.path))
    assert again.find({"seed": 1}) is not None
    for change, message in (
        (["--batch", "8"], "rows with batch 4, got 8"),
        ([], r"rows with text stories\.txt, got o"),
    ):
        text = "stories.txt" if change else "others.txt"
        with pytest.raises(SystemExit, match=message):
            opened(text, *change, "--resume", str(file.path))
    # A row of an earlier version has its command only; options that are no more are passed over.
    command = "python benchmarks/x.py stories.txt --batch 8 --rates 1 2"
    file.path.write_text(json.dumps({"seed": 1, "command": command}) + "\n")
    assert option_of({"command": command}, "batch", parser(), None) == 8
    assert opened("stories.txt", "--batch", "8", "--resume", str(file.path)).find({"seed": 1})
    with pytest.raises(SystemExit, match="rows with batch 8, got 4"):
        opened("stories.txt", "--resume", str(file.path))


def test_a_command_that_does_not_tell_is_no_contradiction(capsys: pytest.CaptureFixture[str]) -> None:
    assert option_of({"command": "make demo"}, "batch", parser(), 5) == 5
    assert option_of({}, "batch", parser(), 5) == 5
    assert capsys.readouterr().err == ""


def test_a_prediction_is_the_mean_of_the_rows_of_an_arm(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "rows.jsonl", {})
    assert file.prediction({"fast": 10, "slow": 20}, {}) == "30 steps"
    assert file.prediction({"fast": 10, "slow": 20}, {"fast": 360, "slow": 36}) == "30 steps, 1.2 CPU hours predicted"
    file.rows = [
        {"arm": "fast", "steps": 100, "cpu_seconds": 360.0},
        {"arm": "slow", "steps": 100, "cpu_seconds": 3600.0},
        {"arm": "slow", "steps": 100, "cpu_seconds": 7200.0},
        {"arm": "summary"},
    ]
    assert file.prediction({"fast": 1000, "slow": 1000}, {"fast": 9}) == "2,000 steps, 16.0 CPU hours predicted"


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    def trained() -> dict[str, Any]:
        return {"loss": 2.0}

    assert finished_or(tmp_path, trained) == {"loss": 2.0}
    (tmp_path / "report.json").write_text(json.dumps({"loss": 1.0}))
    assert finished_or(tmp_path, trained) == {"loss": 1.0}
