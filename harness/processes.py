"""The processes of a run: their numbers, the command line that repeats the run, and child processes."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from .published import public_argument

__all__ = ["check_processes", "command_line", "process_number", "run_child"]

_ON_CPUS = "ACCELERATE_USE_CPU"


def process_number() -> int:
    """Return the number of this process, from 0, as `accelerate launch` and `torchrun` set it."""
    return int(os.environ.get("RANK", "0"))


def check_processes(seen: int) -> None:
    """Raise a ValueError if accelerate does not see all processes that were started.

    Otherwise each process would carry out the whole run, all of them in one folder.

    Args:
        seen: number of processes that accelerate knows of.
    """
    started = _processes_started()
    if seen != started:
        raise ValueError(
            f"accelerate: {started} processes were started, but it sees {seen}. On CPUs, set {_ON_CPUS}=true."
        )


def command_line(arguments: Sequence[str]) -> str:
    """Return the command line that repeats a run of `ssm-zoo` in as many processes as there are now.

    Paths that lead out of the working folder are reduced to their last names, since reports are published.

    Args:
        arguments: of `ssm-zoo`, the sub-command first.
    """
    program = ["ssm-zoo"]
    processes = _processes_started()
    if processes > 1:  # `accelerate launch` runs torchrun as well, on GPUs and on CPUs
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        nodes = ["--nnodes", str(processes // here)] if here < processes else []
        program = ["torchrun", *nodes, "--nproc-per-node", str(here), "-m", "ssm_zoo.cli.main"]
    prefix = f"{_ON_CPUS}={os.environ[_ON_CPUS]} " if processes > 1 and _ON_CPUS in os.environ else ""
    return prefix + shlex.join([*program, *map(public_argument, arguments)])


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and capture its output.

    Its standard input is a pipe to which nothing is written and which closes when this process ends, even if it is
    killed. A program that watches that pipe, as `isolated_load.end_with_parent` does, then ends too.

    Args:
        command: the program and its arguments.
        environment: all its environment variables.
    """
    reader, writer = os.pipe()
    try:
        # On an exception, including a signal's, subprocess.run kills the child.
        return subprocess.run(
            list(command), env=dict(environment), stdin=reader, capture_output=True, text=True, check=False
        )
    finally:
        os.close(reader)
        os.close(writer)


def _processes_started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
