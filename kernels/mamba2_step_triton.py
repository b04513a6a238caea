"""One token of Mamba-2 in a single Triton launch: convolution, recurrence, skip and gate.

Symbols: B batch, H heads, P head width, N state size, G groups, K convolution width; a channel is one of the
H P + 2 G N that are convolved, in the order x, B, C.

A program takes rows of P of one head, which are channels of x, with all of N. It convolves these channels, and also the
maps B and C of the group, which all programs of the group need: they read the same inputs from the cache. The states of
x are read and shifted by one program. Those of B and C may only be shifted when all programs of the group have read
them. Therefore each program counts itself in, and the last one shifts them and sets the count back to zero. Which
program is the last does not change what is written, so two runs are bit-identical.

The sums and roundings are those of the separate steps (`causal_conv1d_step`, `ssd_step`): convolved values are rounded
to the dtype of the inputs, and a row of up to 128 states is summed inside a warp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import INTERPRETED, tl, triton
from .tracing import launch
from .triton_math import narrow, sigmoid, softplus

# (states of a tile, fewest programs for which it is used); a warp takes up to 1,024 states. Large tiles share the
# convolution of B and C. Not timed on a device; predicted by `benchmarks/kernels/resources.py`.
_TILES = ((4096, 128), (2048, 128), (512, 0))
_STATES_OF_A_WARP = 1024
# Fewest programs that take all rows of a head, one tile after the other, so that B and C are convolved once for a head.
_WHOLE_HEADS = 1024


@launch(
    "Tensor xBC, Tensor(a!) conv_state, Tensor(b!) state, Tensor dt, Tensor weight, Tensor? bias, Tensor A_log, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, float[] dt_limit, Tensor(c!)? arrivals",
    lambda xBC, conv_state, state, *_: xBC.new_empty(state.shape[:3]),
)
def mamba2_step_triton(
    xBC: Tensor,
    conv_state: Tensor,
    state: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float],
    arrivals: Tensor | None,
) -> Tensor:
    """Run one token on checked arguments, without a gradient, and update both states in place.

    Args:
        xBC: (B, H P + 2 G N) inputs, whose channels are neighbours in memory, as are those of `dt` and `z`.
        conv_state: (B, H P + 2 G N, K - 1) earlier inputs, contiguous like all the following tensors but `dt` and `z`.
        state: (B, H, P, N) float32 state.
        dt: (B, H) step sizes.
        weight: (H P + 2 G N, K) taps.
        bias: (H P + 2 G N) bias of the convolution.
        A_log: (H) logarithm of the negative decay rates.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate.
        dt_bias: (H) added to the step sizes.
        dt_softplus: apply softplus to the step sizes.
        dt_limit: range to which the step sizes are clamped.
        arrivals: (B, G) int32 zeros, zero again after the step; allocated if None.

    Returns:
        (B, H, P) output in the dtype of `xBC`.
    """
    batch, heads, width, size = state.shape
    groups = (xBC.shape[1] - heads * width) // (2 * size)
    y = torch.empty((batch, heads, width), dtype=xBC.dtype, device=xBC.device)
    if not batch:
        return y
    if arrivals is None:
        arrivals = torch.zeros((batch, groups), dtype=torch.int32, device=xBC.device)
    block_p, block_n, parts, warps = _tile(batch * heads, width, size)
    with torch.cuda.device_of(xBC):
        step_kernel[triton.cdiv(width, block_p * parts), heads, batch](
            *(xBC, conv_state, state, dt, weight, bias, A_log, D, z, dt_bias, y, arrivals),
            *(float(dt_limit[0]), float(dt_limit[1])),
            *(xBC.stride(0), dt.stride(0), 0 if z is None else z.stride(0)),
            HEADS=heads,
            GROUPS=groups,
            WIDTH=width,
            SIZE=size,
            TAPS=weight.shape[1],
            WINDOW=triton.next_power_of_2(weight.shape[1]),
            WIDE_SKIP=D is not None and D.dim() == 2,
            SOFTPLUS=dt_softplus,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            PARTS=parts,
            EMULATE=INTERPRETED,
            num_warps=warps,
        )
    return y


def _tile(heads: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return (BLOCK_P, BLOCK_N, tiles of a program, warps) for the number of heads of all rows of the batch."""
    block_n = triton.next_power_of_2(size)
    block_p = 1
    for states, fewest in _TILES:
        block_p = min(max(states // block_n, 1), triton.next_power_of_2(width))
        if heads * triton.cdiv(width, block_p) >= fewest:
            break
    parts = triton.cdiv(width, block_p) if heads >= _WHOLE_HEADS else 1
    return block_p, block_n, parts, min(max(block_p * block_n // _STATES_OF_A_WARP, 1), 8)


@triton.jit
def _window(x_ptr, held_ptr, channel, inside, TAPS: tl.constexpr, WINDOW: tl.constexpr):
    """Return the (channels, WINDOW) last inputs, oldest first; the last of TAPS is the token. Pointers of a row."""
    place = tl.arange(0, WINDOW)[None, :]
    offsets = channel[:, None] * (TAPS - 1) + place
    held = tl.load(held_ptr + offsets, mask=inside[:, None] & (place < TAPS - 1), other=0.0).to(tl.float32)
    token = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return tl.where(place == TAPS - 1, token[:, None], held)


@triton.jit
def _convolve(
    window, weight_ptr, bias_ptr, channel, inside, dtype: tl.constexpr, TAPS: tl.constexpr, EMULATE: tl.constexpr
):
    """Return silu of the convolution of channels, rounded to `dtype`, as float32."""
    place = tl.arange(0, window.shape[1])[None, :]
    mask = inside[:, None]
    if window.shape[1] > TAPS:
        mask = mask & (place < TAPS)
    taps = tl.load(weight_ptr + channel[:, None] * TAPS + place, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(window * taps, axis=1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    total *= sigmoid(total)
    return narrow(total, dtype, EMULATE).to(tl.float32)


@triton.jit
def _shift(window, held_ptr, channel, inside, TAPS: tl.constexpr, EMULATE: tl.constexpr):
    """Store all inputs of a window but the oldest."""
    place = tl.arange(0, window.shape[1])[None, :]
    moved = inside[:, None] & (place >= 1) & (place < TAPS)
    window = narrow(window, held_ptr.dtype.element_ty, EMULATE)
    tl.store(held_ptr + channel[:, None] * (TAPS - 1) + (place - 1), window, mask=moved)


@triton.jit
def step_kernel(
    x_ptr, held_ptr, state_ptr, dt_ptr, weight_ptr,
    bias_ptr,  # or None, like d_ptr, z_ptr and dt_bias_ptr
    a_log_ptr, d_ptr, z_ptr, dt_bias_ptr, y_ptr, arrivals_ptr,
    lowest, highest,
    x_batch, dt_batch, z_batch,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr,
    WINDOW: tl.constexpr, WIDE_SKIP: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (HEADS // GROUPS)
    n = tl.arange(0, BLOCK_N)
    inside_n = n < SIZE
    x_ptr += batch * x_batch
    held_ptr += batch * ((HEADS * WIDTH + 2 * GROUPS * SIZE) * (TAPS - 1))
    b_channel = HEADS * WIDTH + group * SIZE + n
    c_channel = b_channel + GROUPS * SIZE
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    b_window = _window(x_ptr, held_ptr, b_channel, inside_n, TAPS, WINDOW)
    b = _convolve(b_window, weight_ptr, bias_ptr, b_channel, inside_n, dtype, TAPS, EMULATE)
    c_window = _window(x_ptr, held_ptr, c_channel, inside_n, TAPS, WINDOW)
    c = _convolve(c_window, weight_ptr, bias_ptr, c_channel, inside_n, dtype, TAPS, EMULATE)

    dt = tl.load(dt_ptr + batch * dt_batch + head).to(tl.float32)
    if dt_bias_ptr is not None:
        dt += tl.load(dt_bias_ptr + head).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.where(dt < lowest, lowest, dt)  # keeps a NaN, unlike maximum
    dt = tl.where(dt > highest, highest, dt)
    decay = tl.exp(-dt * tl.exp(tl.load(a_log_ptr + head).to(tl.float32)))

    state_ptr += (batch * HEADS + head) * (WIDTH * SIZE)
    for part in range(PARTS):
        p = (tl.program_id(0) * PARTS + part) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside_p = p < WIDTH
        channel = head * WIDTH + p
        window = _window(x_ptr, held_ptr, channel, inside_p, TAPS, WINDOW)
        x = _convolve(window, weight_ptr, bias_ptr, channel, inside_p, dtype, TAPS, EMULATE)
        offsets = p[:, None] * SIZE + n[None, :]
        inside = inside_p[:, None] & inside_n[None, :]
        h = tl.load(state_ptr + offsets, mask=inside, other=0.0)
        h = h * decay + (dt * x)[:, None] * b[None, :]
        tl.store(state_ptr + offsets, h, mask=inside)
        y = tl.sum(h * c[None, :], axis=1)
        if d_ptr is not None:
            if WIDE_SKIP:
                y += tl.load(d_ptr + channel, mask=inside_p, other=0.0).to(tl.float32) * x
            else:
                y += tl.load(d_ptr + head).to(tl.float32) * x
        if z_ptr is not None:
            z = tl.load(z_ptr + batch * z_batch + channel, mask=inside_p, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
        y = narrow(y, y_ptr.dtype.element_ty, EMULATE)
        tl.store(y_ptr + batch * (HEADS * WIDTH) + channel, y, mask=inside_p)
        # Each entry moves to the place of its neighbour, which another thread may not have read yet.
        tl.debug_barrier()
        _shift(window, held_ptr, channel, inside_p, TAPS, EMULATE)

    # The barrier and the release order what this program has read before its count.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + batch * GROUPS + group, 1, sem="acq_rel")
    if arrived == (HEADS // GROUPS) * tl.num_programs(0) - 1:
        b_old = _window(x_ptr, held_ptr, b_channel, inside_n, TAPS, WINDOW)
        c_old = _window(x_ptr, held_ptr, c_channel, inside_n, TAPS, WINDOW)
        tl.debug_barrier()
        _shift(b_old, held_ptr, b_channel, inside_n, TAPS, EMULATE)
        _shift(c_old, held_ptr, c_channel, inside_n, TAPS, EMULATE)
        tl.store(arrivals_ptr + batch * GROUPS + group, 0)
