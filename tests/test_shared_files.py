"""What a command makes for others names no folder of the machine: every path given absolutely, with a space in it."""

import os
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from bad_inputs import CONVERT, DISTILL, EMBED, EXPORT, INVERSION, LM, RETRIEVAL, TRAIN, save_inputs

from ssm_zoo.cli.main import app

PERSON = "Jane Doe"
# What stays with a run: by it the run goes on, hence it holds the paths as they were given.
OWN = {"run.json", "recipe.yaml", "before.json", "coverage.json", "checkpoints"}
LINES = {
    "distill": DISTILL,
    "train": TRAIN,
    "train-sizes": TRAIN.replace("model.yaml", "zoo"),
    "lm": LM,
    "lm-merged": f"{LM} --merge",
    "lm-full": LM.replace("--rank 2", "--method full"),
    "embed": EMBED,
    "export": EXPORT,
    "convert": CONVERT,
    "export-of-a-merged-model": EXPORT.replace("zoo", "merged"),
    "retrieval": RETRIEVAL,
    "inversion": INVERSION,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / PERSON / "my models"
    folder.mkdir(parents=True)
    save_inputs(folder)
    names = "teacher: llama", "train: text.txt", "heldout: text.txt"
    recipe = folder / "recipe.yaml"
    for line in names:
        key, name = line.split(": ")
        recipe.write_text(recipe.read_text().replace(line, f"{key}: '{folder / name}'"))
    return folder


def absolute(word: str, place: Path) -> str:
    return str(place / word) if (place / word).exists() or word in ("out", "r.json") else word


@pytest.mark.parametrize("name", LINES)
def test_nothing_that_is_shared_names_a_folder_of_the_machine(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "export-of-a-merged-model" and not (place / "merged").exists():
        os.rename(run("lm-merged", place, monkeypatch), place / "merged")
    made = run(name, place, monkeypatch)
    files = [made] if made.is_file() else [path for path in made.rglob("*") if path.is_file()]
    shared = [path for path in files if not OWN & set(path.relative_to(made).parts)]
    assert shared
    naming = [str(path.relative_to(place)) for path in shared if names_person(path)]
    assert not naming
    if (made / "run.json").exists():
        assert names_person(made / "run.json")  # the search finds what is there
    made.rename(tmp_path / "made")


def run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a command line as it would be typed, and return what it has made."""
    line = [absolute(word, place) for word in shlex.split(LINES[name])]
    monkeypatch.setattr(sys, "argv", ["ssm-zoo", *line])
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return Path(next(word for word in line if Path(word).name in ("out", "r.json") and Path(word).is_absolute()))


def names_person(path: Path) -> bool:
    content = path.read_bytes()
    return any(form in content for form in (b"Jane", b"my models", b"my%20models"))
