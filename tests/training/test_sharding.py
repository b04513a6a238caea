"""Weights sharded over two processes train as one process does, and either goes on where the other stopped."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_sharded
import yaml
from families import make_model
from safetensors.torch import load_file
from teachers import make_teacher, save_teacher, small_text
from tiny_checkpoints import save_tokenizer
from two_processes import launch

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
COMMANDS = ("distill", "train", "full", "lora")
RESULTS = {"distill": "student", "train": "model", "full": "model", "lora": "model"}
RECIPE: dict[str, Any] = {
    "teacher": "teacher",
    "student": {"layers": "odd", "half_life": [1, 8]},
    "data": {"train": "teacher.txt", "heldout": "teacher.txt", "sequence_length": 16},
    "stages": [
        {"name": "matrices", "objective": "matrix_orientation", "tokens": 128},
        {"name": "outputs", "objective": "hidden_state_alignment", "tokens": 128},
        {"name": "logits", "objective": "logit_distillation", "train": "all", "tokens": 256},
    ],
    "evaluation": {"tokens": 64, "prompts": [], "final": False},
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command has run in one process, in two that share the weights, and half in each."""
    folder = tmp_path_factory.mktemp("sharding")
    make_model("mamba2-full").save_pretrained(folder / "zoo")
    save_tokenizer(folder / "zoo")
    (folder / "text.txt").write_text("abc def ghi " * 40)
    save_teacher(folder / "teacher", make_teacher())
    (folder / "teacher.txt").write_text(small_text(60, seed=1))
    for stage in RECIPE["stages"]:
        stage.update(batch_size=4, learning_rate=1e-3)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            train_sharded.run_until(command, f"{command}-one", None, 4)
        train_sharded.run_until("distill", "distill-one-then-two", 3, 4)
        jobs = ["distill:distill-one-then-two:-", "distill:distill-two-then-one:3"]
        for command in COMMANDS:
            jobs += [f"{command}:{command}-two:-", f"{command}:{command}-stopped:3", f"{command}:{command}-stopped:-"]
        launch_sharded(folder, jobs)
        train_sharded.run_until("distill", "distill-two-then-one", None, 4)
    return folder


def launch_sharded(folder: Path, jobs: list[str]) -> None:
    """Run jobs in two processes on the CPU, with the launch file for eight GPUs."""
    printed = launch(Path(train_sharded.__file__), folder, *jobs, config=LAUNCH / "fsdp2_1x8.yaml")
    assert printed.count("the weights are sharded over 2 processes by FSDP2") >= 12


def curves(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [stage["history"] for stage in report["stages"]] if "stages" in report else [report["history"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "how"),
    [
        *((command, how) for command in COMMANDS for how in ("two", "stopped")),
        # The batch of other trainings is that of a process: in another number of them they are another run.
        ("distill", "one-then-two"),
        ("distill", "two-then-one"),
    ],
)
def test_shared_out_weights_train_as_whole_ones(command: str, how: str, place: Path) -> None:
    one, other = place / f"{command}-one", place / f"{command}-{how}"
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, other)]
    assert [report["processes"] for report in reports] == [1, 1 if how.endswith("one") else 2]
    for expected, curve in zip(curves(reports[0]), curves(reports[1]), strict=True):
        assert [point["step"] for point in curve] == [point["step"] for point in expected]
        for key in ("loss", "learning_rate"):
            assert [point[key] for point in curve] == pytest.approx([point[key] for point in expected], rel=1e-5), key
    for expected, row in zip(reports[0]["evaluations"], reports[1]["evaluations"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), row["name"]
    assert all(math.isfinite(row["loss"]) for row in reports[0]["evaluations"])
    weights, expected = (load_file(folder / RESULTS[command] / "model.safetensors") for folder in (other, one))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert {path.name for path in (other / RESULTS[command]).iterdir()} == {
        path.name for path in (one / RESULTS[command]).iterdir()
    }


@pytest.mark.slow
def test_a_checkpoint_of_shared_out_weights_is_whole(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(place / "train-two", folder)
    (newest,) = (path for path in (folder / "checkpoints").iterdir() if path.name == "checkpoint-4")
    assert (newest / "manifest.json").is_file() and (newest / "optimizer.pt").is_file()
    saved, result = load_file(newest / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in result.items())
