"""Kill a distillation again and again, let it go on each time, and say from where it went on.

`python tests/distill/kill_distillations.py RECIPE FOLDER DEATHS` is run by tests as a process, since it forks. It
carries the recipe out twice: in FOLDER/whole, left alone, and in FOLDER/killed. The first deaths are before the
calibration, in the division of slots (if there is one), in the calibration, and between it and the first step, the last
one while the results are written, the others are in between, stage ends and evaluations included. A moment is a number
of Python calls drawn by a seed, so that it is the same however busy the machine is. Prints, as JSON, first the parts
before the first stage that each start of the killed run began, then the newest checkpoint (stage, step) that it found,
null for none.

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
from ssm_zoo.distill.slots import divides_slots
from ssm_zoo.distill.stored_logits import write_logits
from ssm_zoo.distill.teacher import load_teacher

# tqdm's own lock is shared with forked processes: one that is killed while it holds the lock would block the others.
tqdm.set_lock(threading.RLock())

# A run's phases, and those of the computation of logits, each from the first call of its function after the one before.
START, SLOTS, CALIBRATION = run._prepare.__code__, run.divide_slots.__code__, run.calibrate.__code__
STAGE, TRAINING, RESULTS = run._train_stage.__code__, Distiller.compute_loss.__code__, run._report.__code__
OF_LOGITS = tuple(function.__code__ for function in (load_inputs, write_logits))
LOGITS_DEATHS = 5
PARTS = {SLOTS: "slots", run._control.__code__: "control", CALIBRATION: "calibration"}


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
        calls = [0] * len(phases)
        phase = 0

        def count(code: CodeType) -> None:
            nonlocal phase
            phase += code in phases[phase + 1 : phase + 2]
            calls[phase] += 1

        on_calls(count)
        carry_out()
        sys.setprofile(None)
        os.write(writer, json.dumps(calls).encode())

    assert fork(work) == 0
    return json.loads(os.read(reader, 1000))


def die_after(phase: CodeType | None, calls: int, begun: int) -> None:
    """Die so many calls after a phase of the run has begun, if at all; write the parts that begin to a pipe."""
    seen = 0

    def count(code: CodeType) -> None:
        nonlocal seen
        if code in PARTS:
            os.write(begun, f"{PARTS[code]}\n".encode())
        seen += seen > 0 or code is phase
        if 0 < seen == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    on_calls(count)


def newest_checkpoint(folder: Path) -> list[int] | None:
    places = [path.name.split("-")[1:] for path in folder.glob("checkpoints/checkpoint-*")]
    return max((list(map(int, place)) for place in places), default=None)


def kill(
    carry_out: Callable[[], object], moments: Sequence[tuple[CodeType, int]], found: Callable[[], Any]
) -> tuple[list[list[str]], list[Any]]:
    """Kill a process at some moments, then let it finish; return the parts that each start began, and what it found."""
    parts, starts = [], []
    for phase, moment in [*moments, (None, 0)]:
        starts.append(found())
        reader, writer = os.pipe()

        def work(phase: CodeType | None = phase, moment: int = moment, begun: int = writer) -> None:
            die_after(phase, moment, begun)
            carry_out()

        assert fork(work) == (0 if phase is None else -signal.SIGKILL), (phase, moment)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            parts.append(pipe.read().split("\n")[:-1])
    return parts, starts


def kill_a_run(recipe: Recipe, root: Path, deaths: int) -> tuple[list[list[str]], list[list[int] | None]]:
    """Carry a recipe out, left alone and killed; return the parts that each start began, and what it found."""
    before = (START, *((SLOTS,) if divides_slots(recipe) else ()), CALIBRATION)
    # What follows the division and the calibration are phases of their own, in which nothing dies.
    after = {SLOTS: (run.set_slots.__code__,), CALIBRATION: (run.check_finite.__code__,)}
    phases = [code for phase in (*before, STAGE, TRAINING, RESULTS) for code in (phase, *after.get(phase, ()))]
    calls = dict(zip(phases, count_calls(lambda: run.distill(recipe, root / "whole"), phases), strict=True))
    chance = random.Random(0)
    number = deaths - len(before) - 2
    # So little at a time that training cannot end before its last death.
    between = [(TRAINING, chance.randrange(1, calls[TRAINING] // (number + 2))) for _ in range(number)]
    moments = [(phase, chance.randrange(1, calls[phase])) for phase in (*before, STAGE)]
    moments += [*between, (RESULTS, chance.randrange(1, calls[RESULTS]))]
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
    _, starts = kill(
        lambda: precompute_logits(plain, folder, top_k=8),
        moments,
        lambda: len(list(folder.glob("stage-*.safetensors"))),
    )
    return starts


if __name__ == "__main__":
    torch.set_num_threads(1)
    checked, root, deaths = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    load_teacher(checked.teacher).model(torch.zeros(1, 2, dtype=torch.long))  # imports what every child would import
    of_logits = [] if checked.stored_logits is None else [kill_logits(checked, root, LOGITS_DEATHS)]
    for starts in (*of_logits, *kill_a_run(checked, root, deaths)):
        print(json.dumps(starts))
