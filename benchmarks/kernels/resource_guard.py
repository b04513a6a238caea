"""Numbers of compiled kernels that must not get worse: taken from rows of `resources.py`, held in a file, compared.

Held for each version of Triton, target and kernel of a case: spilled bytes, accesses to global memory that move less
than 16 bytes a thread, barriers and instructions, in the code and executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Numbers = dict[str, dict[str, dict[str, dict[str, int]]]]  # version, target, kernel of a case, name of the number

TOLERANCE = 0.1
WIDE = 16
# Held exactly: an instruction more matters, however many there are.
EXACT = ("spilled_bytes",)
RENEW = "python benchmarks/kernels/resources.py --renew"


def numbers_of(row: Row) -> dict[str, int]:
    """Return the numbers of a kernel's row that are held."""
    return {
        "spilled_bytes": row["spill_store_bytes"] + row["spill_load_bytes"],
        "narrow_loads": _narrow(row["loads"]),
        "narrow_stores": _narrow(row["stores"]),
        "barriers": row["barriers"],
        "executed_barriers": row["executed_barriers"],
        "instructions": row["instructions"],
        "executed_instructions": row["executed_instructions"],
    }


def _narrow(widths: dict[Any, int]) -> int:
    return sum(number for width, number in widths.items() if int(width) < WIDE)


def collect(rows: Iterable[Row]) -> Numbers:
    """Return the numbers of all rows of kernels."""
    found: Numbers = {}
    for row in rows:
        if row["kernel"] != "sum":
            version, name = row["versions"]["triton"], f"{row['kernel']} {row['variant']} of {row['case']}"
            found.setdefault(version, {}).setdefault(row["target"], {})[name] = numbers_of(row)
    return found


def worse(found: Numbers, held: Numbers) -> list[str]:
    """Return a sentence for each number found that is worse than the one held, or not held.

    Spilled bytes must not rise at all, other numbers by no more than a tenth. A smaller number is no fault.

    Raises:
        ValueError: if no numbers are held for a version of Triton.
    """
    faults = []
    for version, targets in found.items():
        if version not in held:
            raise ValueError(f"no numbers are held for Triton {version}, only for {', '.join(held)}. Run {RENEW}.")
        for target, kernels in targets.items():
            for kernel, numbers in kernels.items():
                limits = held[version].get(target, {}).get(kernel)
                if limits is None:
                    faults.append(f"{target} {kernel}: no numbers are held. Run {RENEW}.")
                    continue
                for name, number in numbers.items():
                    limit = limits[name]
                    most = limit if name in EXACT else limit + int(limit * TOLERANCE)
                    if number > most:
                        faults.append(
                            f"{target} {kernel}: {name} is {number}, held is {limit} and allowed {most}. "
                            f"Improve the kernel, or accept the number with {RENEW}."
                        )
    return faults


def renew(rows: Iterable[Row], path: Path) -> None:
    """Write the numbers of the rows to the file; those of other versions, targets and cases are kept."""
    held: Numbers = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for version, targets in collect(rows).items():
        for target, kernels in targets.items():
            held.setdefault(version, {}).setdefault(target, {}).update(kernels)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(_text(held), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _text(held: Numbers) -> str:
    """Return JSON with a line for each kernel, so that a change shows as one."""
    versions = []
    for version, targets in sorted(held.items()):
        blocks = []
        for target, kernels in sorted(targets.items()):
            lines = [f"   {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in sorted(kernels.items())]
            blocks.append(f"  {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n  }")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(blocks) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"
