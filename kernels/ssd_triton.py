"""Triton kernels of the SSD recurrence: what :mod:`.ssd` runs on CUDA tensors.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, Q chunk length, c chunks. With
a_t the log-decay, s_t the scale of the input (the step size; 1 if there is none) and, inside a chunk, S_i the
inclusive sum of its a_t, T the sum over the chunk and h the state entering it,

    M_ij = (C_i . B_j) exp(S_i - S_j) s_j  for j <= i,
    y_i  = sum_j M_ij x_j + exp(S_i) h C_i,          h' = exp(T) h + sum_j exp(T - S_j) s_j x_j (x) B_j.

Forward, two launches: one walks the chunks with the state in registers and stores the state entering each, the other
computes all chunks' outputs at once. Backward, two again: the same walk from the end, over (dy, exp(S) C) in place of
(x, exp(T - S) s B), gives the gradient of the state leaving each chunk; then one kernel per chunk recomputes M. No
(Q, Q) matrix and no decay sum ever goes to memory. Everything is summed in a fixed order: no atomics.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, triton
from .ssd_triton_kernels import chunk_gradients_kernel, output_kernel, walk_kernel


def ssd_scan_triton(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(log_decay_t) h_{t-1} + scale_t x_t (x) B_t`, `y_t = h_t C_t`, differentiable.

    Documents and padding are already in the arguments: log-decays of -inf and of 0, zeros in x, B and C.

    Args:
        x: (B, L, H, P) inputs, L >= 1, not float64.
        scale: (B, L, H) float32 factors of the inputs, or None for one.
        log_decay: (B, L, H) float32, in [-inf, 0].
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        initial_state: (B, H, P, N) state before the first token; zero if not given.
        chunk_size: wish for the chunk length, made a power of two between 16 and what fits (:func:`_tiles`).

    Returns:
        (B, L, H, P) outputs and the (B, H, P, N) final state, both in float32.
    """
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)
    if not x.dtype == B.dtype == C.dtype:  # a dot product takes two operands of one dtype
        x, B, C = x.float(), B.float(), C.float()
    return _Scan.apply(x, scale, log_decay, B, C, initial_state.float(), chunk_size)


class _Scan(torch.autograd.Function):
    """Saves the inputs and the states entering the chunks; decays, scores and M are recomputed.

    With g the gradient of the state leaving a chunk and dM_ij = (dy_i . x_j) exp(S_i - S_j) s_j:
    dC_i = sum_j dM_ij B_j + exp(S_i) h^T dy_i, dB_j = sum_i dM_ij C_i + exp(T - S_j) s_j g^T x_j, and
    d(s x)_j = sum_i (M_ij / s_j) dy_i + exp(T - S_j) g B_j.

    d(log_decay)_k is the sum of all that passes from before k to k or later: dM_ij (C_i . B_j) for j < k <= i, what
    the tokens from k on read from h, what those before k leave in h', and exp(T) h . g. The shorter identity
    d(log_decay) = reverse cumulative sum of (y . dy - u . du) is not used: there, everything that does not pass k is
    added and subtracted again, so that its rounding swamps the gradient of a strong decay.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        initial_state: Tensor,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        x, B, C = _unit_stride(x), _unit_stride(B), _unit_stride(C)
        log_decay = log_decay.contiguous()
        scale = None if scale is None else scale.contiguous()
        with torch.cuda.device_of(x):
            states, final_state = _walk(x, scale, log_decay, B, initial_state, chunk_size, reverse=False)
            y = _output(x, scale, log_decay, B, C, states, chunk_size)
        ctx.save_for_backward(x, scale, log_decay, B, C, states)
        ctx.chunk_size = chunk_size
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, log_decay, B, C, states = ctx.saved_tensors
        dy = _unit_stride(dy)
        with torch.cuda.device_of(x):
            dstates, dinitial_state = _walk(dy, None, log_decay, C, dfinal_state, ctx.chunk_size, reverse=True)
            gradients = _chunk_gradients(x, scale, log_decay, B, C, states, dy, dstates, ctx.chunk_size)
        return *gradients, dinitial_state, None


def _unit_stride(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is dense; views of a wider projection stay as they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tiles(width: int, size: int, dtype: torch.dtype, chunk_size: int | None) -> tuple[int, int, int]:
    """The tile sizes (Q, BLOCK_P, BLOCK_N): powers of two of at least 16, as tl.dot takes them.

    The whole state size is one tile. A chunk's B and C stand in shared memory together with two (BLOCK_P, BLOCK_N)
    states, and their gradients in registers, so Q and BLOCK_P shrink as a row of N grows. Q = 64 balances the work
    inside chunks (grows with Q) and on states (with P N / Q) at the usual P = 64, N = 64 to 128 in 16 bits. float32
    has no tensor cores at full precision and twice the bytes. Chosen by the compiler's register and shared memory
    counts for compute capability 9.0, not by timings.
    """
    block_n = max(16, triton.next_power_of_2(size))
    half = dtype.itemsize == 2
    if half and block_n <= 128:
        largest, block_p = 64, 64
    elif block_n <= (256 if half else 128):
        largest, block_p = 32, 32
    else:
        largest, block_p = 16, 16
    chunk = largest if chunk_size is None else min(largest, max(16, triton.next_power_of_2(chunk_size)))
    return chunk, min(block_p, max(16, triton.next_power_of_2(width))), block_n


def _walk(
    value: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    key: Tensor,
    start: Tensor,
    chunk_size: int | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States entering the chunks (leaving them, if reverse): (B, c, H, P, N) in the dtype of `key`, and the last."""
    batch, length, heads, width = value.shape
    groups, size = key.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, key.dtype, chunk_size)
    # Smaller state tiles than elsewhere: this launch has only B H (P / BLOCK_P) programs to fill the device with.
    block_p = min(block_p, 32)
    chunks = triton.cdiv(length, chunk)
    states = key.new_empty(batch, chunks, heads, width, size)
    end = key.new_empty(batch, heads, width, size, dtype=torch.float32)
    walk_kernel[(triton.cdiv(width, block_p), heads, batch)](
        value,
        key,
        log_decay,
        log_decay if scale is None else scale,
        start.contiguous(),
        states,
        end,
        length,
        chunks,
        heads,
        heads // groups,
        *value.stride()[:3],
        *key.stride()[:3],
        WIDTH=width,
        SIZE=size,
        REVERSE=reverse,
        HAS_SCALE=scale is not None,
        SPLIT=key.dtype != torch.float32,
        Q=chunk,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        EMULATE=INTERPRETED,
        num_warps=4,
        num_stages=2,
    )
    return states, end


def _output(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    chunk_size: int | None,
) -> Tensor:
    """The (B, L, H, P) outputs, every chunk from the state entering it."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, x.dtype, chunk_size)
    chunks = triton.cdiv(length, chunk)
    y = x.new_empty(x.shape, dtype=torch.float32)
    output_kernel[(batch * chunks * heads,)](
        x,
        log_decay,
        log_decay if scale is None else scale,
        B,
        C,
        states,
        y,
        length,
        chunks,
        heads,
        heads // groups,
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        WIDTH=width,
        SIZE=size,
        HAS_SCALE=scale is not None,
        Q=chunk,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        EMULATE=INTERPRETED,
        num_warps=4 if x.dtype != torch.float32 else 8,
        num_stages=1,
    )
    return y


def _chunk_gradients(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    dy: Tensor,
    dstates: Tensor,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The gradients of x, scale, log_decay, B and C."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, x.dtype, chunk_size)
    chunks = triton.cdiv(length, chunk)
    # dB and dC take the registers that wider tiles would need.
    block_p = min(block_p, 32 if block_n <= 128 else 16)
    # A program adds up dB and dC over some heads of a group, which saves that many recomputations of C B^T and as
    # much memory for partial sums; four leave enough programs to fill a device with.
    together = math.gcd(heads // groups, 4)
    dx = x.new_empty(x.shape)
    dscale = None if scale is None else torch.empty_like(scale)
    dlog_decay = torch.empty_like(log_decay)
    dB = x.new_empty(batch, length, heads // together, size, dtype=torch.float32)
    dC = torch.empty_like(dB)
    chunk_gradients_kernel[(batch * chunks * (heads // together),)](
        x,
        log_decay,
        log_decay if scale is None else scale,
        B,
        C,
        states,
        dy,
        dstates,
        dx,
        dlog_decay,
        dlog_decay if dscale is None else dscale,
        dB,
        dC,
        length,
        chunks,
        heads,
        heads // groups,
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *dy.stride()[:3],
        TOGETHER=together,
        WIDTH=width,
        SIZE=size,
        HAS_SCALE=scale is not None,
        Q=chunk,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        EMULATE=INTERPRETED,
        num_warps=8,
        num_stages=1,
    )
    dB, dC = dB.unflatten(2, (groups, -1)).sum(3), dC.unflatten(2, (groups, -1)).sum(3)
    return dx, dscale, dlog_decay, dB.to(B.dtype), dC.to(C.dtype)
