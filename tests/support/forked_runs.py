"""Run scripts, Python snippets and shell lines one after the other, each in a process forked from this one.

A user would start each of them by itself, and most of the time would go into importing torch and transformers. Here
both are imported once, before the forks; `ssm_zoo` is not, so a snippet sees of it what it imports. An `ssm-zoo` line
is carried out by a fork as well, any other line by bash.

    python tests/support/forked_runs.py PLAN RESULTS

PLAN is a JSON list of {"kind": "script" | "python" | "bash", "text": ..., "arguments": [...], "folder": ...}, where a
"script" is the path of a Python file with its arguments. RESULTS gets a list of {"status": ..., "output": ...}.
"""

import importlib
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_run_subprocess = subprocess.run


def forked(run: Callable[[], None], output: int | None = None) -> int:
    """Carry out `run` in a child process and return its exit status.

    Args:
        run: what to do; an exception that leaves it ends the child with a traceback and status 1.
        output: file descriptor for stdout and stderr; those of this process if None.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        run()
        raise SystemExit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(arguments: list[str]) -> None:
    """Do what the script `ssm-zoo` does with these arguments."""
    sys.argv = ["ssm-zoo", *arguments]
    importlib.import_module("ssm_zoo.cli.main").app(prog_name="ssm-zoo")


def run_subprocess(line: Any, **options: Any) -> Any:
    """Stand in for `subprocess.run` in scripts: an `ssm-zoo` command is forked, all else is run as usual."""
    if not isinstance(line, list) or line[0] != "ssm-zoo":
        return _run_subprocess(line, **options)
    assert options == {"check": True}, options
    status = forked(lambda: command(line[1:]))
    if status:
        raise subprocess.CalledProcessError(status, line)
    return subprocess.CompletedProcess(line, status)


def carry_out(item: dict[str, Any]) -> None:
    """Carry out an item of the plan, in a child process of its own."""
    subprocess.run = run_subprocess  # type: ignore[assignment]
    os.chdir(item["folder"])
    text = item["text"]
    if item["kind"] == "script":
        sys.argv = [text, *item["arguments"]]
        sys.path.insert(0, str(Path(text).parent))
        runpy.run_path(text, run_name="__main__")
    elif item["kind"] == "python":
        exec(compile(text, "<snippet>", "exec"), {"__name__": "__main__"})
    else:
        for line in logical_lines(text):
            words = shlex.split(line, comments=True)
            status = forked(lambda w=words: command(w[1:])) if words[0] == "ssm-zoo" else _run_bash(line)
            if status:
                raise SystemExit(status)


def logical_lines(text: str) -> list[str]:
    """Split a shell snippet into its commands: lines, joined where one ends with a backslash, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def _run_bash(line: str) -> int:
    return _run_subprocess(["bash", "-euo", "pipefail", "-c", line], check=False).returncode


def main() -> None:
    """Import what takes time, then carry out the plan."""
    for name in ("torch", "transformers", "transformers.generation.utils", "transformers.trainer", "peft", "typer"):
        importlib.import_module(name)
    plan, results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), []
    for item in plan:
        with tempfile.TemporaryFile() as output:
            status = forked(lambda i=item: carry_out(i), output.fileno())
            output.seek(0)
            results.append({"status": status, "output": output.read().decode("utf-8", errors="replace")})
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
