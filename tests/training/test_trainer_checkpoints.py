"""What every Trainer does about damaged checkpoints, changed sources and numbers that are not finite."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_pairs import write_pairs
from families import make_model
from safetensors.torch import load_file, save_file
from sweeps import SWEEP
from tiny_checkpoints import save_tokenizer
from tiny_trainings import HOW, TRAININGS, Training, flip, stop_in, weights
from transformers import PreTrainedModel

from ssm_zoo.harness.checkpoint_manifest import MANIFEST, write_manifest
from ssm_zoo.training.checkpoints import last_checkpoint


# The training to translate resumes in test_translation.py; its saver is that of the others.
@pytest.fixture(scope="module", params=[name for name in TRAININGS if name != "translate"])
def killed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Training]:
    """A folder with all that a training reads, with its result in "whole", and killed in its last step in "run"."""
    if request.param == "embed":
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder, training = tmp_path_factory.mktemp(request.param), TRAININGS[request.param]
    make_model("mamba2-full").save_pretrained(folder / "zoo")
    save_tokenizer(folder / "zoo")
    (folder / "text.txt").write_text("abc def ghi " * 20)
    write_pairs(folder / "pairs.jsonl", 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        training.start()
        (folder / "run").rename("whole")
        stop_in(6, patch)
        with pytest.raises(KeyboardInterrupt):
            training.start()
    return folder, training


@pytest.fixture
def work(killed: tuple[Path, Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """The training, in an own copy of its folder."""
    monkeypatch.chdir(shutil.copytree(killed[0], tmp_path / "work"))
    return killed[1]


DAMAGES: dict[str, Callable[[Path, str], Any]] = {
    "flipped-weights": lambda path, saved: flip(path / saved),
    "empty-weights": lambda path, saved: (path / saved).write_bytes(b""),
    "no-optimizer": lambda path, _: (path / "optimizer.pt").unlink(),
    "empty-optimizer": lambda path, _: (path / "optimizer.pt").write_bytes(b""),
    "no-manifest": lambda path, _: (path / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_to_the_same_weights(
    work: Training, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    checkpoints = Path("run", "checkpoints")
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    DAMAGES[damage](checkpoints / "checkpoint-4", work.saved)
    work.start()
    said = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in said and "resuming from checkpoint-2: step 2" in said
    ours, theirs = weights("run", work), weights("whole", work)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_damaged_second_shard_is_passed_over_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training, save = TRAININGS["train"], PreTrainedModel.save_pretrained
    monkeypatch.chdir(tmp_path)
    make_model("mamba2-full").save_pretrained("zoo")
    save_tokenizer(Path("zoo"))
    Path("text.txt").write_text("abc def ghi " * 20)
    training.start()
    Path("run").rename("whole")
    shards = {"max_shard_size": "8KB"}
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda self, *a, **options: save(self, *a, **options | shards)
    )
    with monkeypatch.context() as patch:
        stop_in(6, patch)
        with pytest.raises(KeyboardInterrupt):
            training.start()
    second = sorted(Path("run", "checkpoints", "checkpoint-4").glob("model-*.safetensors"))[1]
    flip(second)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    training.start()
    said = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in said and "resuming from checkpoint-2: step 2" in said
    ours, theirs = weights("run", training), weights("whole", training)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_without_a_whole_checkpoint_does_not_begin_again(work: Training) -> None:
    for path in Path("run", "checkpoints").iterdir():
        flip(path / work.saved)
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        work.start()
    assert not Path("run", work.result).exists()


@pytest.mark.parametrize("main", [True, False])
def test_what_a_killed_save_left_goes_at_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: bool
) -> None:
    """Killed before the older checkpoints were removed, and while the next one was written; the newest is damaged."""
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "file").write_text(str(step))
        write_manifest(folder)
    flip(tmp_path / "checkpoint-8" / "file")
    (tmp_path / ".tmp-saving" / "checkpoint-10").mkdir(parents=True)
    before = {path.name for path in tmp_path.iterdir()}
    assert last_checkpoint(tmp_path, main=main) == tmp_path / "checkpoint-6"
    after = {path.name for path in tmp_path.iterdir()}
    assert after == ({f"checkpoint-{step}" for step in (4, 6, 8)} if main else before)
    said = capsys.readouterr().out
    assert ("checkpoint-8 is damaged" in said and "resuming from checkpoint-6: step 6" in said) == main


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes as POSIX has them")
@pytest.mark.parametrize(
    "killed", ["lm", *(pytest.param(name, marks=SWEEP) for name in ("train", "embed", "translate"))], indirect=True
)
@pytest.mark.usefixtures("work")
def test_a_saver_killed_at_any_moment_costs_no_bit(request: pytest.FixtureRequest) -> None:
    """Of one training, the saver being the same for all; a sweep does the others."""
    name = request.node.callspec.params["killed"]
    script = Path(__file__).with_name("kill_trainings.py")
    folders = (str(Path(__file__).parents[1] / name) for name in ("support", "modeling", "distill"))
    path = {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), ".", name]
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    deaths = json.loads(done.stdout.splitlines()[-1])
    # Before the rename that makes the checkpoint, and after it, while an older one is removed.
    assert {tuple(death) for death in deaths} == {(4, 4), (4, 6)} and len(deaths) >= 4


def test_the_report_is_written_last(work: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that a run has finished."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ssm_zoo.training.report.shutil.copytree", stop)  # into the folder with the weights
        work.start()
    assert not Path("run", "report.json").exists() and not Path("run", work.result).exists()
    work.start()
    assert Path("run", "report.json").is_file()
    ours, theirs = weights("run", work), weights("whole", work)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_that_have_changed_are_not_gone_on_with(work: Training) -> None:
    path = Path("zoo", "model.safetensors")
    tensors = load_file(path)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    if work.tokenizer == "tokenizer":  # only sizes and tokenizer are taken
        work.start()
        return
    with pytest.raises(ValueError, match=r"model: weights of zoo changed since the run in run was started"):
        work.start()
    assert not Path("run", work.result).exists()


def test_a_tokenizer_that_has_changed_is_not_gone_on_with(work: Training) -> None:
    path = Path("zoo", "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match=rf"{work.tokenizer}: tokenizer of zoo changed since the run in run was"):
        work.start()
    assert not Path("run", work.result).exists()


def test_a_run_that_does_not_say_what_it_began_with_is_refused(work: Training) -> None:
    """Folders of releases that did not note it."""
    path = Path("run", "run.json")
    marker = json.loads(path.read_text())
    del marker["recipe"]["sources"]
    path.write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=r"run holds a run of an earlier version.*Finish it with that version"):
        work.start()
    assert json.loads(path.read_text()) == marker and not Path("run", work.result).exists()


def spoil_gradient(model: Any) -> None:
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))


@pytest.mark.parametrize("step", [3, 6])
def test_a_gradient_that_is_not_finite_stops_the_run_before_its_step(
    work: Training, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also in the last step, after which no loss would tell."""
    shutil.rmtree("run")
    stop_in(step, monkeypatch, spoil_gradient)
    with pytest.raises(ValueError, match=rf"the gradient norm is (inf|nan) at step {step}. Lower learning_rate"):
        work.start()
    assert not Path("run", "report.json").exists() and not Path("run", work.result).exists()


def test_a_last_step_that_makes_weights_not_finite_leaves_no_result(
    work: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed with these weights any more: neither a loss nor a gradient tells."""
    shutil.rmtree("run")
    inner = torch.optim.AdamW.step
    steps: list[None] = []

    def overflowing(self: Any, *arguments: Any, **options: Any) -> Any:
        result = inner(self, *arguments, **options)
        steps.append(None)
        if len(steps) == HOW["steps"]:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(ValueError, match="not finite"):
        work.start()
    assert len(steps) == HOW["steps"]
    assert not Path("run", "report.json").exists() and not Path("run", work.result).exists()
