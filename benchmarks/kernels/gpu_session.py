"""Test and time the kernels on a GPU, in steps that can be cut off and continued.

    python benchmarks/kernels/gpu_session.py --minutes 9 --output out

needs neither an installation nor a network: torch, triton, transformers, tqdm and pytest have to be there. The steps:

    ops         every op once, compared with torch (`every_op.py`)
    memcheck    the same under compute-sanitizer, then racecheck and initcheck
    proof       the kernel tests, a step for each file
    bars        `gpu_kernels.py`, a step for each group of cases: ours beside the peers that are installed
    tiles       `kernel_tiles.py`: time of each kernel with other tiles

A row in `session.jsonl` says how each step ended, with hardware, versions, date and command; it is written before the
first step and after every step. The same command goes on where the last call ended: what has passed with these sources,
on this device and with these versions is not run again, and what was cut off or failed comes after what still waits.
The exit status is 1 if a step failed, and 2 if there was no time for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from checkout import ROOT
from circumstances import circumstances, positive, write_rows

PACKAGES = ("triton", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "pytest")
PASSED, FAILED, CUT_OFF, WAITING, UNAVAILABLE = "passed", "failed", "cut off", "waiting", "not available"
TAIL = 4000  # characters of a step's output that a row keeps
BARS = ("selective_scan", "causal_conv1d", "norm", "decode graph B(1|128) ", "window", "ssd .*L(8192|512|256) ")
"""Groups of cases, by regular expressions of their names."""
LEAST_SECONDS = 20  # no step starts with less time


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        name: unique.
        command: what is run.
        needs: programs or modules without which it is not available.
        environment: variables that it sets.
        says: what its output has to contain; a file of tests of which all are skipped has proved nothing.
    """

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    says: str = ""


def plan(output: Path, workers: int, sources: str) -> list[Step]:
    """Return the steps in order; results of other sources, devices or versions are in other folders."""
    here = Path(__file__).resolve().parent
    every_op = [sys.executable, str(here / "every_op.py")]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if workers > 1 and find_spec("xdist") is not None:
        tests += ["-n", str(workers), "--dist", "worksteal"]
    steps = [Step("ops", every_op, ("triton",))]
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", *every_op, "--length", "70"]
        needs = ("triton", "compute-sanitizer")
        steps.append(Step(tool, command, needs, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")):
        name = f"proof: {path.stem.removeprefix('test_')}"
        steps.append(Step(name, [*tests, str(path)], ("triton", "pytest"), says=" passed"))
    bars = [sys.executable, str(here / "gpu_kernels.py"), "--output", str(output / sources)]
    steps += [Step(f"bars: {only.strip()}", [*bars, "--only", only]) for only in BARS]
    tiles = [sys.executable, str(here / "kernel_tiles.py"), "--output", str(output / sources / "tiles.jsonl")]
    steps.append(Step("tiles", tiles, ("triton",)))
    steps.append(Step("bars: all others", bars))
    return steps


def missing(step: Step) -> list[str]:
    """Return the programs and modules that a step needs and that are not there."""
    return [name for name in step.needs if shutil.which(name) is None and find_spec(name.replace("-", "_")) is None]


def run_step(step: Step, seconds: float, environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a step for at most `seconds`, with its output in a file; return how it ended."""
    begin = time.monotonic()
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**inherited, **environment, **step.environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # its workers too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    status = CUT_OFF if code is None else PASSED if code == 0 and step.says in text else FAILED
    return {"status": status, "exit": code, "seconds": round(time.monotonic() - begin, 1), "tail": text[-TAIL:]}


def resumed(step: Step) -> Step:
    """Return a step of the bars that continues the newest result file, if there is one."""
    if not step.name.startswith("bars"):
        return step
    folder = Path(step.command[step.command.index("--output") + 1])
    files = sorted(folder.glob("kernels-*.jsonl"))
    return replace(step, command=[*step.command, "--resume", str(files[-1])]) if files else step


def digest_of(about: dict[str, Any]) -> str:
    """Return a short digest of the sources that decide what the steps find, of the device and of the versions."""
    digest = hashlib.sha256(json.dumps([about.get(name) for name in ("gpu", "driver", "versions")]).encode())
    for folder in ("kernels", "tests/kernels", "tests/support", "benchmarks/kernels"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def links(folder: Path) -> Path:
    """Make a folder in which `ssm_zoo` is this checkout, for processes that have no installation."""
    package = folder / "ssm_zoo"
    shutil.rmtree(package, ignore_errors=True)  # links to another checkout
    package.mkdir(parents=True)
    for source in ROOT.iterdir():
        if source.is_dir() and source.name[0] not in "._" and not folder.is_relative_to(source):
            (package / source.name).symlink_to(source, target_is_directory=True)
    return folder


def read_earlier(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of an earlier call by step.

    Raises:
        SystemExit: if the file is none of ours.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            row = json.loads(line)
            rows[row["step"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number}: not a row of this script; choose another --output") from error
    return rows


def session(
    steps: list[Step],
    output: Path,
    seconds: float,
    about: dict[str, Any],
    say: Callable[[str], None] = print,
) -> int:
    """Run what has not passed yet; 0 if all steps have passed or are not available, 1 if one failed, 2 if some wait."""
    end = time.monotonic() + seconds
    path = output / "session.jsonl"
    (output / "logs").mkdir(parents=True, exist_ok=True)
    earlier = read_earlier(path)
    rows = {step.name: {"step": step.name, "status": WAITING, **about} for step in steps}
    rows |= {name: row for name, row in earlier.items() if name in rows and row.get("sources") == about.get("sources")}
    environment = {
        "PYTHONPATH": os.pathsep.join([str(links(output / "packages")), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(output / "triton")),
        "PYTHONUNBUFFERED": "1",
    }
    write_rows(list(rows.values()), path)
    # A step that is too long for a call must not keep the others from their turn.
    order = [WAITING, UNAVAILABLE, CUT_OFF, FAILED]
    todo = [(number, step) for number, step in enumerate(steps) if rows[step.name]["status"] != PASSED]
    for number, step in sorted(todo, key=lambda item: order.index(rows[item[1].name]["status"])):
        left = end - time.monotonic()
        absent = missing(step)
        if absent:
            found: dict[str, Any] = {"status": UNAVAILABLE, "reason": f"{', '.join(absent)} is not installed"}
        elif left < LEAST_SECONDS:
            break
        else:
            say(f"{step.name} ...")
            found = run_step(resumed(step), left, environment, output / "logs" / f"{number:02}.txt")
        rows[step.name] = {"step": step.name, **found, **about}
        write_rows(list(rows.values()), path)
        say(f"{step.name}: {found['status']}" + (f", {found['seconds']} s" if "seconds" in found else ""))
    statuses = [row["status"] for row in rows.values()]
    say(f"{statuses.count(PASSED)} of {len(steps)} steps passed; {path}")
    if FAILED in statuses:
        return 1
    return 2 if WAITING in statuses or CUT_OFF in statuses else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Prove and time the kernels on a GPU, in steps.")
    parser.add_argument("--minutes", type=positive, default=9, help="start nothing after so many, and stop what runs")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-session"), help="folder of results; continued if there"
    )
    parser.add_argument("--workers", type=positive, default=min(10, os.cpu_count() or 1), help="processes of the tests")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device")
    output = options.output.resolve()
    about = circumstances(datetime.now(UTC), "kernels/gpu_session.py", arguments, PACKAGES)
    sources = about["sources"] = digest_of(about)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the step that runs, too
    return session(plan(output, options.workers, sources), output, 60 * options.minutes, about)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
