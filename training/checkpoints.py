"""What both Trainers have in common: checkpoints that are whole or not there, and steps whose numbers are finite.

transformers' Trainer writes a checkpoint's files one by one under its name. Here they are written under a temporary
name, listed with their checksums, and renamed, so that a folder of a checkpoint's name was whole once; whether it still
is, is checked before a run goes on from it.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer

from ..harness.checkpoint_manifest import damage, newest_whole, write_manifest
from ..harness.run_folder import TEMPORARY, flush

KEPT = 2
"""Checkpoints that stay, proven whole."""

_SAVING = f"{TEMPORARY}saving"
_REMOVED = f"{TEMPORARY}removed"

# A mixin: at run time the class that it is mixed into is the Trainer.
_Base = Trainer if TYPE_CHECKING else object


class CheckedTrainer(_Base):
    """Makes a Trainer stop at a loss or gradient norm that is not finite, and save checkpoints as said above."""

    _loss_of_step: Tensor | None = None
    _saving = False

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        self._loss_of_step = loss if self._loss_of_step is None else self._loss_of_step + loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the Trainer's, which calls it before the optimiser's step: bad gradients never reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._loss_of_step = self._loss_of_step, None
        measured = {"loss": loss, "gradient norm": norm}
        for name, value in measured.items():
            if value is not None and not math.isfinite(float(value)):
                step = self.state.global_step + 1
                raise ValueError(f"the {name} is {float(value)} at step {step}; lower learning_rate")
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _SAVING) if self._saving else folder

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        folder = Path(self._get_output_dir(None))
        temporary = folder / _SAVING
        if self.args.should_save:
            _sweep(folder)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(*arguments, **options)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()  # every process has written its random states
        if self.args.should_save:
            (made,) = temporary.iterdir()
            for path in made.rglob("*"):
                flush(path)
            write_manifest(made)
            if (folder / made.name).exists():
                _remove(folder / made.name)  # a damaged one, which was passed over
            os.replace(made, folder / made.name)
            flush(folder)
            temporary.rmdir()
            _prune(folder, folder / made.name)
        self.accelerator.wait_for_everyone()


def last_checkpoint(folder: Path, *, main: bool) -> Path | None:
    """Return the newest checkpoint that is whole, for a run to go on from, and remove what a killed save left.

    Args:
        folder: where the Trainer saves.
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
    return found


def steps_done(checkpoint: Path) -> int:
    """Return the number of optimiser steps that the name of a checkpoint gives."""
    return int(checkpoint.name.rpartition("-")[2])


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
    """Checkpoints, newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(paths, key=steps_done, reverse=True)


def _sweep(folder: Path) -> None:
    """Remove what a save left that was killed."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


def _prune(folder: Path, written: Path) -> None:
    """Remove all checkpoints but the newest that are proven whole; `written` has just been."""
    kept = 0
    for path in _checkpoints(folder):
        if kept < KEPT and (path == written or damage(path) is None):
            kept += 1
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that half of it is never seen under its name."""
    doomed = path.with_name(_REMOVED)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
