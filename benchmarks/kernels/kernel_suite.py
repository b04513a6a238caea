"""Run of the kernel benchmark: check, time and write a row per side of each case.

Before a case is timed, our op is compared with its definition in float64 at a reduced size: outputs, and where there
is a backward every gradient. So is each peer. A side whose results are wrong is refused and not timed. At full size
our results are compared once more with those of each peer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where circumstances.py is

import torch
from circumstances import RESULTS, circumstances, positive, quartiles, write_rows
from kernel_bars import MEASURED, NOT_MEASURED, REFUSED, Row, judge, report
from kernel_cases import (
    EAGER,
    GRAPH,
    Case,
    Results,
    Run,
    Setup,
    full_cases,
    our_run,
    prepare,
    reference_results,
    size_of,
    small_cases,
)
from kernel_check import allowed, error_of, sampled
from kernel_peers import PEERS, Builder, NotMeasuredError
from kernel_sides import forget_tuning
from kernel_timing import Clock, captured
from roofline import chunk_state_bytes, compute_ceiling, cost, floor_seconds, measure_ceilings
from tqdm import tqdm

PACKAGES = ("triton", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "fla-core", "flash-attn")
CEILINGS = "ceilings"
NEEDS_DEVICE = "needs a CUDA device"
LEFT_OUT = "left out by --small"


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of packages that do not support this machine or these arguments."""
    common = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return common
    return *common, TritonError


def describe(case: Case, peer: str | None, full: bool) -> Row:
    """Return the fields of a row that describe its case; bars apply to `full` cases."""
    return {
        "case": case.name,
        "peer": peer,
        "op": case.op,
        "mode": case.mode,
        "sizes": dict(case.sizes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "full": full,
    }


def not_measured(case: Case, reason: str, full: bool) -> list[Row]:
    """Return all rows of a case that cannot run here."""
    return [describe(case, peer, full) | _without(reason) for peer in (None, *PEERS[case.op])]


def _without(reason: str, status: str = NOT_MEASURED) -> Row:
    return {"status": status, "reason": reason}


class WrongResultError(Exception):
    """A side is refused; the message says which result is wrong and by how much."""


@dataclass(frozen=True)
class Measured:
    """Our side of a case, for the peers to be measured beside."""

    small: Setup  # at the size that is checked
    expected: Results  # of it
    setup: Setup
    run: Run
    first: Results  # a sample of the run's first results


class Bench:
    """Measures cases on one device.

    Args:
        device: where.
        clock: how.
        ceilings: of the device, measured in this run.
        full: whether the bars are about these cases.

    Attributes:
        lost: the device stopped answering (e.g. after an illegal access): nothing more can be measured in this process.
    """

    def __init__(self, device: torch.device, clock: Clock, ceilings: dict[str, float], full: bool) -> None:
        self.device = device
        self.clock = clock
        self.ceilings = ceilings
        self.full = full
        self.lost = False
        self.failures = failures()

    def rows(self, case: Case) -> list[Row]:
        """Return our row and one per peer."""
        return list(self.sides(case))

    def sides(self, case: Case) -> Iterator[Row]:
        """Yield our row and one per peer, each as soon as it is measured."""
        if case.mode == GRAPH and self.device.type != "cuda":
            yield from not_measured(case, NEEDS_DEVICE, self.full)
            return
        ours = describe(case, None, self.full)
        self.clock.free()
        try:
            small = prepare(case.reduced, self.device)
            expected = reference_results(small)
            ours["error"] = self._check(our_run(small)(), expected, allowed(case, ours=True))
            setup = prepare(case, self.device)
            run, first = self._warm(our_run(setup), case)
            ours |= self._time(case, run) | self._memory(setup, run)
        except (*self.failures, WrongResultError) as error:
            ours |= self._failed(error)
            yield ours
            for peer in PEERS[case.op]:
                yield describe(case, peer, self.full) | _without(f"ours is {ours['status']}: {ours['reason']}")
            return
        yield ours
        mine = Measured(small, expected, setup, run, first)
        for peer, build in PEERS[case.op].items():
            yield self._peer(peer, build, mine)

    def _peer(self, peer: str, build: Builder, mine: Measured) -> Row:
        """Measure a peer and free all its tensors, because the inputs of all peers might not fit in memory together."""
        case = mine.setup.case
        row = describe(case, peer, self.full)
        if self.lost:
            return row | _without("the device stopped answering before")
        try:
            small = build(mine.small)
            row["error"] = self._check(small.ours(small.run()), mine.expected, allowed(case, ours=False))
            forget_tuning()
            side = build(mine.setup)
            theirs, first = self._warm(side.run, case, side.ours)
            row["difference"] = self._check(first, mine.first, allowed(case, ours=False))
            ours_s, theirs_s = self.clock.times([mine.run, theirs], launches=case.mode == EAGER)
            row |= {
                "status": MEASURED,
                "reason": None,
                "seconds": quartiles(theirs_s),
                "repeats": len(theirs_s),
                "ratio": quartiles([a / b for a, b in zip(ours_s, theirs_s, strict=False)]),
                "extra_bytes": self._extra_bytes(case, theirs),
            }
        except (*self.failures, NotMeasuredError, WrongResultError) as error:
            row |= self._failed(error)
        return row

    def _warm(self, run: Run, case: Case, ours: Callable[[Results], Results] = dict) -> tuple[Run, Results]:
        """Run a side for the first times: what to time, and a sample of its first results in our layout."""
        first = sampled(ours(run()))
        if case.mode == GRAPH:
            run = captured(run)
        for _ in range(3):
            run()
        self.clock.wait()
        return run, first

    def _check(self, results: Results, expected: Results, limit: float) -> float | None:
        """Return the largest error; None if there is nothing to compare."""
        found = error_of(results, expected)
        if found is None:
            return None
        error, where = found
        if error > limit:
            raise WrongResultError(f"{where} differs by {error:.1e} of its largest entry, at most {limit:.0e}")
        return error

    def _time(self, case: Case, run: Run) -> Row:
        (seconds,) = self.clock.times([run], launches=case.mode == EAGER)
        needed, spread = cost(case), quartiles(seconds)
        bytes_per_s, flops_per_s = needed.bytes / spread["median"], needed.flops / spread["median"]
        return {
            "status": MEASURED,
            "reason": None,
            "seconds": spread,
            "repeats": len(seconds),
            "bytes": needed.bytes,
            "flops": needed.flops,
            "bytes_per_s": bytes_per_s,
            "flops_per_s": flops_per_s,
            "fraction_of_copy": bytes_per_s / self.ceilings["copy_bytes_per_s"],
            "fraction_of_compute": flops_per_s / compute_ceiling(case, self.ceilings),
            "floor_seconds": floor_seconds(case, self.ceilings),
        }

    def _memory(self, setup: Setup, run: Run) -> Row:
        """Return the peak memory with the inputs, and the memory needed for inputs, results and states."""
        given = size_of([*setup.inputs.values(), *setup.cotangents])
        extra = self._extra_bytes(setup.case, run)
        if extra is None:
            return {"extra_bytes": None, "peak_bytes": None, "needed_bytes": None, "memory_ratio": None}
        peak, needed = given + extra, given + size_of(run().values()) + chunk_state_bytes(setup.case)
        return {"extra_bytes": extra, "peak_bytes": peak, "needed_bytes": needed, "memory_ratio": peak / needed}

    def _extra_bytes(self, case: Case, run: Run) -> int | None:
        """Return peak memory beyond the inputs; a CUDA graph has allocated its memory when it was captured."""
        return None if case.mode == GRAPH else self.clock.extra_bytes(run)

    def _failed(self, error: Exception) -> Row:
        try:
            self.clock.wait()
        except RuntimeError:
            self.lost = True
        message = str(error).strip().partition("\n")[0][:300]
        if isinstance(error, WrongResultError):
            return _without(message, REFUSED)
        if isinstance(error, NotMeasuredError):
            return _without(message)
        return _without(f"{type(error).__name__}: {message}")


def load(path: Path, about: Row) -> list[Row]:
    """Return the rows of an earlier run that are kept: those of cases that were tried on all sides.

    Raises:
        ValueError: if the file is none of ours, or its rows were measured on other hardware or with other versions.
    """
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not {"case", "peer", "status", "reason"} <= row.keys():
            raise ValueError(f"{path}:{number}: not a row of this benchmark")
        if row["reason"] in (NEEDS_DEVICE, LEFT_OUT):
            continue
        for field in ("hardware", "gpu", "driver", "versions"):
            if row.get(field) != about.get(field):
                raise ValueError(
                    f"{path}:{number}: measured with {field} {row.get(field)}, here it is {about.get(field)}; "
                    "start a new file"
                )
        rows.append(row)
    found = {(row["case"], row["peer"]) for row in rows}
    ours = {row["case"]: row["op"] for row in rows if "op" in row}
    whole = {case for case, op in ours.items() if all((case, peer) in found for peer in (None, *PEERS[op]))}
    return [row for row in rows if row["case"] in whole or "op" not in row]


def pattern(text: str) -> re.Pattern[str]:
    """Read a regular expression from a command line."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r} ({error})") from error


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_kernels.py", description="Time the kernels beside their peers.")
    parser.add_argument("--small", action="store_true", help="small sizes; always so without a CUDA device")
    parser.add_argument(
        "--only", type=pattern, default=re.compile(""), metavar="REGEX", help="cases whose name it is found in"
    )
    parser.add_argument("--minutes", type=positive, help="start no case after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file and the plots")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue this result file")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace, small: bool, finished: set[str]) -> tuple[list[Case], list[Case]]:
    """Return the cases to measure here, and those whose rows only say why they are not measured."""
    parts = (small_cases(), full_cases()) if small else (full_cases(), ())
    chosen, waiting = (
        [case for case in part if options.only.search(case.name) and case.name not in finished] for part in parts
    )
    return chosen, waiting


def main(arguments: list[str]) -> int:
    """Run the benchmark; 1 if a kernel of ours was refused in this call, or the device stopped answering."""
    begin = time.monotonic()
    options = parse_arguments(arguments)
    now = datetime.now(UTC)
    about = circumstances(now, "kernels/gpu_kernels.py", arguments, PACKAGES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = options.small or device.type == "cpu"
    path = options.resume or options.output / f"kernels-{now:%Y%m%dT%H%M%SZ}.jsonl"
    try:
        rows = load(path, about) if options.resume else []
    except (OSError, ValueError) as error:
        raise SystemExit(f"gpu_kernels.py: --resume: {error}") from error
    chosen, waiting = plan(options, small, {row["case"] for row in rows})

    clock = Clock(device, seconds=0.01, rounds=(5, 20)) if small else Clock(device, seconds=0.2, rounds=(10, 200))
    ceilings = measure_ceilings(clock, device, small)
    first = {"case": CEILINGS, "peer": None, "status": MEASURED, "reason": None, **ceilings, **about}
    rows = [first, *(row for row in rows if row["case"] != CEILINGS)]
    reason = NEEDS_DEVICE if device.type == "cpu" else LEFT_OUT
    for case in waiting:
        rows += complete(not_measured(case, reason, full=True), about)
    write_rows(rows, path)
    bench = Bench(device, clock, ceilings, full=not small)
    with tqdm(chosen, desc="kernels") as bar:
        for case in bar:
            if options.minutes is not None and time.monotonic() - begin > 60 * options.minutes:
                break
            bar.set_postfix_str(case.name)
            for row in bench.sides(case):  # a peer may compile for minutes
                rows += complete([row], about)
                write_rows(rows, path)
            if bench.lost:
                break
    print(report(rows))
    left = len({case.name for case in chosen} - {row["case"] for row in rows})
    if left:
        why = "the device stopped answering" if bench.lost else f"--minutes {options.minutes} are over"
        print(f"\n{why} with {left} cases left: --resume {path}")
    print(f"\nwrote {path}")
    if find_spec("matplotlib") is None:
        print(f"matplotlib is not installed; where it is: python benchmarks/kernels/kernel_plots.py {path}")
    else:
        from kernel_plots import main as draw

        draw([str(path)])
    tried = {case.name for case in chosen}
    refused = any(row["status"] == REFUSED and row["peer"] is None and row["case"] in tried for row in rows)
    return int(refused or bench.lost)


def complete(rows: list[Row], about: Row) -> list[Row]:
    """Return rows with the circumstances and the bars."""
    return [row | about | {"bars": judge(row)} for row in rows]
