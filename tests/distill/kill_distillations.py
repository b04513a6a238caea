"""Kill a distillation again and again, let it go on each time, and say from where it went on.

`python tests/distill/kill_distillations.py RECIPE FOLDER DEATHS` is run by tests as a process, since it forks. It
carries the recipe out twice: in FOLDER/whole, left alone, and in FOLDER/killed. The first death is before the first
step, the last one while the results are written, the others are in between, stage ends and evaluations included. A
moment is a number of Python calls drawn by a seed, so that it is the same however busy the machine is. Prints, as JSON,
the newest checkpoint (stage, step) that each start of the killed run found, null for none.

If the recipe has `stored_logits`, they are computed before, in FOLDER/whole-logits left alone, and in the folder that
the recipe names killed as often; this also prints the number of files that each start found.
"""

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from tqdm.std import tqdm

from ssm_zoo.distill import run
from ssm_zoo.distill.distiller import Distiller
from ssm_zoo.distill.inputs import load_inputs
from ssm_zoo.distill.precompute import precompute_logits
from ssm_zoo.distill.recipe import Recipe, as_mapping, parse_recipe
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.stored_logits import write_logits
from ssm_zoo.distill.teacher import load_teacher

# tqdm's own lock is shared with forked processes: one that is killed while it holds the lock would block the others.
tqdm.set_lock(threading.RLock())

# A run's phases, and those of the computation of logits, each from the first call of its function.
OF_A_RUN = tuple(function.__code__ for function in (run._prepare, Distiller.compute_loss, run._report))
OF_LOGITS = tuple(function.__code__ for function in (load_inputs, write_logits))


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


def count_calls(carry_out: Callable[[], object], phases: Sequence[CodeType]) -> list[int]:
    """Carry something out: how many calls each of its phases takes."""
    reader, writer = os.pipe()

    def work() -> None:
        calls = dict.fromkeys(phases, 0)
        phase = phases[0]

        def count(code: CodeType) -> None:
            nonlocal phase
            phase = code if code in phases else phase
            calls[phase] += 1

        on_calls(count)
        carry_out()
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


def kill(carry_out: Callable[[], object], moments: Sequence[tuple[CodeType, int]], found: Callable[[], Any]) -> list:
    """Kill a process at some moments, then let it finish; return what each start found."""
    starts = []
    for phase, moment in moments:
        starts.append(found())

        def work(phase: CodeType = phase, moment: int = moment) -> None:
            die_after(phase, moment)
            carry_out()

        assert fork(work) == -signal.SIGKILL, (phase, moment)
    starts.append(found())
    assert fork(lambda: carry_out() and None) == 0
    return starts


def kill_a_run(recipe: Recipe, root: Path, deaths: int) -> list[list[int] | None]:
    """Carry a recipe out, left alone and killed; what each start found."""
    calls = count_calls(lambda: run.distill(recipe, root / "whole"), OF_A_RUN)
    chance = random.Random(0)
    start, training, results = OF_A_RUN
    # So little at a time that training cannot end before its last death.
    between = [(training, chance.randrange(1, calls[1] // deaths)) for _ in range(deaths - 2)]
    moments = [(start, chance.randrange(1, calls[0])), *between, (results, chance.randrange(1, calls[2]))]
    folder = root / "killed"
    return kill(lambda: run.distill(recipe, folder), moments, lambda: newest_checkpoint(folder))


def kill_logits(recipe: Recipe, root: Path, deaths: int) -> list[int]:
    """Compute the logits that a recipe reads, left alone and killed; how many files each start found."""
    assert recipe.stored_logits is not None
    folder, plain = Path(recipe.stored_logits), parse_recipe({**as_mapping(recipe), "stored_logits": None})
    calls = count_calls(lambda: precompute_logits(plain, root / "whole-logits", top_k=8), OF_LOGITS)
    chance = random.Random(0)
    start, writing = OF_LOGITS
    # Each but the first lives to write a file of eight or more, and all together do not write all.
    between = [(writing, chance.randrange(calls[1] // 7, calls[1] // deaths)) for _ in range(deaths - 1)]
    moments = [(start, chance.randrange(1, calls[0])), *between]
    return kill(
        lambda: precompute_logits(plain, folder, top_k=8),
        moments,
        lambda: len(list(folder.glob("stage-*.safetensors"))),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    checked, root, deaths = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    load_teacher(checked.teacher).model(torch.zeros(1, 2, dtype=torch.long))  # imports what every child would import
    found = [] if checked.stored_logits is None else [kill_logits(checked, root, deaths)]
    found.append(kill_a_run(checked, root, deaths))
    for starts in found:
        print(json.dumps(starts))
