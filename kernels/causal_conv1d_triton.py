"""`causal_conv1d` and `causal_conv1d_step` in Triton: tables for packed rows, launches, gradients and kernels.

Symbols: B batch, L length, D channels, K convolution width; s_t the sum before the activation, ds its gradient.

The source of a tap is an integer: the position of a token in the row, or -1 ... -(K-1) for an entry of the initial
state (-1 is the newest), or -K for zero. Without documents, tap j of token t has the source t - j. For packed and
padded rows a (B, L+1, K) int32 table holds the sources; it is small compared with x, and one kernel serves both cases.

If a pointer is None, its part of a kernel is removed at compile time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import tl, triton
from .triton_math import sigmoid, strides

# The backward kernel evaluates K sums of K taps per token, unrolled: 16 tiles for K = 4, 49 for K = 7.
WIDTHS = (2, 3, 4)

# (tokens, channels, warps) per program. The K taps of a tile overlap and come from the L1 cache. The backward holds
# about ten float32 tiles at once: with 8 elements of each per thread it compiles without spilled registers for K = 4
# with documents and an initial state, with 16 it does not (Triton 3.9, sm_80 and sm_90). With 64 tokens, the partial
# sums of dweight cause a sixth of the traffic of a bfloat16 x.
_FORWARD_TILE = (32, 64, 4)
_BACKWARD_TILE = (64, 32, 8)
# (channels, warps) of programs that hold one K-wide window per channel.
_WINDOW_TILE = (128, 4)


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run `causal_conv1d` on checked arguments; returns outputs and final state (None unless requested)."""
    y, state = _CausalConv1d.apply(  # pyright: ignore[reportGeneralTypeIssues]
        x, weight, bias, initial_state, seq_idx, activation == "silu", return_final_state
    )
    return y, state


def causal_conv1d_step_triton(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Run `causal_conv1d_step` in one launch, without a gradient; a CUDA graph can capture it."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, channels = x.shape
    block, warps = _WINDOW_TILE
    with torch.cuda.device_of(x):
        step_kernel[(batch, triton.cdiv(channels, block))](
            *(x, state, weight, bias, y, channels),
            *(*x.stride(), *state.stride(), *weight.stride(), *strides(1, bias)),
            WIDTH=weight.shape[1],
            WINDOW=triton.next_power_of_2(weight.shape[1]),
            SILU=activation == "silu",
            BLOCK_D=block,
            num_warps=warps,
        )
    return y


class _CausalConv1d(torch.autograd.Function):
    """y_t = act(s_t) with s_t = bias + sum_j w_j x_{t-j}; x_{-1}, x_{-2}, ... are the initial state in reverse order.

    Backward, with ds_t = dy_t act'(s_t):  dx_t = sum_j w_j ds_{t+j} + the gradient through the final state,
    dw_j = sum_{b,t} ds_t x_{t-j},  dbias = sum_{b,t} ds_t. Entries of the initial state count as tokens before the row.

    Only the arguments are saved. The backward recomputes s at each of the K tokens that a token contributes to, which
    avoids the two more passes over memory that a buffer for ds would take.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        x, weight, bias, initial_state, seq_idx, ctx.silu, return_final_state = arguments
        batch, length, channels = x.shape
        width = weight.shape[1]
        sources = None if seq_idx is None else _tap_sources(seq_idx, width)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = None
        with torch.cuda.device_of(x):
            tokens, block, warps = _FORWARD_TILE
            forward_kernel[(triton.cdiv(length, tokens), triton.cdiv(channels, block), batch)](
                *(x, weight, bias, initial_state, sources, y, length, channels),
                *(*strides(3, x), *strides(2, weight), *strides(1, bias), *strides(3, initial_state)),
                WIDTH=width,
                SILU=ctx.silu,
                BLOCK_L=tokens,
                BLOCK_D=block,
                num_warps=warps,
            )
            if return_final_state:
                state = x.new_empty(batch, channels, width - 1)
                block, warps = _WINDOW_TILE
                final_state_kernel[(batch, triton.cdiv(channels, block))](
                    *(x, initial_state, sources, state, length, channels),
                    *strides(3, x, initial_state),
                    WIDTH=width,
                    WINDOW=triton.next_power_of_2(width),
                    BLOCK_D=block,
                    num_warps=warps,
                )
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx, sources)
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dstate = gradients
        x, weight, bias, initial_state, seq_idx, sources = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_initial = ctx.needs_input_grad[:4]
        batch, length, channels = x.shape
        width = weight.shape[1]
        if dy is None:  # only the final state was used
            dy = x.new_zeros(()).expand(x.shape)
        targets = None if seq_idx is None else _tap_targets(seq_idx, width)
        tokens, block, warps = _BACKWARD_TILE
        halo = width - 1 if needs_initial else 0  # entries of the initial state come before the tokens
        blocks = triton.cdiv(length + halo, tokens)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dinitial = torch.empty_like(initial_state, memory_format=torch.contiguous_format) if needs_initial else None
        partial = None
        if needs_weight or needs_bias:
            partial = x.new_empty(batch * blocks, width + 1, channels, dtype=torch.float32)
        with torch.cuda.device_of(x):
            backward_kernel[(blocks, triton.cdiv(channels, block), batch)](
                *(x, weight, bias, initial_state, sources, targets, dy, dstate, dx, dinitial, partial),
                *(length, channels),
                *(*strides(3, x), *strides(2, weight), *strides(1, bias), *strides(3, initial_state, dy, dstate)),
                WIDTH=width,
                HALO=halo,
                SILU=ctx.silu,
                BLOCK_L=tokens,
                BLOCK_D=block,
                num_warps=warps,
            )
        dweight = dbias = None
        if partial is not None:
            total = partial.sum(0)  # the order of this sum is fixed
            if needs_weight:
                dweight = total[:width].t().to(weight.dtype)
            if needs_bias and bias is not None:
                dbias = total[width].to(bias.dtype)
        return dx, dweight, dbias, dinitial, None, None, None


def _real_tokens_first(seq_idx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number the real tokens of each row without waiting for the device.

    Returns:
        rank: (B, L) number of real tokens before each real token.
        count: (B, 1) number of real tokens.
        order: (B, L) positions of the real tokens in order, then of the padding.
        documents: (B, L) documents in that order.
    """
    real = seq_idx >= 0
    rank = real.cumsum(1) - 1
    count = rank[:, -1:] + 1
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(rank)
    place = torch.where(real, rank, count + position - rank - 1)  # a permutation of the row
    order = torch.empty_like(rank).scatter_(1, place, position)
    return rank, count, order, seq_idx.gather(1, order)


def _tap_sources(seq_idx: Tensor, width: int) -> Tensor:
    """Return the (B, L+1, K) int32 sources of the taps of every token (module docstring), -K for padding.

    The last entry stands for a token after the row, in the document of the row's last real token. Its taps 1 ... K-1
    are the final state in reverse order.
    """
    seq_idx = seq_idx.long()
    rank, count, order, documents = _real_tokens_first(seq_idx)
    last = documents.gather(1, (count - 1).clamp(min=0))
    own = torch.cat([seq_idx, last], dim=1)[..., None]
    real = torch.cat([seq_idx >= 0, torch.ones_like(last, dtype=torch.bool)], dim=1)[..., None]
    taps = torch.arange(width, device=seq_idx.device)
    source = torch.cat([rank, count], dim=1)[..., None] - taps  # as a rank
    # The initial state precedes the first real token and belongs to its document.
    nearest = source.clamp(0, seq_idx.shape[1] - 1).flatten(1)
    same = documents.gather(1, nearest).view_as(source) == own
    position = torch.where(source < 0, source, order.gather(1, nearest).view_as(source))
    return torch.where(real & same & (source < count[..., None]), position, -width).int()


def _tap_targets(seq_idx: Tensor, width: int) -> Tensor:
    """Return a (B, K-1+L, K+1) int32 table of the readers of each entry of the initial state and of each token.

    Column j < K is the position of the token whose tap j reads the entry, or -1. Column K is the place of the entry in
    the final state, or -1.
    """
    seq_idx = seq_idx.long()
    batch, length = seq_idx.shape
    gap = width - 1
    rank, count, order, documents = _real_tokens_first(seq_idx)
    before = torch.arange(-gap, 0, device=seq_idx.device).expand(batch, gap)
    ranks = torch.cat([before, rank], dim=1)
    own = torch.cat([documents[:, :1].expand(batch, gap), seq_idx], dim=1)
    real = torch.cat([torch.ones_like(before, dtype=torch.bool), seq_idx >= 0], dim=1)
    target = ranks[..., None] + torch.arange(width, device=seq_idx.device)  # as a rank
    nearest = target.clamp(0, length - 1).flatten(1)
    same = documents.gather(1, nearest).view_as(target) == own[..., None]
    inside = (target >= 0) & (target < count[..., None])
    tokens = torch.where(real[..., None] & same & inside, order.gather(1, nearest).view_as(target), -1)
    place = ranks - count + gap
    last = documents.gather(1, (count - 1).clamp(min=0))
    place = torch.where(real & (own == last) & (place >= 0), place, -1)
    return torch.cat([tokens, place[..., None]], dim=2).int()


@triton.jit
def _tap_source(sources_ptr, row, token, tap, inside, WIDTH: tl.constexpr):
    """Return the (BLOCK_L) sources of a tap, -K outside; `row` is the index of the row's first token in the table."""
    if sources_ptr is not None:
        entry = (row + token) * WIDTH + tap
        source = tl.load(sources_ptr + entry, mask=inside, other=-WIDTH)
    else:
        source = tl.where(inside, token - tap, -WIDTH)
    return source


@triton.jit
def _tap_values(
    x_ptr, initial_ptr, source, d, inside_d, x_token, x_channel, initial_channel, initial_tap, WIDTH: tl.constexpr
):
    """Return the (BLOCK_L, BLOCK_D) float32 values at the sources; pointers are those of the batch row."""
    offset = source.to(tl.int64)[:, None] * x_token + d[None, :] * x_channel
    values = tl.load(x_ptr + offset, mask=(source >= 0)[:, None] & inside_d[None, :], other=0.0).to(tl.float32)
    if initial_ptr is not None:
        place = source + (WIDTH - 1)
        held = (source < 0) & (place >= 0)
        offset = place.to(tl.int64)[:, None] * initial_tap + d[None, :] * initial_channel
        values += tl.load(initial_ptr + offset, mask=held[:, None] & inside_d[None, :], other=0.0).to(tl.float32)
    return values


@triton.jit
def _tap_weight(weight_ptr, d, inside_d, tap, weight_channel, weight_tap, WIDTH: tl.constexpr):
    """Return the (BLOCK_D) float32 weights of the input `tap` tokens back."""
    offset = d * weight_channel + (WIDTH - 1 - tap) * weight_tap
    return tl.load(weight_ptr + offset, mask=inside_d, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, sources_ptr, y_ptr,
    length, channels,
    x_batch, x_token, x_channel, weight_channel, weight_tap, bias_channel, initial_batch, initial_channel,
    initial_tap,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_t = t < length
    inside_d = d < channels
    x_ptr += b * x_batch
    if initial_ptr is not None:
        initial_ptr += b * initial_batch

    total = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d * bias_channel, mask=inside_d, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        source = _tap_source(sources_ptr, b * (length + 1), t, tap, inside_t, WIDTH)
        values = _tap_values(
            x_ptr, initial_ptr, source, d, inside_d, x_token, x_channel, initial_channel, initial_tap, WIDTH
        )
        total += values * _tap_weight(weight_ptr, d, inside_d, tap, weight_channel, weight_tap, WIDTH)[None, :]
    if SILU:
        total *= sigmoid(total)
    # Tap 0 of a real token is the token itself; padding has no source.
    real = _tap_source(sources_ptr, b * (length + 1), t, 0, inside_t, WIDTH) >= 0
    total = tl.where(real[:, None], total, 0.0)
    offset = (b * length + t)[:, None] * channels + d[None, :]
    tl.store(y_ptr + offset, total.to(y_ptr.dtype.element_ty), mask=inside_t[:, None] & inside_d[None, :])


@triton.jit(do_not_specialize=["length"])
def final_state_kernel(
    x_ptr, initial_ptr, sources_ptr, state_ptr,
    length, channels,
    x_batch, x_token, x_channel, initial_batch, initial_channel, initial_tap,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, WINDOW)  # place in the state, oldest first
    inside_d = d < channels
    inside = place < WIDTH - 1
    x_ptr += b * x_batch
    if initial_ptr is not None:
        initial_ptr += b * initial_batch
    tap = WIDTH - 1 - place  # tap of a token after the row
    source = _tap_source(sources_ptr, b * (length + 1), length, tap, inside, WIDTH)
    values = _tap_values(
        x_ptr, initial_ptr, source, d, inside_d, x_token, x_channel, initial_channel, initial_tap, WIDTH
    )
    offset = (b * channels + d)[None, :] * (WIDTH - 1) + place[:, None]
    tl.store(state_ptr + offset, values.to(state_ptr.dtype.element_ty), mask=inside[:, None] & inside_d[None, :])


@triton.jit(do_not_specialize=["length"])
def backward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, sources_ptr, targets_ptr, dy_ptr, dstate_ptr, dx_ptr, dinitial_ptr,
    partial_ptr,
    length, channels,
    x_batch, x_token, x_channel, weight_channel, weight_tap, bias_channel, initial_batch, initial_channel,
    initial_tap, dy_batch, dy_token, dy_channel, dstate_batch, dstate_channel, dstate_tap,
    WIDTH: tl.constexpr, HALO: tl.constexpr, SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L) - HALO  # negative: initial state, as for sources
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_t = t < length
    inside_d = d < channels
    x_ptr += b * x_batch
    if initial_ptr is not None:
        initial_ptr += b * initial_batch
    entry = (b * (length + WIDTH - 1) + t + (WIDTH - 1)) * (WIDTH + 1)  # in the table of targets

    gradient = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
    for tap in tl.static_range(WIDTH):
        # Tap 0 is always needed: the sums over tokens are taken there, because the reading token is t itself.
        if tap == 0 or dx_ptr is not None or dinitial_ptr is not None:
            if targets_ptr is not None:
                target = tl.load(targets_ptr + entry + tap, mask=inside_t, other=-1)
            else:
                target = tl.where(t + tap < length, t + tap, -1)
            read = target >= 0
            offset = b * dy_batch + target.to(tl.int64)[:, None] * dy_token + d[None, :] * dy_channel
            ds = tl.load(dy_ptr + offset, mask=read[:, None] & inside_d[None, :], other=0.0).to(tl.float32)
            if SILU:
                s = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
                if bias_ptr is not None:
                    s += tl.load(bias_ptr + d * bias_channel, mask=inside_d, other=0.0).to(tl.float32)[None, :]
                for other in tl.static_range(WIDTH):
                    source = _tap_source(sources_ptr, b * (length + 1), target, other, read, WIDTH)
                    values = _tap_values(
                        x_ptr, initial_ptr, source, d, inside_d,
                        x_token, x_channel, initial_channel, initial_tap, WIDTH,
                    )  # fmt: skip
                    w = _tap_weight(weight_ptr, d, inside_d, other, weight_channel, weight_tap, WIDTH)
                    s += values * w[None, :]
                gate = sigmoid(s)
                ds *= gate * (1.0 + s * (1.0 - gate))
            w = _tap_weight(weight_ptr, d, inside_d, tap, weight_channel, weight_tap, WIDTH)
            gradient += ds * w[None, :]
            if tap == 0 and partial_ptr is not None:
                program = b * tl.num_programs(0) + tl.program_id(0)
                sums_ptr = partial_ptr + program * (WIDTH + 1) * channels + d
                for other in tl.static_range(WIDTH):
                    source = _tap_source(sources_ptr, b * (length + 1), target, other, read, WIDTH)
                    values = _tap_values(
                        x_ptr, initial_ptr, source, d, inside_d,
                        x_token, x_channel, initial_channel, initial_tap, WIDTH,
                    )  # fmt: skip
                    tl.store(sums_ptr + (WIDTH - 1 - other) * channels, tl.sum(ds * values, axis=0), mask=inside_d)
                tl.store(sums_ptr + WIDTH * channels, tl.sum(ds, axis=0), mask=inside_d)

    if dstate_ptr is not None:
        if targets_ptr is not None:
            place = tl.load(targets_ptr + entry + WIDTH, mask=inside_t, other=-1)
        else:
            place = tl.where(inside_t, t - length + (WIDTH - 1), -1)
        offset = b * dstate_batch + place.to(tl.int64)[:, None] * dstate_tap + d[None, :] * dstate_channel
        held = (place >= 0)[:, None] & inside_d[None, :]
        gradient += tl.load(dstate_ptr + offset, mask=held, other=0.0).to(tl.float32)
    if dx_ptr is not None:
        offset = (b * length + t)[:, None] * channels + d[None, :]
        mask = (inside_t & (t >= 0))[:, None] & inside_d[None, :]
        tl.store(dx_ptr + offset, gradient.to(dx_ptr.dtype.element_ty), mask=mask)
    if dinitial_ptr is not None:
        offset = (b * channels + d)[None, :] * (WIDTH - 1) + (t + (WIDTH - 1))[:, None]
        mask = (t < 0)[:, None] & inside_d[None, :]
        tl.store(dinitial_ptr + offset, gradient.to(dinitial_ptr.dtype.element_ty), mask=mask)


@triton.jit
def step_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr,
    channels,
    x_batch, x_channel, state_batch, state_channel, state_tap, weight_channel, weight_tap, bias_channel,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, WINDOW)[None, :].to(tl.int64)  # place in the window, oldest first; the last of K is the token
    inside_d = d < channels
    inside = inside_d[:, None]
    state_ptr += b * state_batch
    token = tl.load(x_ptr + b * x_batch + d * x_channel, mask=inside_d, other=0.0).to(tl.float32)
    held = state_ptr + d[:, None] * state_channel + place * state_tap
    window = tl.load(held, mask=inside & (place < WIDTH - 1), other=0.0).to(tl.float32)  # (BLOCK_D, WINDOW)
    window = tl.where(place == WIDTH - 1, token[:, None], window)
    taps = weight_ptr + d[:, None] * weight_channel + place * weight_tap
    total = tl.sum(window * tl.load(taps, mask=inside & (place < WIDTH), other=0.0).to(tl.float32), axis=1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d * bias_channel, mask=inside_d, other=0.0).to(tl.float32)
    if SILU:
        total *= sigmoid(total)
    tl.store(y_ptr + b * channels + d, total.to(y_ptr.dtype.element_ty), mask=inside_d)
    # Each entry moves to the place of its neighbour, which another thread may not have read yet.
    tl.debug_barrier()
    moved = inside & (place >= 1) & (place < WIDTH)
    tl.store(held - state_tap, window.to(state_ptr.dtype.element_ty), mask=moved)
