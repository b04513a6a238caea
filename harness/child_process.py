"""Run a program that ends with this process, also when this process is killed."""

import os
import subprocess
from collections.abc import Mapping, Sequence

__all__ = ["run_child"]


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and keep what it prints.

    Its standard input is a pipe that nothing is written to. It ends when this process does, however that happens; a
    program that watches for that end, as `isolated_load.end_with_parent` does, is not left behind.

    Args:
        command: the program and its arguments.
        environment: all its environment variables.
    """
    reader, writer = os.pipe()
    try:
        # On an exception, a signal's too, subprocess.run kills the child.
        return subprocess.run(
            list(command), env=dict(environment), stdin=reader, capture_output=True, text=True, check=False
        )
    finally:
        os.close(reader)
        os.close(writer)
