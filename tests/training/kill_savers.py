"""Kill processes that save checkpoints, at every moment that can be told apart, and look at what they leave.

`python tests/distill/kill_savers.py FOLDER` is run by test_checkpoints.py as its own process: it forks. Savers
die at each file-system call in turn (an audit hook counts them), in the middle of the tensor file, and at random
moments. After each death there must be a whole checkpoint, the new one or the one before, and saving must go on.
Prints the number of deaths as JSON; an AssertionError is a failure.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ssm_zoo.training.checkpoints import last_checkpoint, save_checkpoint

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir"}
# Steps saved one after the other; the saver of the last one dies. Two are kept: the third save removes one.
SCENARIOS = {"first": [1], "pruning": [1, 2, 3], "replacing": [1, 2, 2]}


def save(folder: Path, step: int, content: int) -> None:
    def write(made: Path) -> None:
        save_file({"w": torch.full((4096,), float(content))}, made / "weights.safetensors")
        (made / "content.json").write_text(json.dumps(content))

    save_checkpoint(folder, f"checkpoint-{step}", write)


def check(folder: Path, allowed: set[int | None]) -> int | None:
    """Which save the newest whole checkpoint is of; all its parts must be of that one."""
    found = last_checkpoint(folder, main=False)
    content = json.loads((found / "content.json").read_text()) if found else None
    assert content in allowed, (content, allowed, sorted(folder.iterdir()))
    if found:
        assert (load_file(found / "weights.safetensors")["w"] == content).all()
    return content


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(call: int) -> None:
    seen = 0

    def hook(event: str, _: Any) -> None:
        nonlocal seen
        if event in CALLS:
            seen += 1
            if seen == call:
                die()

    sys.addaudithook(hook)


def fork(work: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def survives(child: int) -> bool:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def kill_at_every_call(root: Path, steps: list[int]) -> int:
    """Number of file-system calls of the last save, at each of which a saver died."""
    before, new = root / "before", len(steps)
    before.mkdir(parents=True)
    for content, step in enumerate(steps[:-1], start=1):
        save(before, step, content)
    call = 0
    while True:
        call += 1
        folder = root / str(call)
        shutil.copytree(before, folder)

        def work(call: int = call, folder: Path = folder) -> None:
            die_at(call)
            save(folder, steps[-1], new)

        alive = survives(fork(work))
        check(folder, {new} if alive else {new, new - 1 or None})
        save(folder, steps[-1], new)
        check(folder, {new})
        assert all(entry.name.startswith("checkpoint-") for entry in folder.iterdir())
        if alive:
            return call - 1


def kill_in_the_tensor_file(folder: Path) -> None:
    def half(made: Path) -> None:
        (made / "weights.safetensors").write_bytes(b"half of the tensors")
        die()

    save(folder, 1, 1)
    assert not survives(fork(lambda: save_checkpoint(folder, "checkpoint-2", half)))
    check(folder, {1})


def kill_at_random(folder: Path, rounds: int) -> int:
    """Steps that savers finished before they died; none of them may be lost."""
    save(folder, 0, 0)
    chance, reached = random.Random(0), 0
    for _ in range(rounds):
        reader, writer = os.pipe()

        def work(reached: int = reached, writer: int = writer) -> None:
            for step in range(reached + 1, reached + 1000):
                save(folder, step, step)
                os.write(writer, b".")

        child = fork(work)
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        assert not survives(child)
        os.close(writer)
        done = reached + len(os.read(reader, 1000))
        os.close(reader)
        found = check(folder, {done, done + 1})
        assert found is not None
        reached = found
    return reached


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    deaths = {name: kill_at_every_call(root / name, steps) for name, steps in SCENARIOS.items()}
    kill_in_the_tensor_file(root / "half")
    deaths["saved_between_random_deaths"] = kill_at_random(root / "random", rounds=25)
    print(json.dumps(deaths))
