"""Cases that the kernels are compiled for: the sizes of the bars, and other sizes for the kernels without a bar.

Symbols as in `kernel_cases.py`; KV key-value heads, S slots and W window of a bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from kernel_cases import GRAPH, HEADLINE, MIXED_TOKENS, SELECTIVE, TAPS, TRAINING, Case, our_run, prepare, split_maps
from roofline import FLOAT32, Cost, cost
from torch import Tensor

from ssm_zoo.kernels.bounded_attention import BoundedMemory, bounded_attention, bounded_attention_step
from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssm_zoo.kernels.matrix_distance import SSDFactors, row_distances
from ssm_zoo.kernels.position_mix import masked_mix_step, toeplitz_mix_step
from ssm_zoo.kernels.ssd import ssd_log_decay, ssd_step

BF16, CPU = torch.bfloat16, torch.device("cpu")
# A layer of SmolLM2-135M with 304 slots, 4 sinks and a window of 32, the sizes of `bounded_step.py`.
MEMORY: dict[str, Any] = {"window": 32, "sinks": 4, "chunk_size": 16}
SLOTS = 304


@dataclass(frozen=True)
class ResourceCase:
    """A case to compile.

    Attributes:
        name: as in results, with the sizes.
        run: makes tensors and runs the op, and its backward if it is trained.
        cost: bytes and FLOPs that no implementation avoids.
        elements: elements of the op's first input, or of its state if it decodes.
        products: dtype whose matrix products are the ceiling of the FLOPs, or "float32".
        changed: shapes of the tensors that are changed in place, so read and written.
        fake: whether fake tensors suffice (:meth:`OfflineCompiler.record`).
    """

    name: str
    run: Callable[[], Any]
    cost: Cost
    elements: int
    products: str = "bfloat16"
    changed: tuple[tuple[int, ...], ...] = ()
    fake: bool = True


def cases() -> Iterator[ResourceCase]:
    """Return all cases; every kernel is launched by at least one."""
    yield _benchmark("ssd", TRAINING, HEADLINE)
    for length in (HEADLINE["L"], 512, 256):
        yield _benchmark("ssd", "forward", {**HEADLINE, "L": length})
    for width in (64, 128):  # of discrete Mamba-2 and of retention, from a transformer with 32 heads of 64
        yield _row_sums({"B": 4, "L": 2048, "H": 32, "P": width, "N": 64, "G": 32})
    yield _benchmark("selective_scan", TRAINING, {"B": 1, "L": 2048, "D": 1024, "N": 16})
    wide = {"B": 8, "L": 2048}
    yield _benchmark("causal_conv1d", TRAINING, {**wide, "D": 4352, "K": TAPS})
    yield _last_inputs({**wide, "D": 4352})
    for op in ("rms_norm", "rms_norm_gated", "add_rms_norm"):
        yield _benchmark(op, TRAINING, {**wide, "D": 4096})
    for batch in (1, 128):
        sizes = {"B": batch, "H": 64, "P": 64, "N": 128, "G": 1}
        yield _benchmark("decode", GRAPH, sizes)
        yield _separate_steps(sizes)
    yield _benchmark("window_attention", TRAINING, SELECTIVE)
    for op in ("masked_mix", "toeplitz_mix"):
        for length, heads, width in ((1024, 1, 1024), (1024, 16, 64), (4096, 1, 1024)):
            yield _benchmark(op, TRAINING, {"B": MIXED_TOKENS // length, "L": length, "H": heads, "P": width})
        yield _mix_step(op, 64, 1024, 1024)
    yield _distances(1, 2048, 32, 64)
    yield _prompt(1, 8192, 9, 3, 64)
    yield _memory_step(128, 9, 3, 64)


def _benchmark(op: str, mode: str, sizes: dict[str, int]) -> ResourceCase:
    case = Case(op, mode, sizes, BF16)
    products = "bfloat16" if op in ("ssd", "window_attention", "masked_mix", "toeplitz_mix") else "float32"
    if op == "decode":
        B, H, P, N = (sizes[symbol] for symbol in "BHPN")
        channels = H * P + 2 * sizes["G"] * N
        state = (B, H, P, N)
        changed = (state, (B, channels, TAPS - 1))
        elements = B * H * P * N
    else:
        changed, elements = (), sizes["B"] * sizes["L"] * (sizes.get("D") or sizes["H"] * sizes["P"])
        if op == "window_attention":
            elements = sizes["M"] * sizes["H"] * sizes["P"]
    return ResourceCase(case.name, lambda: our_run(prepare(case, CPU))(), cost(case), elements, products, changed)


def _row_sums(sizes: dict[str, int]) -> ResourceCase:
    """Return the scan of a mixer that divides each output by its row sum, with a group of maps for each head."""
    batch, length, heads, width, size, _ = sizes.values()

    def run() -> None:
        x, B, C = (_wide(batch, length, heads, n).requires_grad_() for n in (width, size, size))
        log_decay = torch.empty(batch, length, heads).requires_grad_()
        y, sums, _ = ssd_log_decay(x, log_decay, B, C, return_final_state=True, row_sums=True)
        torch.autograd.grad([y, sums], [x, log_decay, B, C], [torch.empty_like(y), torch.empty_like(sums)])

    same = Case("ssd", TRAINING, sizes, BF16)
    numbers = batch * length * heads
    # Row sums and their gradients in float32, and log-decays in float32 instead of step sizes in 16 bits: forward and
    # backward read them, and the backward writes their gradients.
    needed = Cost(cost(same).bytes + numbers * (2 * FLOAT32 + 3 * (FLOAT32 - BF16.itemsize)), cost(same).flops)
    name = same.name.replace("ssd", "ssd_log_decay with row sums")
    return ResourceCase(name, run, needed, batch * length * heads * width)


def _separate_steps(sizes: dict[str, int]) -> ResourceCase:
    """Return the token of the case "decode" in two launches."""
    whole = _benchmark("decode", GRAPH, sizes)

    def run() -> None:
        two_steps(prepare(Case("decode", GRAPH, sizes, BF16), CPU).inputs)

    return replace(whole, name=whole.name.replace("decode graph", "decode in two steps"), run=run)


def two_steps(p: dict[str, Tensor]) -> Tensor:
    """Run the inputs of the case "decode" by the separate steps; `A_log` stands for the decay rates of this size."""
    xBC = causal_conv1d_step(p["xBC"], p["conv_state"], p["weight"], p["bias"], activation="silu")
    x, B, C = split_maps(xBC, p["state"])
    return ssd_step(p["state"], x, p["dt"], p["A_log"], B, C, D=p["D"], dt_bias=p["dt_bias"], dt_softplus=True)


def _wide(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=BF16)


def _bytes(elements: int) -> int:
    return elements * BF16.itemsize


def _last_inputs(s: dict[str, int]) -> ResourceCase:
    """Return the convolution of a prompt, with the inputs that a step goes on from."""
    elements, state = s["B"] * s["L"] * s["D"], s["B"] * s["D"] * (TAPS - 1)

    def run() -> None:
        x, weight, bias = _wide(s["B"], s["L"], s["D"]), _wide(s["D"], TAPS), _wide(s["D"])
        causal_conv1d(x, weight, bias, activation="silu", return_final_state=True)

    needed = Cost(_bytes(2 * elements + state + s["D"] * (TAPS + 1)), 2 * TAPS * elements)
    name = f"causal_conv1d forward with final state B{s['B']} L{s['L']} D{s['D']} K{TAPS} bfloat16"
    return ResourceCase(name, run, needed, elements, "float32")


def _mix_step(op: str, batch: int, places: int, width: int) -> ResourceCase:
    step, dimensions = (masked_mix_step, 2) if op == "masked_mix" else (toeplitz_mix_step, 1)

    def run() -> None:
        weight, bias = _wide(1, *[places] * dimensions), _wide(1, places)
        step(_wide(batch, places, 1, width), weight, bias, torch.empty(batch, dtype=torch.long))

    elements = batch * places * width
    needed = Cost(_bytes(elements + batch * width + batch * places), 2 * elements)
    name = f"{op}_step B{batch} L{places} H1 P{width} bfloat16, the last token"
    return ResourceCase(name, run, needed, elements, "float32")


def _distances(batch: int, length: int, heads: int, width: int) -> ResourceCase:
    """Return matrix orientation with a normalised student, as many states as channels, and a group for each head."""

    def run() -> None:
        B, C, queries, keys = (_wide(batch, length, heads, width).requires_grad_() for _ in range(4))
        log_decay, scale = (torch.empty(batch, length, heads).requires_grad_() for _ in range(2))
        factors = SSDFactors(log_decay, B, C, scale, torch.empty(heads).requires_grad_(), 1e-6)
        errors = row_distances(factors, queries, keys, 0.125).errors
        torch.autograd.grad(errors, [log_decay, B, C, scale], torch.empty_like(errors))

    elements = batch * length * heads * width
    numbers = batch * length * heads * FLOAT32
    # Forward and backward each read four matrices, of which the backward writes two gradients. A product of a triangle
    # takes L^2 P: the scores and C B^T in either direction, and the gradients of B and C.
    needed = Cost(_bytes(10 * elements) + 8 * numbers, 6 * batch * heads * length * length * width)
    name = f"row_distances forward+backward B{batch} L{length} H{heads} G{heads} N{width} P{width} bfloat16"
    return ResourceCase(name, run, needed, elements)


def _prompt(batch: int, length: int, heads: int, groups: int, width: int) -> ResourceCase:
    options = MEMORY | {"slots": [SLOTS] * groups}

    def run() -> None:
        q, k, v = (torch.zeros(batch, length, number, width, dtype=BF16) for number in (heads, groups, groups))
        bounded_attention(q, k, v, **options)

    elements = batch * length * heads * width
    # Scores, their product with values, and the scores again, which the slots are chosen by.
    flops = 6 * elements * (SLOTS + MEMORY["sinks"] + MEMORY["window"])
    needed = Cost(_bytes(2 * elements + 2 * batch * length * groups * width), flops)
    name = f"bounded_attention forward B{batch} L{length} H{heads} KV{groups} P{width} S{SLOTS} W32 bfloat16"
    return ResourceCase(name, run, needed, elements, "float32", fake=False)


def _memory_step(batch: int, heads: int, groups: int, width: int) -> ResourceCase:
    rows = groups * (SLOTS + MEMORY["sinks"] + MEMORY["window"])

    def run() -> None:
        numbers = torch.zeros(batch, rows), torch.zeros(batch, rows, dtype=torch.long)
        past = torch.zeros(batch, rows, width, dtype=BF16)
        memory = BoundedMemory(past, past, *numbers).quantised()
        tokens = (torch.zeros(batch, number, width, dtype=BF16) for number in (heads, groups, groups))
        bounded_attention_step(*tokens, memory, slots=[SLOTS] * groups, **MEMORY)

    elements = batch * rows * width
    # Rows of 8 bits with a scale of 2 bytes, scores of 4 bytes that are read and written, positions of 8.
    held = 2 * batch * rows * (width + 2) + batch * rows * (2 * FLOAT32 + 8)
    needed = Cost(held + _bytes(2 * batch * heads * width), 6 * batch * rows * heads // groups * width)
    name = f"bounded_attention_step B{batch} H{heads} KV{groups} P{width} S{SLOTS} W32 int8"
    return ResourceCase(name, run, needed, elements, "float32", ((batch, rows),), fake=False)
