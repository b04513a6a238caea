"""A run's folder: whose it is, and JSON files that are whole."""

import copy
import json
from pathlib import Path

import pytest

from ssm_zoo.harness.fingerprint import check_run, claim_run
from ssm_zoo.harness.run_folder import check_claim, claim_output_folder, write_json

RECIPE = {"teacher": "t", "seed": 0, "stages": [{"name": "a", "tokens": 8}], "student": {"layers": [0, 1]}}


def test_a_new_folder_is_claimed_once_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    assert claim_output_folder(folder, RECIPE) is None
    assert [entry.name for entry in folder.iterdir()] == ["run.json"]
    (folder / "report.md").write_text("x")
    found = claim_output_folder(folder, copy.deepcopy(RECIPE))
    assert found is not None
    assert (found["kind"], found["recipe"]) == ("ssm-zoo distillation run", RECIPE)
    assert json.loads((folder / "run.json").read_text()) == found


def test_an_empty_folder_may_be_claimed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-ssm-zoo-0123456789abcdef").write_text("{")  # of a start that was killed
    assert claim_output_folder(str(tmp_path), {"half_life": (1.0, 2.0)}) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    assert claim_output_folder(tmp_path, {"half_life": [1.0, 2.0]}) is not None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("thesis.tex", "text", id="somebodys-file"),
        pytest.param(".hidden", "", id="hidden-file"),
        pytest.param("run.json", '{"kind": "something else", "format": 1, "recipe": {}}', id="another-tools-marker"),
        pytest.param("run.json", '{"kind": "ssm-zoo distillation run", "format": 9}', id="another-format"),
        pytest.param("run.json", "not JSON", id="not-a-marker"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"output folder: .*(holds no run.json|is not the marker)"):
        claim_output_folder(tmp_path, RECIPE)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [(name, content)]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="must be a new or empty folder, or this run's own, got a file"):
        claim_output_folder(tmp_path / "file", RECIPE)
    assert (tmp_path / "file").read_text() == "text"


def test_another_recipe_is_refused_by_its_differences(tmp_path: Path) -> None:
    claim_output_folder(tmp_path, RECIPE)
    before = (tmp_path / "run.json").read_bytes()
    changed = copy.deepcopy(RECIPE) | {"seed": 1, "dtype": "float32"}
    changed["stages"][0]["tokens"] = 16
    changed["student"]["layers"] = [0]
    with pytest.raises(ValueError) as caught:
        claim_output_folder(tmp_path, changed)
    text = str(caught.value)
    assert "seed: 0 there, 1 here" in text
    assert "stages.0.tokens: 8 there, 16 here" in text
    assert "student.layers: [0, 1] there, [0] here" in text
    assert "dtype: 'absent' there, 'float32' here" in text
    assert "teacher" not in text and "name" not in text
    assert (tmp_path / "run.json").read_bytes() == before


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"loss": [1.5, None]})
    assert json.loads(path.read_text()) == {"loss": [1.5, None]}
    with pytest.raises(ValueError, match=r"report\.json cannot be written as JSON: "):
        write_json(path, {"loss": object()})
    assert json.loads(path.read_text()) == {"loss": [1.5, None]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_check_refuses_what_a_claim_refuses_and_writes_nothing(tmp_path: Path) -> None:
    check_claim(tmp_path / "new", RECIPE)
    assert not (tmp_path / "new").exists()
    source = {"source": "t", "weights": "1"}
    claim_run(tmp_path / "run", RECIPE, {"teacher": source}, "a run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    check_run(tmp_path / "run", RECIPE, {"teacher": source}, "a run")
    for recipe, weights, message in (
        (RECIPE | {"seed": 1}, "1", r"holds a run of another recipe \(seed: 0 there, 1 here\)"),
        (RECIPE, "2", "teacher: weights of t changed since the run in .* was started"),
    ):
        for accept in (check_run, claim_run):
            with pytest.raises(ValueError, match=message):
                accept(tmp_path / "run", recipe, {"teacher": source | {"weights": weights}}, "a run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"is not empty and holds no run\.json"):
        check_claim(tmp_path / "other", RECIPE)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
