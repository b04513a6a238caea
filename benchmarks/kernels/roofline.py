"""Rooflines: bytes and FLOPs of an op, counted from its shape, and the measured ceilings of the device.

Counted is what no implementation avoids: inputs read once, outputs written once, for a backward the inputs and the
outputs' gradients read once more and the inputs' gradients written. States between chunks, sums of decays and the like
are not counted: a kernel that writes them is so much further from its floor. Symbols as in `kernel_cases.py`; a token
is a position of a row.

FLOPs: a multiply-add is two; exp, softplus and silu are not counted but for Mamba-1's decay, of which there is one per
state. A backward is counted as twice its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_cases import TAPS, TRAINING, Case, Sizes, window_of
from kernel_timing import Clock, Run
from torch import Tensor

# Chunk length that SSD is counted with: a longer one computes more inside chunks, a shorter one more states.
CHUNK = 64
# Tokens between the states that a selective scan keeps for its backward.
SPAN = 32
FLOAT32 = 4
# Ops most of whose arithmetic is matrix products in the dtype of their inputs.
PRODUCTS = ("ssd", "window_attention", "masked_mix", "toeplitz_mix", "mamba2_mixer", "mamba1_mixer")


@dataclass(frozen=True)
class Cost:
    """Minimal cost of a case: bytes between memory and processor, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of an op's inputs and outputs, and FLOPs of its forward."""

    inputs: int
    outputs: int
    flops: int


def ssd_traffic(s: Sizes, e: int) -> Traffic:
    tokens, H, P, N, G = s["B"] * s["L"], s["H"], s["P"], s["N"], s["G"]
    chunk = min(CHUNK, s["L"])
    inputs = tokens * (H * P + H + 2 * G * N) * e + 3 * H * FLOAT32  # x, dt, B, C; A, D, dt_bias
    # Scores C B^T and their product with x below the diagonal; the state's update and reading; the skip.
    flops = tokens * (G * chunk * N + H * (chunk * P + 4 * P * N + 2 * P))
    return Traffic(inputs, tokens * H * P * e, flops)


def selective_scan_traffic(s: Sizes, e: int) -> Traffic:
    tokens, D, N = s["B"] * s["L"], s["D"], s["N"]
    inputs = tokens * (3 * D + 2 * N) * e + (D * N + 2 * D) * FLOAT32  # x, dt, z, B, C; A, D, dt_bias
    # Per state: dt A, exp, h a + u B (3), C h summed (2); per channel: dt x, D x added (2), the gate.
    return Traffic(inputs, tokens * D * e, tokens * D * (7 * N + 4))


def convolution_traffic(s: Sizes, e: int) -> Traffic:
    elements = s["B"] * s["L"] * s["D"]
    return Traffic((elements + s["D"] * (s["K"] + 1)) * e, elements * e, 2 * s["K"] * elements)


def norm_traffic(wide: int, outputs: int, per_element: int) -> Callable[[Sizes, int], Traffic]:
    """Return traffic of a norm that reads `wide` tensors as large as x, and writes `outputs`."""

    def count(s: Sizes, e: int) -> Traffic:
        elements = s["B"] * s["L"] * s["D"]
        return Traffic((wide * elements + s["D"]) * e, outputs * elements * e, per_element * elements)

    return count


def attention_traffic(s: Sizes, e: int) -> Traffic:
    queries, keys = s["M"] * s["H"] * s["P"] * e, s["B"] * s["L"] * s["G"] * s["P"] * e
    window = window_of(s["L"])
    seen = window - window * (window - 1) / (2 * s["L"])  # fewer at the beginning of a row
    return Traffic(queries + 2 * keys, queries, round(4 * s["M"] * s["H"] * s["P"] * seen))


def mixing_traffic(weights: Callable[[int], int]) -> Callable[[Sizes, int], Traffic]:
    """Return the traffic of mixing, given the number of weights per head and length, and of visible token pairs."""

    def count(s: Sizes, e: int) -> Traffic:
        L, heads = s["L"], s["H"]
        elements = s["B"] * L * heads * s["P"]
        return Traffic((elements + heads * (weights(L) + L)) * e, elements * e, elements * (L + 1) + elements)

    return count


def decode_traffic(s: Sizes, e: int) -> Traffic:
    B, H, P, N, G = (s[symbol] for symbol in "BHPNG")
    channels = H * P + 2 * G * N
    states = B * H * P * N * FLOAT32 + B * channels * (TAPS - 1) * e
    parameters = channels * (TAPS + 1) * e + 3 * H * FLOAT32
    flops = B * (2 * TAPS * channels + H * (5 * P * N + 3 * P))
    return Traffic(states + parameters + B * (channels + H) * e, states + B * H * P * e, flops)


def mamba2_traffic(s: Sizes, e: int) -> Traffic:
    """Return the cost of projections, convolution, SSD and gated norm; nothing between them needs to be written."""
    tokens, D, inner = s["B"] * s["L"], s["D"], 2 * s["D"]
    P, N = 64 if D >= 128 else 16, 128
    H, channels = inner // P, inner + 2 * N
    weights = D * (inner + channels + H) + channels * (TAPS + 1) + inner + inner * D
    ssd = ssd_traffic({"B": s["B"], "L": s["L"], "H": H, "P": P, "N": N, "G": 1}, e)
    matrices = D * (inner + channels + H) + inner * D
    flops = 2 * tokens * (matrices + TAPS * channels) + ssd.flops + 6 * tokens * inner
    return Traffic(tokens * D * e + weights * e + 3 * H * FLOAT32, tokens * D * e, flops)


def mamba1_traffic(s: Sizes, e: int) -> Traffic:
    tokens, D, inner, N = s["B"] * s["L"], s["D"], 2 * s["D"], 16
    rank = -(-D // 16)
    matrices = 2 * D * inner + inner * (rank + 2 * N) + rank * inner + inner * D
    weights = matrices + inner * (TAPS + 1) + inner
    scan = selective_scan_traffic({"B": s["B"], "L": s["L"], "D": inner, "N": N}, e)
    flops = 2 * tokens * (matrices + TAPS * inner) + scan.flops
    return Traffic(tokens * D * e + weights * e + (inner * N + inner) * FLOAT32, tokens * D * e, flops)


TRAFFIC: dict[str, Callable[[Sizes, int], Traffic]] = {
    "ssd": ssd_traffic,
    "selective_scan": selective_scan_traffic,
    "causal_conv1d": convolution_traffic,
    "rms_norm": norm_traffic(wide=1, outputs=1, per_element=4),
    "rms_norm_gated": norm_traffic(wide=2, outputs=1, per_element=5),
    "add_rms_norm": norm_traffic(wide=2, outputs=2, per_element=5),
    "window_attention": attention_traffic,
    "masked_mix": mixing_traffic(lambda L: L * (L + 1) // 2),
    "toeplitz_mix": mixing_traffic(lambda L: L),  # FLOPs of the sum, although transforms need fewer
    "decode": decode_traffic,
    "mamba2_mixer": mamba2_traffic,
    "mamba1_mixer": mamba1_traffic,
}


def cost(case: Case) -> Cost:
    """Return the minimal cost of a case."""
    element = case.dtype.itemsize
    traffic = TRAFFIC[case.op](case.sizes, element)
    once = traffic.inputs + traffic.outputs
    if case.mode != TRAINING:
        return Cost(once, traffic.flops)
    backward = traffic.inputs + traffic.outputs + traffic.inputs
    if case.op == "add_rms_norm":
        # Its backward needs the sum, which is an output, and not the two summands, whose gradients are one tensor.
        backward = 2 * traffic.outputs
    return Cost(once + backward, 3 * traffic.flops)


def chunk_state_bytes(case: Case) -> int:
    """Return bytes of the states between chunks, and in a backward their gradients where those are stored too.

    Memory that is no output and yet belongs to a recurrence computed in chunks. SSD keeps a state a chunk in the
    dtype of its inputs; a selective scan keeps one in float32 for its backward only.
    """
    s = case.sizes
    if case.op == "ssd":
        states = s["B"] * -(-s["L"] // CHUNK) * s["H"] * s["P"] * s["N"] * case.dtype.itemsize
        return 2 * states if case.mode == TRAINING else states
    if case.op == "selective_scan" and case.mode == TRAINING:
        return s["B"] * -(-s["L"] // SPAN) * s["D"] * s["N"] * FLOAT32
    return 0


def measure_ceilings(clock: Clock, device: torch.device, small: bool) -> dict[str, float]:
    """Measure what the device can do at best, as medians.

    Returns:
        "copy_bytes_per_s": bytes read plus bytes written by a copy that no cache holds; "bfloat16_flops_per_s" and
        "float32_flops_per_s": of a square matrix product, the second without TF32.
    """
    elements, side = (2**22, 256) if small else (2**29, 8192)
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    seconds = clock.median(_into(torch.empty_like(source), source))
    ceilings = {"copy_bytes_per_s": 2 * elements * source.element_size() / seconds}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, dtype=dtype, device=device)
        name = f"{str(dtype).removeprefix('torch.')}_flops_per_s"
        ceilings[name] = 2 * side**3 / clock.median(_product(a))
    return ceilings


def _into(target: Tensor, source: Tensor) -> Run:
    return lambda: {"copy": target.copy_(source)}


def _product(a: Tensor) -> Run:
    return lambda: {"product": a @ a}


def compute_ceiling(case: Case, ceilings: dict[str, float]) -> float:
    """Return FLOP/s that the case's arithmetic could reach: matrix products in its dtype, all else in float32."""
    dtype = str(case.dtype).removeprefix("torch.") if case.op in PRODUCTS else "float32"
    return ceilings[f"{dtype}_flops_per_s"]


def floor_seconds(case: Case, ceilings: dict[str, float]) -> float:
    """Return the time on the roofline: that of bytes or FLOPs at the measured ceilings, whichever is longer."""
    needed = cost(case)
    return max(needed.bytes / ceilings["copy_bytes_per_s"], needed.flops / compute_ceiling(case, ceilings))
