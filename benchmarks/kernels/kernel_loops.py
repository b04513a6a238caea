"""How often the loops of each Triton kernel run, and which part of a row a launch reads: from the launch's arguments.

A machine cannot read these from the code, since some bounds are loaded from memory. Counts are means over the programs
of a launch; where they depend on values, the comment says what is assumed. Loops are numbered as in the source of their
function, those that Triton unrolls (`tl.static_range`) left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offline_compile import Launch

Arguments = Mapping[str, Any]


def _up(numerator: float, denominator: float) -> int:
    return int(-(-numerator // denominator))


def _walk(a: Arguments, launch: Launch) -> tuple[float, ...]:
    earlier = 0 if a["SUMMARY"] else (a["stretches"] - 1) / 2  # stretches before that of a program
    return earlier, a["count"] / a["stretches"]


def _heads_and_tiles(a: Arguments, launch: Launch) -> tuple[float, ...]:
    return a["TOGETHER"], _up(a["WIDTH"], a["BLOCK_P"])


def _scan_backward(a: Arguments, launch: Launch) -> tuple[float, ...]:
    tokens = a["length"] / launch.grid[1]
    return a["together"], _up(tokens, a["SPAN"]), min(a["SPAN"], a["length"]) / a["CHUNK"]


def _mix(a: Arguments, launch: Launch) -> tuple[float, ...]:
    return (a["tiles_m"] - 1) / 2 * a["M"] / a["K"], a["M"] / a["K"]


def _weight_products(a: Arguments, launch: Launch) -> tuple[float, ...]:
    steps = a["tiles_c"] * ((a["tiles"] + 1) / 2 if a["TOEPLITZ"] else 1)  # a diagonal has fewer tiles further below
    return (steps / launch.grid[1],)


def _below(a: Arguments, rows: int, columns: int) -> float:
    """Return the tiles of a triangle that a program walks over, of `columns` each, for a tile of `rows`."""
    return (a["length"] + max(rows, columns)) / 2 / columns


def _seen(a: Arguments) -> float:
    """Return the columns that a query sees, as the benchmark chooses: an eighth of a row, fewer at its beginning."""
    window = max(a["columns"] // 8, 1)
    return window - window * (window - 1) / (2 * a["columns"])


def _over_columns(a: Arguments, launch: Launch) -> tuple[float, ...]:
    # The queries of a tile are spread evenly over the rows.
    distance = a["k_ptr"].shape[0] * a["columns"] / a["q_ptr"].shape[0]
    return ((_seen(a) + (a["T"] - 1) * distance) / a["S"] + 0.5,)


def _over_queries(a: Arguments, launch: Launch) -> tuple[float, ...]:
    distance = a["k_ptr"].shape[0] * a["columns"] / a["q_ptr"].shape[0]
    return a["per_group"], (_seen(a) + a["S"] - 1) / distance / a["T"] + 0.5


def _memory_step(a: Arguments, launch: Launch) -> tuple[float, ...]:
    tiles = a["number"] / launch.grid[1] / a["R"] + 0.5  # `number` counts the rows of all heads
    return tiles, tiles


def _evict(a: Arguments, launch: Launch) -> tuple[float, ...]:
    return a["chunk_size"], a["chunk_size"]  # the step that completes a chunk, all of which wins: others do nothing


def _chunks(a: Arguments, launch: Launch) -> tuple[float, ...]:
    rows = _up(a["slots"] + a["window"], a["R"])  # the slots are full
    queries = _up(a["queries"], a["BLOCK_Q"])
    return a["number"], queries, rows, rows, queries, a["CHUNK"]


def _convolution(a: Arguments, launch: Launch) -> tuple[float, ...]:
    return (_up(a["length"], a["TOGETHER"]) / a["spans"],)


_Trips = Callable[[Arguments, Launch], tuple[float, ...]]
_TRIPS: dict[str, _Trips] = {
    "ssd_triton.walk_kernel": _walk,
    "ssd_triton.output_kernel": lambda a, _: (min(a["SPAN"], a["length"]) / a["Q"],),
    "ssd_gradients_triton.target_gradients_kernel": _heads_and_tiles,
    "ssd_gradients_triton.source_gradients_kernel": _heads_and_tiles,
    "selective_scan_triton.summary_kernel": lambda a, _: (_up(a["segment"], a["CHUNK"]),),
    "selective_scan_triton.carry_kernel": lambda a, _: (_up(a["segments"], a["STEPS"]),),
    "selective_scan_triton.forward_kernel": lambda a, launch: (_up(a["length"] / launch.grid[1], a["CHUNK"]),),
    "selective_scan_triton.backward_kernel": _scan_backward,
    "causal_conv1d_triton.forward_kernel": _convolution,
    "causal_conv1d_triton.backward_kernel": _convolution,
    "mamba2_step_triton.step_kernel": lambda a, _: (a["PARTS"],),
    "rms_norm_triton._backward_kernel": lambda a, _: (_up(a["ROWS"], a["BLOCK_R"]),),
    "position_mix_triton.mix_kernel": _mix,
    "position_mix_triton.weight_products_kernel": _weight_products,
    "position_mix_triton.dense_gradient_kernel": lambda a, _: (a["shares"],),
    "position_mix_triton.toeplitz_gradient_kernel": lambda a, _: (_up(a["T"], a["R"]),),
    "position_mix_triton.share_sums_kernel": lambda a, _: (a["shares"],),
    # The newest token is the last of those that fit.
    "position_mix_triton._step_kernel": lambda a, _: (_up(min(a["S"], a["limit"]), a["R"]),),
    "position_mix_triton._sum_kernel": lambda a, _: (_up(a["limit"], a["S"]),),
    "matrix_distance_triton.distances_kernel": lambda a, _: (_below(a, a["R"], a["J"]),) * 2,
    "matrix_distance_triton.row_gradients_kernel": lambda a, _: (a["per_group"], _below(a, a["R"], a["J"])),
    "matrix_distance_triton.column_gradients_kernel": lambda a, _: (a["per_group"], _below(a, a["J"], a["R"])),
    "window_attention_triton.forward_kernel": _over_columns,
    "window_attention_triton.query_gradients_kernel": _over_columns,
    "window_attention_triton.key_gradients_kernel": _over_queries,
    "bounded_attention_triton.step_kernel": _memory_step,
    "bounded_attention_triton.evict_kernel": _evict,
    "bounded_attention_triton.chunks_kernel": _chunks,
    "bounded_attention_triton._last_position": lambda a, _: (_up(a["window"], a["R"]),),
}

# Kernels that read a part of each row: backwards that run in sections.
_SECTIONS: dict[str, Callable[[Arguments], float]] = {
    "ssd_triton.walk_kernel": lambda a: min(a["count"] * a["Q"] / a["length"], 1.0),
    "ssd_gradients_triton.target_gradients_kernel": lambda a: a["count"] / a["chunks"],
    "ssd_gradients_triton.source_gradients_kernel": lambda a: a["count"] / a["chunks"],
}


def trips(launch: Launch, function: str, number: int) -> float:
    """Return the iterations of a loop of a function that the launch's kernel is or calls.

    Raises:
        ValueError: if the loop is not in the table here.
    """
    name = f"{launch.kernel.partition('.')[0]}.{function}"
    counts = _TRIPS[name](launch.arguments, launch) if name in _TRIPS else ()
    if number >= len(counts):
        raise ValueError(f"{name}: the iterations of loop {number} are not known. Add them in kernel_loops.py.")
    return float(counts[number])


def section(launch: Launch) -> float:
    """Return the part of each row that the launch reads, 1 for most kernels."""
    part = _SECTIONS.get(launch.kernel)
    return 1.0 if part is None else part(launch.arguments)
