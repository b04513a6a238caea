"""Checkpoints: resuming is exact, damage is seen, and no kill leaves a run without one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from ssm_zoo.harness.checkpoint_manifest import MANIFEST
from ssm_zoo.training import checkpoints
from ssm_zoo.training.checkpoints import last_checkpoint, save_checkpoint
from ssm_zoo.training.trainer import ZooTrainer, loop_arguments, train_or_load

FILE = "weights.safetensors"
STEPS = 9


class Model(nn.Module):
    """Dropout, and a parameter that nothing depends on."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(inputs).square().mean()}


class Trainer(ZooTrainer):
    """Two groups with hyper-parameters of their own, and a rate that changes from step to step."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        inner: Any = self.model
        groups = [
            {"params": list(inner.layers[0].parameters()), "lr": 1e-2, "weight_decay": 0.1},
            {"params": [*inner.layers[2].parameters(), inner.idle], "lr": 3e-3, "betas": (0.8, 0.9)},
        ]
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: 0.9 + 0.01 * step)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def train(folder: Path, seed: int, stop_before: int | None = None) -> Trainer:
    """Train, or go on; a text for a step to stop before."""

    class Stopping(Trainer):
        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            if self.state.global_step == stop_before:
                raise KeyboardInterrupt
            return super().training_step(*arguments, **options)

    rows = [{"inputs": row} for row in torch.randn(40, 6, generator=torch.Generator().manual_seed(5))]
    trainer = Stopping(
        model=Model(seed),
        args=TrainingArguments(
            **loop_arguments(STEPS, folder, torch.device("cpu"), 1, []),
            per_device_train_batch_size=4,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
    )
    train_or_load(trainer, last_checkpoint(folder / "checkpoints", main=True), STEPS)
    return trainer


def test_one_process_uses_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Trainer's own choice of several, by DataParallel, would read a batch for each of them."""
    arguments = loop_arguments(STEPS, tmp_path, torch.device("cpu"), 1, [])
    args: Any = TrainingArguments(**arguments, per_device_train_batch_size=4, remove_unused_columns=False)
    assert args.device.type == "cpu"
    args._n_gpu = 2
    rows: Any = [{"inputs": row} for row in torch.randn(40, 6)]
    trainer = Trainer(model=Model(0), args=args, train_dataset=rows)
    assert trainer.args.n_gpu == 1 and next(iter(trainer.get_train_dataloader()))["inputs"].shape == (4, 6)
    assert "one of 2 GPUs is used. For all of them start the command by accelerate launch." in capsys.readouterr().out


def assert_bits_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a.detach().view(-1).view(torch.uint8), b.detach().view(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_bits_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_bits_equal(x, y)
    else:
        assert a == b and type(a) is type(b)


def optimizer_of(folder: Path) -> Any:
    return torch.load(folder / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt")


@pytest.mark.parametrize("stopped", [2, 5, 8])
def test_resuming_is_exact_to_the_bit(tmp_path: Path, stopped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(tmp_path / "straight", seed=0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", seed=0, stop_before=stopped)
    torch.manual_seed(99)
    after = train(tmp_path / "stopped", seed=99)  # other weights, other random numbers
    assert straight.model is not None and after.model is not None
    assert_bits_equal(dict(after.model.state_dict()), dict(straight.model.state_dict()))
    states = [optimizer_of(tmp_path / name) for name in ("straight", "stopped")]
    assert_bits_equal(*states)
    assert [group["weight_decay"] for group in states[1]["param_groups"]] == [0.1, 0.01]
    assert [group["betas"] for group in states[1]["param_groups"]] == [(0.9, 0.999), (0.8, 0.9)]
    losses = [
        [point["loss"] for point in trainer.state.log_history if "loss" in point] for trainer in (straight, after)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_run_that_is_at_its_end_is_loaded(tmp_path: Path) -> None:
    straight = train(tmp_path, seed=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = train(tmp_path, seed=1)
    assert straight.model is not None and again.model is not None
    assert_bits_equal(dict(again.model.state_dict()), dict(straight.model.state_dict()))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def save(folder: Path, *places: int, content: float = 0.0, **options: Any) -> Path:
    name = "-".join(map(str, ("checkpoint", *places)))
    return save_checkpoint(
        folder, name, lambda made: save_file({"w": torch.full((8,), content)}, made / FILE), **options
    )


def newest(folder: Path) -> Path | None:
    return last_checkpoint(folder, main=True)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path, keep: int) -> None:
    places = [(0, 8), (0, 9), (0, 10), (0, 100), (1, 2), (1, 11), (10, 0)]
    for count, place in enumerate(places, start=1):
        made = save(tmp_path, *place, keep=keep)
        kept = {f"checkpoint-{a}-{b}" for a, b in places[max(count - keep, 0) : count]}
        assert {entry.name for entry in tmp_path.iterdir()} == kept
        assert newest(tmp_path) == made


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / FILE).read_bytes())
    content[-5] ^= 1
    (path / FILE).write_bytes(content)


def cut_short(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-7])  # type: ignore[return-value]


def drop_checksums(path: Path) -> None:
    listed = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**listed, "files": {}}))


def another_format(path: Path) -> None:
    listed = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**listed, "format": 2}))


DAMAGES = [
    pytest.param(flip_a_bit, id="flipped-bit"),
    pytest.param(cut_short(FILE), id="short-tensors"),
    pytest.param(cut_short(MANIFEST), id="short-json"),
    pytest.param(lambda path: (path / FILE).unlink(), id="no-tensors"),
    pytest.param(lambda path: (path / MANIFEST).unlink(), id="no-json"),
    pytest.param(lambda path: (path / MANIFEST).write_text("[]"), id="other-json"),
    pytest.param(lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), id="not-text"),
    pytest.param(drop_checksums, id="no-checksums"),
    pytest.param(another_format, id="another-format"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = save(tmp_path, 1)
    damage(save(tmp_path, 2))
    assert newest(tmp_path) == first
    assert "checkpoint-2 is damaged" in capsys.readouterr().out
    # Going on from there writes over the damaged one, and what is kept is whole.
    again = save(tmp_path, 2, content=3.0)
    assert newest(tmp_path) == again and load_file(again / FILE)["w"].tolist() == [3.0] * 8
    assert capsys.readouterr().out == "resuming from checkpoint-2: step 2\n"
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    damage(first)
    damage(again)
    # A run that has lost what it had done does not start again unasked.
    with pytest.raises(ValueError, match=r"no checkpoint is whole \(checkpoint-2: .*; checkpoint-1: .*\)\. Restore"):
        newest(tmp_path)


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=3)
    flip_a_bit(save(tmp_path, 2, keep=3))
    save(tmp_path, 3, keep=2)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3"}


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") is None
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / ".tmp-saving" / "checkpoint-0-5").mkdir(parents=True)
    (tmp_path / ".tmp-saving" / "checkpoint-0-5" / FILE).write_bytes(b"half")
    assert newest(tmp_path) is None
    save(tmp_path, 0, 4)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-0-4", "checkpoint-final"}


def test_an_earlier_step_than_what_is_there_is_refused(tmp_path: Path) -> None:
    later = save(tmp_path, 1, 5)
    with pytest.raises(ValueError, match=r"Cannot save checkpoint-0-9: .*checkpoint-1-5 is newer"):
        save(tmp_path, 0, 9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1-5"]
    flip_a_bit(later)
    assert newest(tmp_path / "none") is None
    assert save(tmp_path, 0, 9) == newest(tmp_path)


@pytest.mark.parametrize("name", ["model", "checkpoint", "checkpoint-", "checkpoint-1.5", "checkpoint-1-x"])
def test_a_name_that_says_no_order_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`name` must be 'checkpoint-' and numbers .*, got '{name}'"):
        save_checkpoint(tmp_path / "run", name, lambda folder: None)
    with pytest.raises(ValueError, match="`keep` must be at least 1, got 0"):
        save(tmp_path / "run", 1, keep=0)
    assert not (tmp_path / "run").exists()


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    first = save(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / FILE).write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, "checkpoint-2", fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"] and newest(tmp_path) == first
    assert checkpoints.KEPT == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
def test_no_kill_leaves_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_savers.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    deaths = json.loads(finished.stdout)
    # A folder made, two files written, each flushed, one renamed; and later an old one renamed and removed.
    assert deaths["first"] > 6
    assert min(deaths["pruning"], deaths["replacing"]) > deaths["first"] + 3
    assert deaths["saved_between_random_deaths"] > 0
