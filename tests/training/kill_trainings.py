"""Kill the Trainers' saver at every moment that matters, start again each time, and look at what that went on from.

`python tests/training/kill_trainings.py FOLDER NAME` is run by test_trainer_checkpoints.py as a process, since it
forks, in FOLDER, which holds all that the training NAME reads, its result in "whole", and "run", interrupted in its
last step. Savers die with half of the optimiser's file written, and before file-system calls of a save (an audit hook
counts them): at each that renames and at the one after it. Prints the deaths as JSON, each with the newest whole
checkpoint before and after it; an AssertionError is a failure.
"""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill_savers import CALLS, die, fork, survives
from tiny_trainings import TRAININGS, Training, weights
from tqdm.std import tqdm

from ssm_zoo.harness.checkpoint_manifest import damage
from ssm_zoo.training.checkpoints import CheckedTrainer, steps_done

# tqdm's own lock is shared with forked processes: one that is killed while it holds the lock would block the others.
tqdm.set_lock(threading.RLock())

RUN = Path("run")
CHECKPOINTS = RUN / "checkpoints"


def in_save(act: Callable[[str], None], after: Callable[[], None] = lambda: None) -> None:
    """Have `act` called with every file-system call of this process's first save, and something done after the save."""
    inner, state = CheckedTrainer._save_checkpoint, {"saves": 0, "saving": False}

    def save(self: Any, *arguments: Any, **options: Any) -> None:
        state["saves"] += 1
        state["saving"] = state["saves"] == 1
        inner(self, *arguments, **options)
        if state["saving"]:
            state["saving"] = False
            after()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # Those of the run are relative or descriptors; others are of modules that are imported on the way.
        if state["saving"] and event in CALLS and not str(arguments[0]).startswith("/"):
            act(event)

    CheckedTrainer._save_checkpoint = save  # pyright: ignore[reportAttributeAccessIssue]
    sys.addaudithook(hook)


def calls_of_a_save(training: Training) -> list[str]:
    """Carry the run on for one save, and die: the file-system calls of that save."""
    calls: list[str] = []

    def end() -> None:
        Path("calls.json").write_text(json.dumps(calls))
        die()

    def work() -> None:
        in_save(calls.append, end)
        training.start()

    assert not survives(fork(work))
    return json.loads(Path("calls.json").read_text())


def die_at(call: int) -> None:
    seen = 0

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == call + 1:
            die()

    in_save(count)


def die_in_the_optimiser() -> None:
    whole = torch.save

    def half(values: Any, file: Any, *arguments: Any, **options: Any) -> None:
        whole(values, file, *arguments, **options)
        if Path(file).name == "optimizer.pt":
            os.truncate(file, Path(file).stat().st_size // 2)
            die()

    torch.save = half


def newest() -> int:
    """Steps of the newest whole checkpoint."""
    return max(steps_done(path) for path in CHECKPOINTS.glob("checkpoint-*") if damage(path) is None)


def start(training: Training, prepare: Callable[[], None] = lambda: None) -> tuple[bool, str]:
    """Start the run in a process that may die: whether it lived, and what it said."""
    said = Path("said.txt")

    def work() -> None:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            prepare()
            training.start()

    return survives(fork(work)), said.read_text()


def chosen(calls: list[str]) -> list[int]:
    found = {call + more for call, event in enumerate(calls) if event == "os.rename" for more in (0, 1)}
    return sorted(call for call in found if call < len(calls))


def kill(training: Training, before: Path) -> list[tuple[int, int]]:
    """Kill the run of a folder at every moment chosen, and let it end whenever a death comes after its save."""

    def begin() -> None:
        shutil.rmtree(RUN, ignore_errors=True)
        shutil.copytree(before, RUN)

    def end() -> None:
        """Check that the run goes on to what it would have been, and leaves nothing besides."""
        here = newest()
        lived, said = start(training)
        assert lived and f"resuming from checkpoint-{here}: step {here}" in said, said
        ours, theirs = weights("run", training), weights("whole", training)
        assert ours.keys() == theirs.keys() != set()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        for folder in ("", "checkpoints"):
            names = [{path.name for path in Path(run, folder).iterdir()} for run in ("run", "whole")]
            assert names[0] == names[1], names

    begin()
    calls = calls_of_a_save(training)
    end()
    begin()
    deaths: list[Callable[[], None]] = [lambda call=call: die_at(call) for call in chosen(calls)]
    found = []
    for death in (die_in_the_optimiser, *deaths):
        here = newest()
        lived, said = start(training, death)
        assert not lived and f"resuming from checkpoint-{here}: step {here}" in said, said
        found.append((here, newest()))
        if newest() != here:
            end()
            begin()
    end()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(sys.argv[1])
    RUN.rename("before")
    print(json.dumps(kill(TRAININGS[sys.argv[2]], Path("before"))))
