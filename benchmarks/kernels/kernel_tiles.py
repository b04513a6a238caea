"""Time each Triton kernel of the ops with its tiles and with others, on a CUDA device.

    python benchmarks/kernels/kernel_tiles.py --output tiles.jsonl

Only launch options are changed (numbers of warps and of pipeline stages, registers), not the sizes that the launching
code derives grids from. A row is written after each trial: the case, what was changed, and the microseconds of every
kernel, from torch's profiler, per forward and backward. Results are compared with those of the default.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from checkout import use_checkout
from circumstances import circumstances, write_rows

Changes = dict[str, dict[str, int]]
RUNS = 5
WARPS = (2, 4, 8, 16)
STAGES = (1, 2, 3, 4)
KERNELS = {
    "ssd forward+backward B1 L8192": (
        *("walk_kernel", "output_kernel"),
        *("target_gradients_kernel", "source_gradients_kernel"),
    ),
    "selective_scan forward+backward": ("summary_kernel", "forward_kernel", "backward_kernel"),
    "causal_conv1d forward+backward": ("forward_kernel", "backward_kernel"),
    "rms_norm_gated forward+backward": ("_forward_kernel", "_backward_kernel"),
    "masked_mix forward+backward B64 L1024 H1": ("mix_kernel", "weight_products_kernel"),
    "window_attention forward+backward": ("forward_kernel", "query_gradients_kernel", "key_gradients_kernel"),
}
"""Kernels to vary, by the beginning of the case's name."""


def trials(kernels: tuple[str, ...]) -> Iterator[Changes]:
    """Yield nothing changed, then one option of one kernel at a time."""
    yield {}
    for kernel in kernels:
        for warps in WARPS:
            yield {kernel: {"num_warps": warps}}
        for stages in STAGES:
            yield {kernel: {"num_stages": stages}}


@contextmanager
def launched_with(changes: Changes) -> Iterator[None]:
    """Replace launch options of kernels, by their names."""
    from triton.runtime.jit import JITFunction

    plain = JITFunction.__getitem__

    def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
        launch = plain(kernel, grid)
        return lambda *args, **options: launch(*args, **(options | changes.get(kernel.__name__, {})))

    JITFunction.__getitem__ = launcher
    try:
        yield
    finally:
        JITFunction.__getitem__ = plain


def microseconds(run: Callable[[], Any]) -> dict[str, float]:
    """Return the time of each kernel of a run that has run before, longest first."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    times = {event.key[:80]: event.self_device_time_total / RUNS for event in found.key_averages()}
    return {name: round(time, 1) for name, time in sorted(times.items(), key=lambda item: -item[1]) if time >= 1}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Time each kernel with other launch options.")
    parser.add_argument("--output", type=Path, required=True, help="result file; trials that it holds are not repeated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device")
    use_checkout()
    from kernel_cases import full_cases, our_run, prepare
    from kernel_check import error_of, sampled
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # What a kernel cannot be compiled or launched with; all else, e.g. an illegal access, stops the run.
    limits = (CompilationError, OutOfResources, PTXASError)
    about = circumstances(datetime.now(UTC), "kernels/kernel_tiles.py", arguments, ("triton",))
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["case"], json.dumps(row["changes"])) for row in rows}
    for beginning, kernels in KERNELS.items():
        case = next(case for case in full_cases() if case.name.startswith(beginning))
        run = our_run(prepare(case, torch.device("cuda")))
        expected = sampled(run())
        for changes in trials(kernels):
            if (case.name, json.dumps(changes)) in done:
                continue
            row: dict[str, Any] = {"case": case.name, "changes": changes}
            try:
                with launched_with(changes):
                    found = error_of(sampled(run()), expected)
                    run()
                    row |= {"error": found[0] if found else None, "microseconds": microseconds(run)}
            except limits as error:
                row["reason"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            rows.append(row | about)
            write_rows(rows, options.output)
            print(case.name, changes, row.get("reason") or dict(list(row["microseconds"].items())[:3]), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
