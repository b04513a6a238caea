"""Compile every Triton kernel without a GPU, and report what it needs and how long it is predicted to take.

A row is a kernel of a case on a target: registers, spilled bytes and shared memory from the compiler; widths of
accesses, barriers and loops from the machine code; the time by the model of `resource_model.py`, a prediction and no
measurement. A row "sum" adds up a case.

    python benchmarks/kernels/resources.py
    python benchmarks/kernels/resources.py --targets 90 --triton-path FOLDER_OF_ANOTHER_TRITON
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from checkout import ROOT, use_checkout

NUMBERS = ROOT / "tests" / "kernels" / "kernel_resources.json"


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="resources.py", description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], choices=[80, 90, 100])
    parser.add_argument("--only", default="", help="regular expression that the name of a case must match")
    parser.add_argument(
        "--triton-path", type=Path, help="folder with another version of Triton, e.g. an unpacked wheel"
    )
    parser.add_argument("--output", type=Path, help="JSON lines to write; default: a new file in benchmarks/results")
    parser.add_argument("--plot", action="store_true", help="draw the predicted times beside the output")
    parser.add_argument(
        "--renew", action="store_true", help=f"take the numbers as those that {NUMBERS.name} holds for the tests"
    )
    chosen = parser.parse_args(arguments)
    if chosen.triton_path is not None and not (chosen.triton_path / "triton" / "__init__.py").is_file():
        parser.error(f"--triton-path {chosen.triton_path} must be a folder that holds the package triton")
    return chosen


def main(arguments: list[str]) -> None:
    chosen = options(arguments)
    use_checkout()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    if chosen.triton_path is not None:
        sys.path.insert(0, str(chosen.triton_path.resolve()))
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # Triton's default up to 3.9
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as cache:
        # Triton does not run ptxas for a kernel that its cache holds.
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = _rows(chosen, now, arguments)
    if not rows:
        sys.exit(f"--only {chosen.only!r} matches no case")
    from circumstances import RESULTS, write_rows
    from resource_model import report

    print(report(rows))
    output = chosen.output or RESULTS / f"kernel_resources-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, output)
    print(f"wrote {output}")
    if chosen.plot:
        from resource_plots import draw

        draw(rows, output.with_suffix(".png"))
        print(f"wrote {output.with_suffix('.png')}")
    if chosen.renew:
        from resource_guard import renew

        renew(rows, NUMBERS)
        print(f"wrote {NUMBERS}")


def _rows(chosen: argparse.Namespace, now: datetime, arguments: list[str]) -> list[dict[str, object]]:
    # After the choice of Triton, which torch imports.
    import triton
    from circumstances import circumstances
    from offline_compile import OfflineCompiler
    from resource_cases import cases
    from resource_model import DEVICES, case_rows

    about = circumstances(now, "kernels/resources.py", arguments)
    about["versions"] = {**about["versions"], "triton": triton.__version__}  # type: ignore[dict-item]
    rows: list[dict[str, object]] = []
    for target in chosen.targets:
        devices = {name: device for name, device in DEVICES.items() if device.target == target}
        compiler = OfflineCompiler(target, next(iter(devices.values())).processors)
        for case in cases():
            if re.search(chosen.only, case.name):
                print(f"sm_{target} {case.name}", flush=True)
                rows += [row | about for row in case_rows(case, target, devices, compiler.record(case.run, case.fake))]
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
