"""A Trainer's checkpoints that are damaged, a base that has changed, and steps whose numbers are not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_tokenizer

from ssm_zoo.conversion.checkpoint_manifest import MANIFEST
from ssm_zoo.finetune.language_model import finetune_language_model
from ssm_zoo.finetune.settings import parse_settings
from ssm_zoo.finetune.training import ZooTrainer


def settings(folder: Path, **changes: Any) -> Any:
    values = {"train": [str(folder / "text.txt")], "heldout": [str(folder / "text.txt")], "row_tokens": 32}
    values |= {"model": str(folder / "zoo"), "steps": 6, "checkpoint_every": 2, "batch_size": 1, "rank": 2}
    return parse_settings({**values, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model("mamba2-full").save_pretrained(tmp_path / "zoo")
    save_tokenizer(tmp_path / "zoo")
    (tmp_path / "text.txt").write_text("abc def ghi " * 20)
    return tmp_path


def kill(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int = 6) -> None:
    """Interrupt a run in a step."""
    inner = ZooTrainer.training_step

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return inner(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ZooTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            finetune_language_model(settings(folder), folder / "run")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped-weights": lambda path: flip(path / "adapter_model.safetensors"),
    "no-optimizer": lambda path: (path / "optimizer.pt").unlink(),
    "empty-optimizer": lambda path: (path / "optimizer.pt").write_bytes(b""),
    "no-manifest": lambda path: (path / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_to_the_same_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    finetune_language_model(settings(folder), folder / "whole")
    kill(folder, monkeypatch)
    checkpoints = folder / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    DAMAGES[damage](checkpoints / "checkpoint-4")
    finetune_language_model(settings(folder), folder / "run")
    assert "checkpoint-4 is damaged" in capsys.readouterr().out
    ours, theirs = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for path in checkpoints.iterdir():
        DAMAGES[damage](path)
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        finetune_language_model(settings(folder), folder / "run")


def test_a_base_that_has_changed_is_not_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(folder, monkeypatch)
    path = folder / "zoo" / "model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model: weights of .*zoo changed since the run in .*run was started"):
        finetune_language_model(settings(folder), folder / "run")


@pytest.mark.parametrize("step", [3, 6])
def test_a_gradient_that_is_not_finite_stops_the_run_before_its_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also in the last step, after which no loss would tell."""
    inner = ZooTrainer.training_step

    def spoiling(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        loss = inner(self, model, *arguments, **options)
        if self.state.global_step + 1 == step:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(ZooTrainer, "training_step", spoiling)
    with pytest.raises(ValueError, match=rf"the gradient norm is (inf|nan) at step {step}; lower learning_rate"):
        finetune_language_model(settings(folder), folder / "run")
    assert not (folder / "run" / "report.json").exists() and not (folder / "run" / "adapter").exists()
