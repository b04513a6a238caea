"""Hardware and versions, which accompany every published measurement, without anything that names the machine."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

_DISTRIBUTIONS = ("torch", "transformers", "accelerate", "ssm-zoo")


def describe_machine(*computing: str) -> dict[str, dict[str, Any]]:
    """Return hardware and versions, without host names, paths or serial numbers.

    Args:
        computing: distributions to list in addition to torch, transformers, accelerate and ssm-zoo.

    Returns:
        "hardware": "cpu" (its name, or None), "cores" (those this process may use), "memory_bytes" (of the
        machine, or None) and "gpu" (CUDA devices that torch sees, or None); "versions": those of Python and of the
        distributions.
    """
    versions = {"python": platform.python_version()}
    for name in (*_DISTRIBUTIONS, *computing):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a source tree
    if torch.cuda.is_available() and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    hardware = {"cpu": _cpu(), "cores": _cores(), "memory_bytes": _memory(), "gpu": _gpu()}
    return {"hardware": hardware, "versions": versions}


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; the largest so far where the system does not tell it."""
    if sys.platform != "linux":
        return peak_memory()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu() -> str | None:
    """Return the processor's name, or its architecture if the system does not tell."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    elif sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(query, check=False, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine() or None


def _cores() -> int | None:
    # In containers and under batch systems a process may use fewer cores than the machine has.
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu() -> str | None:
    """Return the names and numbers of the CUDA devices, e.g. "2 x NVIDIA H100 80GB HBM3"."""
    if not torch.cuda.is_available():
        return None
    devices = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{number} x {name}" for name, number in devices.items())
