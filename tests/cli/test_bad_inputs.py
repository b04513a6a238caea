"""Bad inputs of every command: a non-zero exit, one line that names the file or field, nothing written."""

import os
import re
import shlex
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from bad_inputs import WHOLE, Case, cases, save_inputs

from ssm_zoo.cli import demo
from ssm_zoo.cli.main import app

CASES = list(cases())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "inputs"
    folder.mkdir()
    save_inputs(folder)
    return folder


def contents(folder: Path) -> dict[str, object]:
    """What stands in a folder: links, folders, and files with their content."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else path.is_dir()
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(autouse=True)
def work(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own copy of the inputs, in which the command runs; no token, and a Hub that refuses every connection."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = shutil.copytree(inputs, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def test_there_are_three_hundred_bad_inputs_of_all_commands() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)
    commands = {case.line.split()[0] for case in CASES}
    assert commands >= {"distill", "train", "finetune", "evaluate", "export", "convert", "generate", "card", "push"}
    assert "demo" in commands


@pytest.mark.parametrize("line", WHOLE)
def test_the_commands_succeed_before_anything_is_spoiled(line: str) -> None:
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_ends_in_one_line_that_names_it_and_nothing_is_written(case: Case, work: Path) -> None:
    case.spoil(work)
    before = contents(work)
    started = time.monotonic()
    words = shlex.split(case.line)
    result = CliRunner().invoke(*((demo.app, words[1:]) if words[0] == "demo" else (app, words)))
    # What is said on the way is no message: the bars of progress.
    told = [line for line in result.stderr.splitlines() if line.strip() and not re.search(r"\d+%\||\d+it ", line)]
    assert result.exit_code == 2, f"{result.exit_code}: {result.stderr}\n{result.stdout}\n{result.exception!r}"
    assert len(told) == 1 and re.fullmatch(r"ssm-zoo: \S.*", told[0]), result.stderr
    assert re.search(case.says, told[0]), told[0]
    assert len(told[0]) < 1500
    assert contents(work) == before
    assert time.monotonic() - started < 30


def test_the_demonstration_ends_with_the_one_line_and_the_status_of_the_command_that_fails(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in = Path(__file__).with_name("hub_stand_in.py")
    words = ["--output", "out", "--hub-stand-in", str(stand_in), "--teacher", "nope.gguf"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        result = CliRunner().invoke(demo.app, words)
    assert result.exit_code == 2, f"{result.stderr}\n{result.exception!r}"
    assert re.fullmatch(r"ssm-zoo: .*nope\.gguf.*\n", capfd.readouterr().err)
    assert result.stderr == "" and not (work / "out").exists()
