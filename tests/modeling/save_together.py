"""Two processes save checkpoints and go on from them, called by train_with_trainer.py.

test_distributed.py looks at what they leave. A folder gets one subfolder for each training, with `zoo/` and `text.txt`
to read and these runs:

    whole      never interrupted
    run        killed in the last step, then finished by both processes
    flipped    as `run`, but a byte of its newest checkpoint was flipped
    one        as `run`, but not finished
"""

import io
import os
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from families import make_model
from tiny_checkpoints import save_tokenizer
from tiny_trainings import TRAININGS, Training, flip, stop_in


def write_sources(folder: Path) -> None:
    folder.mkdir(parents=True)
    make_model("mamba2-full").save_pretrained(folder / "zoo")
    save_tokenizer(folder / "zoo")
    (folder / "text.txt").write_text("abc def ghi " * 20)


def start(training: Training) -> str:
    """Carry out a training in `run`, as new processes would; return what it prints."""
    AcceleratorState._reset_state(True)
    printed = io.StringIO()
    with redirect_stdout(printed):
        training.start()
    return printed.getvalue()


def save_and_resume(folder: Path, names: list[str]) -> None:
    """Make the runs of these trainings."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    main_process = dist.get_rank() == 0
    for name in names:
        training = TRAININGS[name]
        with pytest.MonkeyPatch.context() as patch:
            if main_process:
                write_sources(folder / name)
            dist.barrier()
            patch.chdir(folder / name)
            start(training)
            rename("run", "whole")
            with pytest.MonkeyPatch.context() as inner:
                stop_in(6, inner)
                with pytest.raises(KeyboardInterrupt):
                    start(training)
            dist.barrier()
            if main_process:
                for copy in ("one", "flipped"):
                    shutil.copytree("run", copy)
            dist.barrier()
            start(training)
            rename("run", "finished")
            rename("flipped", "run")
            if main_process:
                flip(Path("run", "checkpoints", "checkpoint-4", training.saved))
            dist.barrier()
            said = start(training)
            rename("run", "flipped")
            rename("finished", "run")
            if main_process:
                Path("said.txt").write_text(said)


def rename(old: str, new: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        os.rename(old, new)
    dist.barrier()
