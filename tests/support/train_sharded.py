"""One of two processes that share out a model's weights; started by test_sharding.py through `accelerate launch`.

`train_sharded.py FOLDER COMMAND:OUTPUT:STOP ...` carries out commands one after the other, in a folder that holds what
they read; each in its own OUTPUT, up to the step STOP of each training ("-": to its end).
"""

import os
import sys
from typing import Any

import pytest

from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.training.checkpoints import CheckedTrainer
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.language_model import finetune_language_model
from ssm_zoo.training.settings import parse_settings

TEXTS: dict[str, Any] = {"train": ["text.txt"], "heldout": ["text.txt"], "row_tokens": 32}
HOW: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "dtype": "float32"}


def run(command: str, output: str, rows: int) -> None:
    """Carry out a command.

    Args:
        command: "distill", "train", "full" or "lora".
        output: folder of the run.
        rows: of a batch, over all processes.
    """
    settings = {**HOW, **TEXTS, "batch_size": rows}
    if command == "distill":
        distill(load_recipe("recipe.yaml"), output)
    elif command == "train":
        train_from_scratch(parse_from_scratch({**settings, "config": "zoo", "tokenizer": "zoo", "warmup": 1}), output)
    elif command == "full":
        finetune_language_model(parse_settings({**settings, "model": "zoo", "method": "full"}), output)
    else:
        finetune_language_model(parse_settings({**settings, "model": "zoo", "rank": 2}), output, merge=True)


def run_until(command: str, output: str, stop: int | None, rows: int) -> None:
    """Carry out a command up to a step of its last training."""
    inner = CheckedTrainer.training_step

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == stop and self.stage_name in ("", "stages.logits: "):
            raise KeyboardInterrupt
        return inner(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedTrainer, "training_step", stopping)
        if stop is None:
            run(command, output, rows)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(command, output, rows)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    for job in sys.argv[2:]:
        command, output, stop = job.split(":")
        run_until(command, output, None if stop == "-" else int(stop), 4 // int(os.environ["WORLD_SIZE"]))
