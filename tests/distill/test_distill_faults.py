"""What a distillation does about a damaged checkpoint, a changed teacher and numbers that are not finite."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_llama

from ssm_zoo.distill import inputs, run
from ssm_zoo.distill.distiller import Distiller
from ssm_zoo.distill.precompute import precompute_logits
from ssm_zoo.distill.recipe import parse_recipe
from ssm_zoo.harness.checkpoint_manifest import MANIFEST, write_manifest
from ssm_zoo.modeling import ZooHybridForCausalLM

STEPS = 6
RECIPE: dict[str, Any] = {
    "teacher": "teacher",
    "student": {"layers": "odd", "half_life": [1, 8]},
    "data": {"train": "text.txt", "heldout": "text.txt", "sequence_length": 16},
    "stages": [
        {
            "name": "align",
            "objective": "hidden_state_alignment",
            "tokens": 32 * STEPS,
            "batch_size": 2,
            "learning_rate": 1e-3,
        }
    ],
    "evaluation": {"tokens": 64, "prompts": [], "final": False},
    "checkpoint_every": 2,
}


def start() -> None:
    run.distill(parse_recipe(RECIPE), "run")


def before_step(step: int, patch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """Do something to the student before one step of the stage, counted from 1."""
    inner = Distiller.training_step

    def changed(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            change(self.student)
        return inner(self, *arguments, **options)

    patch.setattr(Distiller, "training_step", changed)


def interrupt(_student: Any) -> None:
    raise KeyboardInterrupt


def spoil(student: Any) -> None:
    student.backbone.layers[1].mixer.out_proj.weight.data.fill_(float("nan"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a distillation reads, its result in "whole", and one killed in its last step in "run"."""
    folder = tmp_path_factory.mktemp("distill")
    save_llama(folder / "teacher")
    (folder / "text.txt").write_text("abcdefgh bcdefgha cdefghab " * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start()
        (folder / "run").rename(folder / "whole")
        before_step(STEPS, patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            start()
    return folder


@pytest.fixture
def work(killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(killed, tmp_path / "work"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def nothing_is_made() -> bool:
    return not any(Path("run", name).exists() for name in ("student", "report.json", "report.md"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ["*.safetensors", "optimizer.pt", "progress.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("work")
def test_a_damaged_checkpoint_is_passed_over_to_the_same_student(
    damage: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = Path("run", "checkpoints", "checkpoint-0-4")
    for path in newest.glob(name):
        DAMAGES[damage](path)
    start()
    assert "checkpoint-0-4 is damaged" in capsys.readouterr().out
    ours, theirs = (load_file(Path(run, "student", "model.safetensors")) for run in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()


@pytest.mark.usefixtures("work")
def test_the_report_is_written_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that a run has finished. One that lacks results writes them without training."""

    def save(_student: Any, folder: str) -> None:
        assert Path(folder).is_dir()
        raise KeyboardInterrupt

    def step(*_: Any) -> None:
        raise AssertionError("trained again")

    shutil.rmtree("run")
    shutil.copytree("whole", "run")
    for folder in ("student", "plots"):
        shutil.rmtree(Path("run", folder))
    for name in ("report.json", "report.md"):
        Path("run", name).unlink()
    monkeypatch.setattr(Distiller, "training_step", step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ZooHybridForCausalLM, "save_pretrained", save)
        start()
    assert nothing_is_made() and Path("run", "plots", "heldout.png").is_file()
    start()
    ours, theirs = (load_file(Path(run, "student", "model.safetensors")) for run in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()
    one, other = (json.loads(Path(run, "report.json").read_text())["evaluations"] for run in ("run", "whole"))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]


@pytest.mark.usefixtures("work")
def test_a_checkpoint_with_measurements_of_another_version_is_refused() -> None:
    newest = Path("run", "checkpoints", "checkpoint-0-4")
    progress = json.loads((newest / "progress.json").read_text())
    progress["measured"]["later"] = 1
    (newest / "progress.json").write_text(json.dumps(progress))
    (newest / MANIFEST).unlink()
    write_manifest(newest)
    with pytest.raises(ValueError, match=r"checkpoint-0-4 was written by another version of ssm-zoo \(.*'later'\)"):
        start()
    assert nothing_is_made()


@pytest.mark.usefixtures("work")
def test_a_teacher_whose_weights_have_changed_is_not_gone_on_with() -> None:
    path = Path("teacher", "model.safetensors")
    save_file({key: tensor + 1e-3 for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"teacher: weights of teacher changed since the run in run was started"):
        start()
    assert nothing_is_made()


@pytest.mark.usefixtures("work")
def test_a_run_that_does_not_say_what_it_began_with_is_refused() -> None:
    """Folders of releases that did not note it."""
    path = Path("run", "run.json")
    marker = json.loads(path.read_text())
    del marker["recipe"]["sources"]
    path.write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=r"run holds a run of an earlier version.*Finish it with that version"):
        start()
    assert nothing_is_made() and json.loads(path.read_text()) == marker


# What versions before bounded attention did not record.
NEWER = {
    "student": ("window", "sinks", "rows", "slots", "chunk_size", "exact_heads", "kv_dtype"),
    "evaluation": ("repeat_distance",),
}


@pytest.mark.parametrize("left", ["nothing", "a checkpoint"])
@pytest.mark.usefixtures("work")
def test_a_run_whose_recipe_lacks_newer_keys_goes_on(left: str) -> None:
    path = Path("run", "run.json")
    marker = json.loads(path.read_text())
    for part, keys in NEWER.items():
        for key in keys:
            del marker["recipe"][part][key]
    if left == "nothing":
        shutil.rmtree(Path("run", "checkpoints"))
    for wrong in ({"seed": 1}, {"no_such_key": 1}):
        path.write_text(json.dumps(marker | {"recipe": marker["recipe"] | wrong}))
        with pytest.raises(ValueError, match=rf"holds a run of another recipe .*{next(iter(wrong))}"):
            start()
    path.write_text(json.dumps(marker))
    start()
    assert json.loads(path.read_text()) == marker
    ours, theirs = (load_file(Path(run, "student", "model.safetensors")) for run in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("step", [3, STEPS])
@pytest.mark.usefixtures("work")
def test_a_loss_that_is_not_finite_stops_the_run_in_its_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("run")
    before_step(step, monkeypatch, spoil)
    with pytest.raises(ValueError, match=rf"stages\.align: the loss is nan at step {step}. Lower learning_rate"):
        start()
    assert nothing_is_made()


STAGES: dict[str, dict[str, Any]] = {
    "own blocks": {"objective": "hidden_state_alignment", "stream": "student", "target": "block_output"},
    "last state": {"objective": "last_state_alignment", "train": "mixers+norms"},
    "jsd": {"objective": "logit_distillation", "train": "all", "kl": "jsd"},
    "stored": {"objective": "logit_distillation"},
}


@pytest.mark.parametrize(
    ("name", "whose"),
    [(name, whose) for name in STAGES for whose in ("student", "teacher") if (name, whose) != ("stored", "teacher")],
)
@pytest.mark.usefixtures("work")
def test_outputs_that_are_not_finite_in_the_last_step_leave_no_student(
    name: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the teacher or of the student; nothing is computed after that step that would tell."""
    shutil.rmtree("run")
    values = {**RECIPE, "stages": [{**RECIPE["stages"][0], **STAGES[name]}]}
    if name == "stored":
        precompute_logits(parse_recipe(values), "logits", top_k=4)
        values["stored_logits"] = "logits"
    teachers: list[Any] = []
    load = inputs.load_teacher
    monkeypatch.setattr(inputs, "load_teacher", lambda *a, **o: teachers.append(load(*a, **o)) or teachers[0])

    def spoil_output(student: Any) -> None:
        if whose == "student":
            spoil(student)
        else:
            teachers[0].model.model.layers[1].self_attn.o_proj.weight.data.fill_(float("nan"))

    before_step(STEPS, monkeypatch, spoil_output)
    with pytest.raises(ValueError, match=rf"^stages\.align: the loss is nan at step {STEPS}\. "):
        run.distill(parse_recipe(values), "run")
    assert nothing_is_made()


@pytest.mark.usefixtures("work")
def test_a_last_step_that_makes_weights_not_finite_leaves_no_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed with these weights any more: no loss tells."""
    shutil.rmtree("run")
    inner = torch.optim.AdamW.step
    steps: list[None] = []

    def overflowing(self: Any, *arguments: Any, **options: Any) -> Any:
        result = inner(self, *arguments, **options)
        steps.append(None)
        if len(steps) == STEPS:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(ValueError, match=r"stages\.align: the trained model: .* of the weights are not finite"):
        start()
    assert nothing_is_made()


@pytest.mark.usefixtures("work")
def test_a_calibration_that_makes_weights_not_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("run")

    def overflowing(student: Any, *_arguments: Any, **_options: Any) -> None:
        student.backbone.layers[1].mixer.out_proj.weight.data.fill_(float("inf"))

    monkeypatch.setattr(run, "calibrate", overflowing)
    with pytest.raises(ValueError, match=r"the calibrated student: .* of the weights are not finite"):
        start()
    assert nothing_is_made()
