"""Checkpoints of every training: whole or not there, and independent of how many processes share the weights.

transformers' Trainer writes a checkpoint's files one by one under its name. Here they are written under a temporary
name, listed with their SHA-256, forced to the disk and renamed: a folder with a checkpoint's name was whole once.
Whether it still is, is checked before a run goes on from it. An old one is removed only after newer ones have been
proven whole.
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
"""Checkpoints that stay, proven whole."""

_SAVING = f"{TEMPORARY}saving"
_REMOVED = f"{TEMPORARY}removed"
# Numbers in the order in which they count, the last one the optimiser steps done. ".replaced": the older of two
# checkpoints of one step, until the newer one has taken its name.
_NAME = re.compile(r"checkpoint-(\d+(?:-\d+)*)(\.replaced)?")

# A mixin: at run time the class that it is mixed into is the Trainer.
_Base = Trainer if TYPE_CHECKING else object


class CheckedTrainer(_Base):
    """Makes a Trainer stop at numbers that are not finite, save checkpoints as said above, and shard its model.

    A checkpoint holds whole weights and a whole optimiser, whatever the number of processes and whether FSDP shards
    them: any other number can go on from it. (DeepSpeed saves its optimiser in parts, for as many processes.)
    """

    stage_name = ""
    """Put before the message about a number that is not finite."""

    _loss_of_step: Tensor | None = None
    _saving = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sharding = Sharding(self)

    def checkpoint_name(self) -> str:
        """The name of a checkpoint that is saved now."""
        return f"checkpoint-{self.state.global_step}"

    def whole_model(self) -> Any:
        """The trained model with all of its weights in this process; of a sharded model a copy."""
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
        """As the Trainer's, which calls it before the optimiser's step: bad gradients never reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._loss_of_step = self._loss_of_step, None
        measured = {"loss": loss, "gradient norm": norm}
        for name, value in measured.items():
            if value is not None and not math.isfinite(float(value)):
                step = self.state.global_step + 1
                raise ValueError(f"{self.stage_name}the {name} is {float(value)} at step {step}; lower learning_rate")
        return norm

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        Sharding.choose(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; of a sharded model all weights, gathered."""
        if not self.sharding.active:
            super().save_model(output_dir, _internal_call)
            return
        state = self.sharding.whole_state()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is not None:
            return  # it is sharded by now, and was loaded before (see `train_or_load`)
        sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, False  # the weights there are whole
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
    """Write a checkpoint, then remove all but the newest that are proven whole.

    One process at a time may save into a folder.

    Args:
        folder: where checkpoints go; made if missing.
        name: "checkpoint-" and numbers with hyphens between them, which say what is newer.
        write: is given an empty folder to write the files into.
        keep: checkpoints that stay, 1 or more.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: if the folder holds a whole checkpoint that is newer, which the run should have gone on from;
            nothing is written then.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}; accepted: 1 or more")
    _start(folder, name)
    made = folder / _SAVING / name
    made.mkdir(parents=True)
    try:
        write(made)
        return _finish(made, folder / name, keep)
    finally:
        shutil.rmtree(folder / _SAVING, ignore_errors=True)


def _start(folder: Path, name: str) -> None:
    """Check that a checkpoint may be saved, and make room for it."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"name: got {name!r}; accepted: 'checkpoint-' and numbers with hyphens between them")
    for path in _checkpoints(folder):
        if place(path) > place(folder / name) and damage(path) is None:
            raise ValueError(f"step: {name} is to be saved, but {path} is newer; go on from it instead")
    _sweep(folder)


def _finish(made: Path, target: Path, keep: int) -> Path:
    """Give what has been written the checkpoint's name, and remove what is no longer kept."""
    for path in (*made.rglob("*"), made):
        flush(path)
    write_manifest(made)
    if target.exists():
        # A folder cannot replace another in one go. Until it has, the old one is found under its second name.
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
    """Return the newest checkpoint that is whole, for a run to go on from, and remove what a killed save left.

    Args:
        folder: where checkpoints are saved; may be missing.
        main: whether this process is the one that removes, and that prints a line that names the checkpoint, and one
            for every damaged checkpoint that is passed over.

    Returns:
        None if there are no checkpoints.

    Raises:
        ValueError: if there are checkpoints and none is whole.
    """
    if main:
        _sweep(folder)
    say = tqdm.write if main else lambda _text: None
    found = newest_whole(_checkpoints(folder), lambda path: damage(path) or path, say)
    if found is not None:
        say(f"going on from {found.name}: step {steps_done(found)}")
        not_newer = [path for path in _checkpoints(folder) if place(path) <= place(found)]
        if main and len(not_newer) > KEPT:
            _prune(not_newer, KEPT, found)  # which a kill has kept the last save from
    return found


def place(checkpoint: Path) -> tuple[int, ...]:
    """Return the numbers in the name of a checkpoint; the later one's are greater."""
    match = _NAME.fullmatch(checkpoint.name)
    return tuple(map(int, match[1].split("-"))) if match else ()


def steps_done(checkpoint: Path) -> int:
    """Return the number of optimiser steps that the name of a checkpoint gives."""
    return place(checkpoint)[-1]


def check_numbers(value: Any, name: str) -> None:
    """Check that every number in what a run has measured is finite.

    Raises:
        ValueError: with the key of the first that is not.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            check_numbers(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            check_numbers(part, f"{name}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: the model computes numbers that are not finite; lower learning_rate")


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, newest first, a replaced one after the one that replaced it."""
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=lambda path: (place(path), not path.name.endswith(".replaced")), reverse=True)


def _sweep(folder: Path) -> None:
    """Remove what a save left that was killed."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _prune(checkpoints: list[Path], keep: int, proven: Path) -> None:
    """Remove all checkpoints, newest first, but those of the newest `keep` steps that are proven whole."""
    kept: set[tuple[int, ...]] = set()
    for path in checkpoints:
        whole = len(kept) < keep and (path == proven or damage(path) is None)
        if whole and place(path) not in kept:
            kept.add(place(path))
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that half of it is never seen under its name."""
    doomed = path.with_name(_REMOVED)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
