"""Kill a distillation again and again, let it go on each time, and say from where it went on.

`python tests/distill/kill_distillations.py RECIPE FOLDER DEATHS` is run by test_distill_run.py as a process, since
it forks. It carries the recipe out twice: in FOLDER/whole, left alone, and in FOLDER/killed. The first death is before
the first step, the last one while the results are written, the others are in between, stage ends and evaluations
included. A moment is a number of Python calls drawn by a seed, so that it is the same however busy the machine is.
Prints, as JSON, the newest checkpoint (stage, step) that each start of the killed run found, null for none.
"""

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from tqdm.std import tqdm

from ssm_zoo.distill import run
from ssm_zoo.distill.distiller import Distiller
from ssm_zoo.distill.recipe import Recipe
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.teacher import load_teacher

# tqdm's own lock is shared with forked processes: one that is killed while it holds the lock would block the others.
tqdm.set_lock(threading.RLock())

START, TRAINING, RESULTS = (function.__code__ for function in (run._prepare, Distiller.compute_loss, run._report))


def on_calls(act: Callable[[CodeType], None]) -> None:
    """Have `act` called with the code of every Python function that is called from now on."""

    def profile(frame: Any, event: str, _argument: Any) -> None:
        if event == "call":
            act(frame.f_code)

    sys.setprofile(profile)


def fork(work: Callable[[], None]) -> int:
    """Exit code of a process that does some work; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_calls(recipe: Recipe, folder: Path) -> list[int]:
    """Carry a recipe out: how many calls it takes to start, to train, and to write the results."""
    reader, writer = os.pipe()

    def work() -> None:
        calls = {START: 0, TRAINING: 0, RESULTS: 0}
        phase = START

        def count(code: CodeType) -> None:
            nonlocal phase
            phase = code if code in (TRAINING, RESULTS) else phase
            calls[phase] += 1

        on_calls(count)
        run.distill(recipe, folder)
        sys.setprofile(None)
        os.write(writer, json.dumps(list(calls.values())).encode())

    assert fork(work) == 0
    return json.loads(os.read(reader, 1000))


def die_after(phase: CodeType, calls: int) -> None:
    """Die so many calls after a phase of the run has begun."""
    seen = 0

    def count(code: CodeType) -> None:
        nonlocal seen
        seen += seen > 0 or code is phase
        if seen == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    on_calls(count)


def newest_checkpoint(folder: Path) -> list[int] | None:
    places = [path.name.split("-")[1:] for path in folder.glob("checkpoints/checkpoint-*")]
    return max(([int(stage), int(step)] for stage, step in places), default=None)


def kill(recipe: Recipe, folder: Path, calls: list[int], deaths: int) -> list[list[int] | None]:
    """What each start of a run finds that dies `deaths` times before it is left alone."""
    chance = random.Random(0)
    # So little at a time that training cannot end before its last death.
    training = [(TRAINING, chance.randrange(1, calls[1] // deaths)) for _ in range(deaths - 2)]
    moments = [(START, chance.randrange(1, calls[0])), *training, (RESULTS, chance.randrange(1, calls[2]))]
    starts = []
    for phase, moment in moments:
        starts.append(newest_checkpoint(folder))

        def work(phase: CodeType = phase, moment: int = moment) -> None:
            die_after(phase, moment)
            run.distill(recipe, folder)

        assert fork(work) == -signal.SIGKILL, (phase, moment)
    starts.append(newest_checkpoint(folder))
    assert fork(lambda: run.distill(recipe, folder) and None) == 0
    return starts


if __name__ == "__main__":
    torch.set_num_threads(1)
    checked, root = load_recipe(sys.argv[1]), Path(sys.argv[2])
    load_teacher(checked.teacher)  # imports what every child would import
    calls = count_calls(checked, root / "whole")
    print(json.dumps(kill(checked, root / "killed", calls, int(sys.argv[3]))))
