"""Measure the host's time for a Mamba-2 token in one and in two launches, without a GPU.

The ops run on tensors of the CPU as they would on a GPU: checks, outputs, and Triton's handling of the arguments until
the kernel is found. The launch itself is left out, so the times are lower bounds; a driver takes a few microseconds
more for each. Both ways run in turn. A row has the launches, their arguments and the microseconds of a call.

    python benchmarks/kernels/host_time.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkout import ROOT, use_checkout

SIZES = {"B": 1, "H": 64, "P": 64, "N": 128, "G": 1}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure the host's time of Mamba-2's step without a GPU.")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of 100 calls of each way")
    parser.add_argument("--output", type=Path, help="JSON lines to write; default: a new file in benchmarks/results")
    chosen = parser.parse_args(arguments)
    use_checkout()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    os.environ.pop("TRITON_INTERPRET", None)
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = _rows(chosen.rounds, now, arguments)
    from circumstances import RESULTS, write_rows

    for row in rows:
        print({name: row[name] for name in ("way", "launches", "arguments", "microseconds")})
    output = chosen.output or RESULTS / f"host_time-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, output)
    print(f"wrote {output}")


def _rows(rounds: int, now: datetime, arguments: list[str]) -> list[dict[str, Any]]:
    import torch
    import triton
    from circumstances import circumstances
    from kernel_cases import EAGER, Case, prepare
    from offline_compile import OfflineCompiler
    from resource_cases import two_steps
    from triton import knobs
    from triton.runtime.jit import JITFunction

    about = circumstances(now, "kernels/host_time.py", arguments)
    about["versions"] = {**about["versions"], "triton": triton.__version__}  # type: ignore[dict-item]
    OfflineCompiler(90, processors=132)
    knobs.nvidia.dump_ptxas_log = False
    launches: list[int] = []

    def without_launching(kernel: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> None:
            launches.append(len(args) + len(options))
            kernel.run(*args, grid=grid, warmup=True, **options)

        return launch

    JITFunction.__getitem__ = without_launching  # type: ignore[method-assign]
    setup = prepare(Case("decode", EAGER, SIZES, torch.bfloat16), torch.device("cpu"))
    inputs = setup.own_inputs()
    ways: dict[str, Callable[[], Any]] = {
        "mamba2_step": lambda: setup.op.ours(**inputs),
        "causal_conv1d_step, ssd_step": lambda: two_steps(inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for run in ways.values():
            run()  # compiles
        for _ in range(rounds):
            for name, run in ways.items():
                started = time.process_time()
                for _ in range(100):
                    run()
                times[name].append((time.process_time() - started) / 100)
    rows = []
    for name, run in ways.items():
        launches.clear()
        with torch.no_grad():
            run()
        microseconds = round(1e6 * statistics.median(times[name]), 1)
        rows.append(
            {
                "way": name,
                "launches": len(launches),
                "arguments": sum(launches),
                "microseconds": microseconds,
                "fastest": round(1e6 * min(times[name]), 1),
                **about,
            }
        )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
