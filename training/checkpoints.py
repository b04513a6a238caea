"""Checkpoints of every training: complete or absent, and independent of how many processes share the weights.

transformers' Trainer writes a checkpoint's files one by one under its final name. Here they are written under a
temporary name, listed with their SHA-256, flushed to the disk and renamed, so a folder with a checkpoint's name was
complete once. A run checks the hashes before it resumes from a checkpoint, and removes an old checkpoint only after
newer ones have been verified.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer

from ..harness.checkpoint_manifest import damage, newest_whole, write_manifest
from ..harness.whole_files import TEMPORARY, flush
from .sharding import Sharding, clip_gradients

KEPT = 2
"""Number of verified checkpoints that are kept."""

_SAVING = f"{TEMPORARY}saving"
_REMOVED = f"{TEMPORARY}removed"
# Numbers, the most significant first; the last one is the number of optimiser steps. ".replaced" marks the older of two
# checkpoints of the same step until the newer one has taken its name.
_NAME = re.compile(r"checkpoint-(\d+(?:-\d+)*)(\.replaced)?")

# CheckedTrainer is a mixin: at run time the class that it is mixed into is the Trainer.
_Base = Trainer if TYPE_CHECKING else object


class CheckedTrainer(_Base):
    """Mixin for a Trainer: stops at numbers that are not finite, saves verified checkpoints, and shards the model.

    A checkpoint holds the whole weights and the whole optimiser state for any number of processes, with FSDP or
    without, so a run can resume with another number. (DeepSpeed saves its optimiser state in one part per process.)
    """

    stage_name = ""
    """Prefix of the error about a number that is not finite."""

    _loss_of_step: Tensor | None = None
    _saving = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        config = getattr(options["model"] if "model" in options else arguments[0], "config", None)
        self._use_cache = getattr(config, "use_cache", None)
        given: Any = options.get("args")
        if given is not None and given.n_gpu > 1:
            tqdm.write(f"one of {given.n_gpu} GPUs is used. For all of them start the command by accelerate launch.")
            # Otherwise the Trainer copies the model to all of them in one process, and reads a batch for each.
            given._n_gpu = 1
        super().__init__(*arguments, **options)
        self.keep_use_cache(self.model)
        self.sharding = Sharding(self)

    def keep_use_cache(self, model: Any) -> None:
        """Set `use_cache` of a model to what it was: the Trainer turns it off, and it would be saved that way."""
        if self._use_cache is not None:
            model.config.use_cache = self._use_cache

    def checkpoint_name(self) -> str:
        """Return the name of a checkpoint that is saved at this step."""
        return f"checkpoint-{self.state.global_step}"

    def whole_model(self) -> Any:
        """Return the trained model with all weights in this process; for a sharded model, a copy."""
        return self.sharding.whole_model()

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        self._loss_of_step = loss if self._loss_of_step is None else self._loss_of_step + loss
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.sharding.fsdp:
            return clip_gradients(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check loss and gradient norm. The Trainer calls this before the optimiser's step, so the weights are safe."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._loss_of_step = self._loss_of_step, None
        measured = {"loss": loss, "gradient norm": norm}
        for name, value in measured.items():
            if value is not None and not math.isfinite(float(value)):
                step = self.state.global_step + 1
                raise ValueError(f"{self.stage_name}the {name} is {float(value)} at step {step}. Lower learning_rate.")
        return norm

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        Sharding.choose(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; the weights of a sharded model are gathered first."""
        if not self.sharding.active:
            super().save_model(output_dir, _internal_call)
            return
        state = self.sharding.whole_state()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is not None:
            return  # it is already sharded, and `train_or_load` loaded the weights before that
        sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, False  # the saved weights are not sharded
        try:
            super()._load_from_checkpoint(resume_from_checkpoint)
        finally:
            self.is_fsdp_enabled = sharded

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharding.fsdp:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.sharding.whole_optimizer()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharding.fsdp or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.sharding.load_optimizer(torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu"))
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt"))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _SAVING) if self._saving else folder

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        folder = Path(self._get_output_dir(None))
        if self.args.should_save:
            _start(folder, self.checkpoint_name())
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(*arguments, **options)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()  # every process has written its random states
        if self.args.should_save:
            (made,) = (folder / _SAVING).iterdir()
            _finish(made, folder / self.checkpoint_name(), KEPT)
        self.accelerator.wait_for_everyone()


def save_checkpoint(folder: Path, name: str, write: Callable[[Path], object], *, keep: int = KEPT) -> Path:
    """Write a checkpoint, then remove all checkpoints but the newest verified ones.

    Only one process at a time may save into a folder.

    Args:
        folder: folder of the checkpoints; created if missing.
        name: "checkpoint-" and numbers separated by hyphens; greater numbers are newer.
        write: writes the files into the empty folder that it is given.
        keep: number of checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: if the folder already holds a newer complete checkpoint, from which the run should have resumed.
            Nothing is written in that case.
    """
    if keep < 1:
        raise ValueError(f"`keep` must be at least 1, got {keep}.")
    _start(folder, name)
    made = folder / _SAVING / name
    made.mkdir(parents=True)
    try:
        write(made)
        return _finish(made, folder / name, keep)
    finally:
        shutil.rmtree(folder / _SAVING, ignore_errors=True)


def _start(folder: Path, name: str) -> None:
    """Check that a checkpoint may be saved, and remove the leftovers of killed saves."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"`name` must be 'checkpoint-' and numbers separated by hyphens, got {name!r}.")
    for path in _checkpoints(folder):
        if place(path) > place(folder / name) and damage(path) is None:
            raise ValueError(f"Cannot save {name}: {path} is newer. Resume from it instead.")
    _sweep(folder)


def _finish(made: Path, target: Path, keep: int) -> Path:
    """Rename a finished folder to the checkpoint's name, and remove old checkpoints."""
    for path in (*made.rglob("*"), made):
        flush(path)
    write_manifest(made)
    if target.exists():
        # A folder cannot replace another atomically. In between, the old one is found under its second name.
        replaced = target.with_name(f"{target.name}.replaced")
        if replaced.exists():
            _remove(replaced)
        os.replace(target, replaced)
    os.replace(made, target)
    flush(target.parent)
    made.parent.rmdir()
    _prune(_checkpoints(target.parent), keep, target)
    return target


def last_checkpoint(folder: Path, *, main: bool) -> Path | None:
    """Return the newest complete checkpoint for a run to resume from, and remove the leftovers of killed saves.

    Args:
        folder: folder of the checkpoints; may be missing.
        main: whether this process removes files and prints the name of the checkpoint and of every damaged one that is
            skipped.

    Returns:
        The checkpoint's folder, or None if there are no checkpoints.

    Raises:
        ValueError: if there are checkpoints and all are damaged.
    """
    if main:
        _sweep(folder)
    report = tqdm.write if main else lambda _text: None
    found = newest_whole(_checkpoints(folder), lambda path: damage(path) or path, report)
    if found is not None:
        report(f"resuming from {found.name}: step {steps_done(found)}")
        not_newer = [path for path in _checkpoints(folder) if place(path) <= place(found)]
        if main and len(not_newer) > KEPT:
            _prune(not_newer, KEPT, found)  # the last save may have been killed before this
    return found


def place(checkpoint: Path) -> tuple[int, ...]:
    """Return the numbers in a checkpoint's name, which order checkpoints by age."""
    match = _NAME.fullmatch(checkpoint.name)
    return tuple(map(int, match[1].split("-"))) if match else ()


def steps_done(checkpoint: Path) -> int:
    """Return the number of optimiser steps in a checkpoint's name."""
    return place(checkpoint)[-1]


def check_numbers(value: Any, name: str) -> None:
    """Check that every number in a run's measurements is finite.

    Raises:
        ValueError: naming the key of the first number that is not.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            check_numbers(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            check_numbers(part, f"{name}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: the model computes numbers that are not finite. Lower learning_rate.")


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first; a replaced one follows the one that replaced it."""
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=lambda path: (place(path), not path.name.endswith(".replaced")), reverse=True)


def _sweep(folder: Path) -> None:
    """Remove the leftovers of killed saves."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _prune(checkpoints: list[Path], keep: int, verified: Path) -> None:
    """Remove all checkpoints (newest first) but the complete ones of the newest `keep` steps."""
    kept: set[tuple[int, ...]] = set()
    for path in checkpoints:
        whole = len(kept) < keep and (path == verified or damage(path) is None)
        if whole and place(path) not in kept:
            kept.add(place(path))
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; a partly deleted folder never has a checkpoint's name."""
    doomed = path.with_name(_REMOVED)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
