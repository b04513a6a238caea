"""`ssd_step` and `ssd_log_decay_step` by Triton: the state is read once and written once, in one launch.

Symbols: B batch, H heads, P head width, N state size, G groups; D skip, z gate.

A step does 5 operations on 8 bytes of state, so it lasts as long as the state takes to go to the registers and back.
A program takes some rows of P of one head, with all of N, and up to N = 128 a row stays inside a warp. Its sum then has
one order whatever the tile, so that a result does not depend on the batch it is computed in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import INTERPRETED, tl, triton
from .triton_math import narrow, softplus

# States of a program, and the number of programs from which on it is used. A warp takes 512 states, 16 for a thread:
# four loads of 16 bytes, on their way at once. Small programs are for small batches, which the large ones would not
# spread over 132 processors (H100, H200). Triton 3.9 compiles both without spilled registers, with 40 to 64 a thread
# (80 where nothing is aligned), on sm_80 and sm_90; neither is measured on a device.
_TILES = ((2048, 512), (512, 0))
_STATES_OF_A_WARP = 512


def ssd_step_triton(
    state: Tensor,
    x: Tensor,
    decay: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """One token on checked arguments, without a gradient; `state` is updated in place.

    Args:
        state: (B, H, P, N) float32 state. This and the others are of any strides: none is copied.
        x: (B, H, P) input.
        decay: (B, H) step sizes, or logarithms of the decay if there is no `A`.
        A: (H) decay rates, or None.
        B: (B, G, N) input map.
        C: (B, G, N) output map.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate.
        dt_bias: (H) added to the step sizes.
        dt_softplus: apply softplus to the step sizes.
        dt_limit: range that the step sizes are clamped to.

    Returns:
        (B, H, P) output in the dtype of `x`.
    """
    batch, heads, width, size = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_p, block_n, warps = _tile(batch * heads, width, size)
    with torch.cuda.device_of(x):
        _step_kernel[triton.cdiv(width, block_p), heads, batch](
            *(state, x, decay, A, B, C, D, z, dt_bias, y),
            *(float(limit) for limit in dt_limit),
            heads // B.shape[1],
            *state.stride(),
            *x.stride(),
            *decay.stride(),
            *_strides(A, 1),
            *B.stride(),
            *C.stride(),
            *_strides(D, 2),
            *_strides(z, 3),
            *_strides(dt_bias, 1),
            WIDTH=width,
            SIZE=size,
            SOFTPLUS=dt_softplus,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            EMULATE=INTERPRETED,
            num_warps=warps,
        )
    return y


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """As many strides: 0 for dimensions, the last ones, that the tensor is repeated along."""
    strides = () if tensor is None else tensor.stride()
    return (*strides, *[0] * (dimensions - len(strides)))


def _tile(heads: int, width: int, size: int) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_N, warps) for so many heads, those of all rows of the batch counted."""
    block_n = triton.next_power_of_2(size)
    block_p = 1
    for states, fewest in _TILES:
        block_p = min(max(states // block_n, 1), triton.next_power_of_2(width))
        if heads * triton.cdiv(width, block_p) >= fewest:
            break
    return block_p, block_n, min(max(block_p * block_n // _STATES_OF_A_WARP, 1), 8)


@triton.jit
def _step_kernel(
    state_ptr,
    x_ptr,
    decay_ptr,
    a_ptr,  # None: the decays are given
    b_ptr,
    c_ptr,
    d_ptr,  # or None, as the next two
    z_ptr,
    bias_ptr,
    y_ptr,  # contiguous
    lowest,
    highest,
    per_group,
    state_batch,
    state_head,
    state_p,
    state_n,
    x_batch,
    x_head,
    x_p,
    decay_batch,
    decay_head,
    a_head,
    b_batch,
    b_group,
    b_n,
    c_batch,
    c_group,
    c_n,
    d_head,
    d_p,
    z_batch,
    z_head,
    z_p,
    bias_head,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = head // per_group
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    inside_p, inside_n = p < WIDTH, n < SIZE
    inside = inside_p[:, None] & inside_n[None, :]
    held = state_ptr + batch * state_batch + head * state_head + p[:, None] * state_p + n[None, :] * state_n
    h = tl.load(held, mask=inside, other=0.0)
    x = tl.load(x_ptr + batch * x_batch + head * x_head + p * x_p, mask=inside_p, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + batch * b_batch + group * b_group + n * b_n, mask=inside_n, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + batch * c_batch + group * c_group + n * c_n, mask=inside_n, other=0.0).to(tl.float32)

    log_decay = tl.load(decay_ptr + batch * decay_batch + head * decay_head).to(tl.float32)
    u = x
    if a_ptr is not None:
        dt = log_decay
        if bias_ptr is not None:
            dt += tl.load(bias_ptr + head * bias_head).to(tl.float32)
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.where(dt < lowest, lowest, dt)  # keeps a NaN, unlike maximum
        dt = tl.where(dt > highest, highest, dt)
        log_decay = dt * tl.load(a_ptr + head * a_head).to(tl.float32)
        u = dt * x
    h = h * tl.exp(log_decay) + u[:, None] * b[None, :]
    tl.store(held, h, mask=inside)

    y = tl.sum(h * c[None, :], axis=1)
    if d_ptr is not None:
        y += tl.load(d_ptr + head * d_head + p * d_p, mask=inside_p, other=0.0).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * z_batch + head * z_head + p * z_p, mask=inside_p, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    place = (batch * tl.num_programs(1) + head) * WIDTH + p
    tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty, EMULATE), mask=inside_p)
