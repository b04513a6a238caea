"""Measure what GLIBC_TUNABLES of `make demo` change for a training step on Linux: CPU time, wall time, peak memory.

Each measurement runs in a process of its own, with and without them in turn: two steps of a student whose attention
layers all have a bounded memory, after one that is not counted.

    python benchmarks/kernels/allocator.py TEACHER --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, write_rows
from process_memory import ALONE, in_a_process, peak_bytes

from ssm_zoo.cli.demo import ALLOCATOR

STEPS = 2


def measure(folder: str, tokens: int, threads: int) -> dict[str, Any]:
    """Train a step that is not counted and then some that are; return the means of a step, and the peak of memory."""
    from ssm_zoo.distill.recipe import StudentSpec
    from ssm_zoo.distill.student import build_student
    from ssm_zoo.distill.teacher import load_teacher

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    teacher = load_teacher(folder)
    spec = StudentSpec(mixer="bounded_attention", rows=340, kv_dtype="int8", slots="equal")
    student = build_student(teacher, spec, list(range(teacher.num_layers)))
    ids = torch.randint(student.config.vocab_size, (1, tokens))

    def step() -> None:
        student(ids, labels=ids).loss.backward()
        student.zero_grad(set_to_none=False)

    step()
    begin, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(STEPS):
        step()
    end, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
    return {
        "cpu_seconds": (end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime) / STEPS,
        "seconds": seconds / STEPS,
        "page_faults": (end.ru_minflt - begin.ru_minflt) // STEPS,
        "peak_bytes": peak_bytes(),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure the allocator's settings of the demonstration.")
    parser.add_argument("teacher", help="a folder or Hub id")
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of a step")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for a new file")
    parser.add_argument(ALONE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(measure(options.teacher, options.tokens, options.threads)))
        return
    torch.set_num_threads(options.threads)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/allocator.py", arguments)
    rows: list[dict[str, object]] = []
    line = [options.teacher, "--tokens", str(options.tokens), "--threads", str(options.threads)]
    for _ in range(options.rounds):
        for tuned in (False, True):
            for name in ALLOCATOR:
                os.environ.pop(name, None)
            os.environ.update(ALLOCATOR if tuned else {})
            rows.append({"tuned": tuned, "tokens": options.tokens, **in_a_process(__file__, line), **about})
            write_rows(rows, options.output / f"allocator-{now:%Y%m%dT%H%M%SZ}.jsonl")
            print(rows[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
