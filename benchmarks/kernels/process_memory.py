"""Peak of resident memory: of this process, and of measurements in processes of their own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ALONE = "--alone"
"""Option with which a script takes one measurement and prints it as JSON in the last line."""


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(script: str, arguments: list[str]) -> dict[str, Any]:
    """Take one measurement of a script in a new process, and return what it prints."""
    command = [sys.executable, str(Path(script).resolve()), ALONE, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])
