"""The processes of a run, and the command line that starts it again: for reports and cards."""

import os
import shlex
from collections.abc import Sequence

from .public_text import public_argument

_ON_CPUS = "ACCELERATE_USE_CPU"


def process_number() -> int:
    """Number of this process in a run of several, from 0, as `accelerate launch` and `torchrun` give it."""
    return int(os.environ.get("RANK", "0"))


def check_processes(seen: int) -> None:
    """Raise a ValueError if accelerate sees other processes than were started.

    Each would carry out the run by itself, all in one folder.

    Args:
        seen: processes that accelerate knows of.
    """
    started = _processes_started()
    if seen != started:
        raise ValueError(
            f"accelerate: {started} processes were started, but it sees {seen}; on CPUs set {_ON_CPUS}=true"
        )


def command_line(arguments: Sequence[str]) -> str:
    """The command line that repeats a run of `ssm-zoo`, in as many processes as there are now.

    Of paths that lead out of the working folder it has the last names: it is published.

    Args:
        arguments: of `ssm-zoo`, the sub-command first.
    """
    program = ["ssm-zoo"]
    processes = _processes_started()
    if processes > 1:  # what `accelerate launch` comes down to, on GPUs and on CPUs
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        nodes = ["--nnodes", str(processes // here)] if here < processes else []
        program = ["torchrun", *nodes, "--nproc-per-node", str(here), "-m", "ssm_zoo.cli.main"]
    prefix = f"{_ON_CPUS}={os.environ[_ON_CPUS]} " if processes > 1 and _ON_CPUS in os.environ else ""
    return prefix + shlex.join([*program, *map(public_argument, arguments)])


def _processes_started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
