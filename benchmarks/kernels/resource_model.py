"""What a compiled kernel takes, and how long it is predicted to run.

The model: a launch takes the longest of

* issue: the warp-instructions of the multiprocessor that has most programs, at 0.28 to 0.6 instructions per cycle and
  scheduler (the range seen in kernels of this kind; 0.4 in the middle), of which a multiprocessor has four;
* memory: its arguments once, twice if changed in place, at 85 % of the rate of a copy;
* products: the FLOPs of its matrix instructions at 85 % of the rate of a large matrix product.

A case takes the sum of its launches, and at least its roofline at 85 %. Launch overhead, torch's operations between the
launches, cache misses and imbalance are not in it. Divergent code counts as if all of it ran; loops that the compiler
unrolls count as often as in the source. Nothing here is measured: expect an error of 25 % for kernels bound by memory
and more for others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
from kernel_loops import section, trips
from offline_compile import TOOLS, Launch
from resource_cases import ResourceCase
from roofline import Cost
from torch import Tensor

SCHEDULERS = 4
IPC = {"low": 0.6, "middle": 0.4, "high": 0.28}  # by the time that it predicts
REACHED = 0.85
PREDICTED = "predicted, not measured"


@dataclass(frozen=True)
class Device:
    """A GPU as the model sees it.

    Attributes:
        target: compute capability that kernels are compiled for.
        processors: multiprocessors.
        clock: cycles per second.
        copy: bytes per second that a copy reads and writes; estimated, as are the next.
        bfloat16, float32: FLOP/s of a large product, float32 without TF32.
        shared: bytes of shared memory of a multiprocessor, of which each program takes 1 KiB more than it asks for.
    """

    target: int
    processors: int
    clock: float
    copy: float
    bfloat16: float
    float32: float
    shared: int


# Numbers of multiprocessors, clocks and shared memory are the vendor's. Rates are below the vendor's peaks (A100: 2.0
# TB/s, 312 TFLOP/s; H100: 3.35, 989; H200: 4.8, 989; B200: 8.0, 2250), by what copies and products usually reach.
DEVICES = {
    "A100": Device(80, 108, 1.41e9, 1.75e12, 260e12, 19e12, 164 * 1024),
    "H100": Device(90, 132, 1.755e9, 3.0e12, 700e12, 60e12, 228 * 1024),
    "H200": Device(90, 132, 1.755e9, 4.3e12, 700e12, 60e12, 228 * 1024),
    "B200": Device(100, 148, 1.85e9, 7.0e12, 1600e12, 70e12, 228 * 1024),
}
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32  # of a multiprocessor, at most
_REGISTER_STEP = 256  # registers are given to warps in such steps


def programs_per_processor(launch: Launch, device: Device) -> int:
    """Return how many programs a multiprocessor holds at once; tensor memory of sm_100 is not looked at."""
    binary = launch.binary
    registers = math.ceil(binary.registers * 32 / _REGISTER_STEP) * _REGISTER_STEP * binary.warps
    limits = (_REGISTERS // registers, device.shared // (binary.shared + 1024), _WARPS // binary.warps, _PROGRAMS)
    return min(limits)


@dataclass
class Executed:
    """What a warp executes on average: instructions, barriers, FLOPs of matrix instructions; and the loops."""

    instructions: float
    barriers: float
    flops: float
    loops: list[dict[str, Any]]


def executed(launch: Launch, code: sass.Code) -> Executed:
    """Count what a warp executes, by the iterations of the loops."""
    result = Executed(0.0, 0.0, 0.0, [])
    outside = set(range(len(code.instructions))).difference(*(loop.instructions for loop in code.loops))
    _add(result, code, outside, 1.0)
    _add_loops(result, launch, code, code.loops, 1.0)
    return result


def _add(result: Executed, code: sass.Code, numbers: set[int] | frozenset[int], times: float) -> None:
    for number in numbers:
        one = code.instructions[number]
        result.instructions += times
        result.barriers += times * (one.kind == "BAR")
        result.flops += times * one.flops


def _add_loops(result: Executed, launch: Launch, code: sass.Code, loops: list[sass.Loop], times: float) -> None:
    waiting = [[loop] for loop in loops if loop.source is None]
    sources = dict.fromkeys(loop.source for loop in loops if loop.source is not None)
    for versions in [*waiting, *([loop for loop in loops if loop.source == source] for source in sources)]:
        # A loop of the source that appears several times is unrolled, with a rest, or has versions of which one runs.
        versions.sort(key=lambda loop: len(loop.instructions))
        loop, copies = versions[-1], max(round(len(versions[-1].instructions) / len(versions[0].instructions)), 1)
        source = loop.source
        each = 1.0 if source is None else trips(launch, source.function, source.number) / copies
        own = [code.instructions[number] for number in loop.own]
        result.loops.append(
            {
                "line": None if source is None else source.first,
                "instructions": len(own),
                "barriers": sum(one.kind == "BAR" for one in own),
                "iterations": round(each, 2),
            }
        )
        _add(result, code, loop.own, times * each)
        _add_loops(result, launch, code, loop.inner, times * each)


def moved_bytes(launch: Launch, case: ResourceCase) -> int:
    """Return the bytes of the arguments, of which expanded axes count once and tensors changed in place twice."""
    seen: dict[tuple[Any, ...], int] = {}
    part = section(launch)
    for tensor in launch.arguments.values():
        if isinstance(tensor, Tensor):
            elements = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
            size = elements * tensor.element_size() * (2 if tuple(tensor.shape) in case.changed else 1)
            whole = tensor.dim() > 2 and tensor.shape[1] in (launch.arguments.get("length"), _chunks(launch))
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape))
            seen[key] = round(size * part) if whole else size
    return sum(seen.values())


def _chunks(launch: Launch) -> int | None:
    return launch.arguments.get("chunks") if isinstance(launch.arguments.get("chunks"), int) else None


def predict(launch: Launch, work: Executed, moved: int, counted: bool, device: Device) -> dict[str, Any]:
    """Return the predicted time of a launch, what bounds it, and its share of the launch's own roofline.

    Unless the FLOPs of its matrix instructions are `counted`, there is no roofline, and the time is too short for a
    kernel that is bound by them.
    """
    busiest = math.ceil(launch.programs / device.processors)
    warps = busiest * launch.binary.warps
    # A scheduler without a warp issues nothing.
    issued = warps * work.instructions / min(SCHEDULERS, warps) / device.clock
    memory = moved / device.copy
    products = work.flops * launch.programs * launch.binary.warps / device.bfloat16
    times = {name: max(issued / ipc, memory / REACHED, products / REACHED) for name, ipc in IPC.items()}
    bounds = {"issue": issued / IPC["middle"], "memory": memory / REACHED, "products": products / REACHED}
    return {
        "seconds": times,
        "bound": max(bounds, key=lambda name: bounds[name]),
        "floor_seconds": max(memory, products) if counted else None,
        "share_of_roofline": max(memory, products) / times["middle"] if counted else None,
    }


def floor(needed: Cost, products: str, device: Device) -> float:
    """Return the time of a case on the roofline of a device."""
    return max(needed.bytes / device.copy, needed.flops / getattr(device, products))


def case_rows(
    case: ResourceCase, target: int, devices: dict[str, Device], launches: list[Launch]
) -> Iterator[dict[str, Any]]:
    """Return a row for each kernel of a case, equal launches together, and one for their sum."""
    shared = {"case": case.name, "target": f"sm_{target}", "status": PREDICTED}
    numbers = {"bytes": case.cost.bytes, "flops": case.cost.flops}
    total = {name: dict.fromkeys(IPC, 0.0) for name in devices}
    groups: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in launches:
        key = (launch.kernel, launch.binary.cubin, launch.grid, section(launch))
        groups.setdefault(key, []).append(launch)
    variants: Counter[str] = Counter()
    for group in groups.values():
        variants[group[0].kernel] += 1
        row = kernel_row(case, devices, group[0])
        for name in devices:
            for end in IPC:
                total[name][end] += len(group) * row["predicted"][name]["seconds"][end]
        name_of = {"kernel": group[0].kernel, "variant": variants[group[0].kernel], "launches": len(group)}
        yield shared | name_of | row
    predicted = {}
    for name, device in devices.items():
        least = floor(case.cost, case.products, device)
        seconds = {end: max(time, least / REACHED) for end, time in total[name].items()}
        share = least / seconds["middle"]
        predicted[name] = {"seconds": seconds, "floor_seconds": least, "share_of_roofline": share}
    yield shared | {"kernel": "sum", "launches": len(launches), **numbers, "predicted": predicted}


def kernel_row(case: ResourceCase, devices: dict[str, Device], launch: Launch) -> dict[str, Any]:
    """Return what a launch's kernel takes and is predicted to take."""
    binary = launch.binary
    code = sass.read(binary.cubin, Path(binary.source), TOOLS / "nvdisasm")
    work = executed(launch, code)
    moved = moved_bytes(launch, case)
    # Of sm_100's matrix instructions the code does not show the sizes.
    counted = not any(one.kind.startswith("UTC") and one.kind.endswith("MMA") for one in code.instructions)
    row: dict[str, Any] = {
        "grid": list(launch.grid),
        "programs": launch.programs,
        "warps": binary.warps,
        "registers": binary.registers,
        "stack_bytes": binary.stack,
        "spill_store_bytes": binary.spill_stores,
        "spill_load_bytes": binary.spill_loads,
        "shared_bytes": binary.shared,
        "instructions": len(code.instructions),
        "barriers": code.count("BAR"),
        # Bytes of a thread -> number of instructions; LDGSTS copies to shared memory.
        "loads": code.widths("LDG", "LDGSTS"),
        "stores": code.widths("STG"),
        "bulk_copies": code.count("UTMALDG", "UTMASTG", "UBLKCP"),
        "loops": work.loops,
        "executed_instructions": round(work.instructions),
        "executed_barriers": round(work.barriers),
        "instructions_per_element": work.instructions * 32 * binary.warps * launch.programs / case.elements,
        "argument_bytes": moved,
        "matrix_flops": round(work.flops * binary.warps * launch.programs) if counted else None,
        "predicted": {},
    }
    for name, device in devices.items():
        held = programs_per_processor(launch, device)
        row["predicted"][name] = {
            "programs_per_processor": held,
            "waves": round(launch.programs / (device.processors * held), 3) if held else None,
            **predict(launch, work, moved, counted, device),
        }
    return row


def report(rows: Iterable[dict[str, Any]]) -> str:
    """Return the cases as Markdown: predicted milliseconds and share of the roofline by device, and what spills."""
    sums: dict[str, dict[str, str]] = {}
    spills: dict[str, dict[str, None]] = {}
    devices: dict[str, None] = {}
    for row in rows:
        cells = sums.setdefault(row["case"], {})
        if row["kernel"] == "sum":
            for device, found in row["predicted"].items():
                devices[device] = None
                low, high = (1000 * found["seconds"][end] for end in ("low", "high"))
                cells[device] = f"{low:.3g}-{high:.3g} ({found['share_of_roofline']:.0%})"
        elif row["spill_store_bytes"]:
            spills.setdefault(row["case"], {})[f"{row['kernel']} on {row['target']}"] = None
    lines = [f"| case | {' | '.join(devices)} | spills |", f"|---|{'---:|' * len(devices)}---|"]
    for case, cells in sums.items():
        values = " | ".join(cells.get(device, "") for device in devices)
        lines.append(f"| {case} | {values} | {', '.join(spills.get(case, ()))} |")
    return "\n".join(lines)
