"""Description of the machine and the command in every row of results, quartiles, and the writing of result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ssm_zoo.kernels.cpu_products import products_are_fast

RESULTS = Path(__file__).resolve().parent / "results"


def processor() -> str:
    """Return the name of the CPU, or the machine type if the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, str]:
    """Return name, memory, driver and CUDA version of the current device; empty without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"compute capability {properties.major}.{properties.minor}",
        "driver": driver(),
        "cuda": str(torch.version.cuda),
    }


def driver() -> str:
    """Return the version of NVIDIA's driver, "unknown" if nvidia-smi does not tell."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0].strip() or "unknown"


def version_of(name: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def circumstances(
    now: datetime, script: str, arguments: list[str], packages: tuple[str, ...] = ()
) -> dict[str, object]:
    """Return the part of a row that names hardware, versions, date and command.

    Args:
        now: when the run began.
        script: its path from this folder, e.g. "kernels/cpu_paths.py".
        arguments: its command line.
        packages: distributions to name beside torch and transformers, those that are installed.
    """
    names = ("ssm-zoo", "torch", "transformers", *packages)
    return {
        "hardware": f"{processor()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads",
        **gpu(),
        **({"matrix_products": "oneDNN"} if products_are_fast() else {}),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in names if (found := version_of(name)) is not None},
        },
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{script}", *map(nameable, arguments)]),
    }


def nameable(argument: str) -> str:
    """Return the argument, in which an absolute path, also after "NAME=", is its last part: folders are private."""
    name, sign, value = argument.rpartition("=")
    return f"{name}{sign}{Path(value).name}" if os.path.isabs(value) else argument


def write_rows(rows: list[dict[str, object]], path: Path) -> None:
    """Write one JSON object per line; the file appears whole or not at all.

    Raises:
        ValueError: if a number is not finite, which JSON cannot express.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def positive(text: str) -> int:
    """Read a whole number of at least 1 from a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return first quartile, median and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"q1": low, "median": middle, "q3": high}
