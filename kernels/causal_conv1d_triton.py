"""`causal_conv1d` and `causal_conv1d_step` in Triton: order of packed rows, launches, gradients and kernels.

Symbols: B batch, L length, D channels, K convolution width; s_t the sum before the activation, ds its gradient.

A program walks over a span of tokens of one row, with the last K-1 inputs of its channels in registers, so that each
input is loaded once. Channels are next to each other in memory and in a thread: a load moves 16 bytes. Spans are short
where a row or a batch would not occupy a GPU otherwise; each loads the K-1 inputs before it, and the backward computes
K-1 gradients after it. No result but the order of the sums over tokens depends on the length of a span.

Packed and padded rows are walked by rank: first the real tokens, in order, then the padding. A (B, L) int32 table holds
the position of each rank, as its complement (negative) where a token opens another document, which clears the window.

If a pointer is None, its part of a kernel is removed at compile time.
"""

# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import tl, triton
from .tracing import launch, opaque, tracing
from .triton_math import strides

WIDTHS = (2, 3, 4)

# A program is one warp, whose threads each load 16 bytes of a token.
_TOKEN_BYTES = 512
# Tokens that are loaded together, so that several loads are under way. The backward holds 16 float32 numbers for each
# channel beside them: with 4 tokens it needs 234 registers for K = 4 and bfloat16 (Triton 3.9, sm_90), and spills none.
_FORWARD_TOGETHER, _BACKWARD_TOGETHER = 8, 4
# Tokens of a span: the most that leave _PROGRAMS programs, 16 for each multiprocessor of an H100. The backward stores
# K+1 float32 sums for each span and channel, with 32 tokens as much as a third of a bfloat16 x.
_SPANS = (128, 64, 32, 16)
_BACKWARD_SPANS = (128, 64, 32)
_PROGRAMS = 2048
# (channels, warps) of a program of the step, which holds one K-wide window per channel.
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
    convolve = _traced if tracing() else _CausalConv1d.apply
    y, state = convolve(  # pyright: ignore[reportGeneralTypeIssues]
        x, weight, bias, initial_state, seq_idx, activation == "silu", return_final_state
    )
    return y, state if return_final_state else None


@launch("Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, str? activation", lambda x, *_: x.new_empty(x.shape))
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

    Only the arguments are saved. The backward recomputes s. It carries the unfinished gradients of the last K-1 inputs
    and, of weight and bias, the sums over its span, which are added up at the end in a fixed order.
    """

    @staticmethod
    def save(ctx: Any, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
        """Save what the backward needs, and return the tables of the order of tokens."""
        x, weight, bias, initial_state, seq_idx, ctx.silu, ctx.returns_state = arguments
        order, rows = (None, None) if seq_idx is None else _order_of_tokens(seq_idx)
        ctx.save_for_backward(x, weight, bias, initial_state, order, rows)
        ctx.set_materialize_grads(False)
        return order, rows

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        order, rows = _CausalConv1d.save(ctx, *arguments)
        x, weight, bias, initial_state, _, _, return_final_state = arguments
        batch, length, channels = x.shape
        width = weight.shape[1]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = x.new_empty(batch, channels, width - 1) if return_final_state else None
        near = _channels_together(x)
        grid, spans, tokens, block = _spans(near, _SPANS)
        with torch.cuda.device_of(x):
            forward_kernel[grid](
                *(near, weight, bias, initial_state, order, rows, y, state),
                *(length, channels, spans, tokens),
                *(*strides(3, near), *strides(2, weight), *strides(1, bias), *strides(3, initial_state)),
                WIDTH=width,
                SILU=ctx.silu,
                TOGETHER=_FORWARD_TOGETHER,
                BLOCK_D=block,
                num_warps=1,
            )
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dstate = gradients
        x, weight, bias, initial_state, order, rows = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_initial = ctx.needs_input_grad[:4]
        batch, length, channels = x.shape
        width = weight.shape[1]
        if dy is None:  # only the final state was used
            dy = x.new_zeros(()).expand(x.shape)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dinitial = partial = None
        if needs_initial:
            dinitial = initial_state.new_empty(batch, width - 1, channels)
        if dstate is not None:
            dstate = dstate.transpose(1, 2).contiguous() if ctx.returns_state else None
        x, dy = _channels_together(x), _channels_together(dy)
        grid, spans, tokens, block = _spans(x, _BACKWARD_SPANS)
        if needs_weight or needs_bias:
            partial = x.new_empty(batch * spans, width + 1, channels, dtype=torch.float32)
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                *(x, weight, bias, initial_state, order, rows, dy, dstate, dx, dinitial, partial),
                *(length, channels, spans, tokens),
                *(*strides(3, x), *strides(2, weight), *strides(1, bias), *strides(3, initial_state, dy)),
                WIDTH=width,
                SILU=ctx.silu,
                TOGETHER=_BACKWARD_TOGETHER,
                BLOCK_D=block,
                num_warps=1,
            )
        dweight = dbias = None
        if partial is not None:
            total = partial.sum(0)  # the order of this sum is fixed
            if needs_weight:
                dweight = total[:width].t().to(weight.dtype)
            if needs_bias and bias is not None:
                dbias = total[width].to(bias.dtype)
        return dx, dweight, dbias, None if dinitial is None else dinitial.transpose(1, 2), None, None, None


def _empty_results(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    state = (x.shape[0], x.shape[2], weight.shape[1] - 1) if others[-1] else (0,)
    return x.new_empty(x.shape), x.new_empty(state)


_traced = opaque(
    _CausalConv1d,
    "causal_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, bool silu, bool return_final_state",
    _empty_results,
    restore=_CausalConv1d.save,
)


def _channels_together(tensor: Tensor) -> Tensor:
    """Return the (B, L, D) tensor, copied if its channels are apart in memory.

    A program that walks over tokens would fetch a sector for each number. Expanded numbers are not copied.
    """
    return tensor if tensor.stride(2) in (0, 1) else tensor.contiguous()


def _spans(x: Tensor, choices: tuple[int, ...]) -> tuple[tuple[int], int, int, int]:
    """Return the grid for the longest spans that are enough, spans of a row, tokens of each, channels of a program."""
    batch, length, channels = x.shape
    block = _TOKEN_BYTES // x.element_size()
    columns = batch * triton.cdiv(channels, block)
    tokens = next((each for each in choices if columns * triton.cdiv(length, each) >= _PROGRAMS), choices[-1])
    spans = triton.cdiv(length, tokens)
    return (columns * spans,), spans, tokens, block


def _order_of_tokens(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Order the tokens of each row without waiting for the device.

    Returns:
        order: (B, L) int32 positions of the real tokens in order, then of the padding; the complement of the position
            of a real token that opens another document than the row's first.
        rows: (B, 2) int32 number of real tokens, and rank of the first token of the last document (0 without one).
    """
    seq_idx = seq_idx.contiguous()  # and so are the tables, as the kernels read them
    real = seq_idx >= 0
    rank = real.cumsum(1) - 1
    count = rank[:, -1:] + 1
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(rank)
    place = torch.where(real, rank, count + position - rank - 1)  # a permutation of the row
    order = torch.empty_like(rank).scatter_(1, place, position)
    documents = seq_idx.gather(1, order)
    opens = torch.zeros_like(real)
    opens[:, 1:] = (documents[:, 1:] != documents[:, :-1]) & (position[:, 1:] < count)
    last = torch.where(opens, position, 0).amax(1, keepdim=True)
    return torch.where(opens, ~order, order).int(), torch.cat([count, last], dim=1).int()


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _part(channels, spans, BLOCK_D: tl.constexpr):
    """Return a program's row (int64), its span and its (BLOCK_D) channels; programs of one span follow each other."""
    blocks = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0)
    d = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return (program // blocks // spans).to(tl.int64), program // blocks % spans, d


@triton.jit
def _weights(weight_ptr, d, weight_channel, weight_tap, inside, WIDTH: tl.constexpr):
    """Return WIDTH (BLOCK_D) weights, that of the current token first."""
    weights = ()
    for tap in tl.static_range(WIDTH):
        weights = weights + (_load(weight_ptr + d * weight_channel + (WIDTH - 1 - tap) * weight_tap, inside),)
    return weights


@triton.jit
def _tokens(order_ptr, begin, length, NUMBER: tl.constexpr):
    """Return positions (int64) of consecutive ranks, and whether another document begins there, from the row's table.

    Nothing without a table, where positions are ranks.
    """
    positions = ()
    openings = ()
    if order_ptr is not None:
        for i in tl.static_range(NUMBER):
            entry = tl.load(order_ptr + begin + i, mask=begin + i < length, other=0)
            positions = positions + (tl.where(entry < 0, ~entry, entry).to(tl.int64),)
            openings = openings + (entry < 0,)
    return positions, openings


@triton.jit
def _inputs(start, step, order_ptr, positions, begin, count, d, channels, NUMBER: tl.constexpr):
    """Return the (BLOCK_D) inputs of consecutive ranks, zeros beyond those of real tokens.

    `start` points to the row's channels, `step` (int64) lies between tokens. Without a table the addresses are sums,
    which take fewer instructions than a product for each token.
    """
    values = ()
    for i in tl.static_range(NUMBER):
        pointer = start + begin * step + i * step if order_ptr is None else start + positions[i] * step
        mask = d < tl.where(begin + i < count, channels, 0)
        values = values + (tl.load(pointer, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _zeros(NUMBER: tl.constexpr, BLOCK_D: tl.constexpr):
    result = ()
    for _ in tl.static_range(NUMBER):
        result = result + (tl.zeros((BLOCK_D,), tl.float32),)
    return result


@triton.jit
def _clear(window, opens, WIDTH: tl.constexpr):
    """Return zeros where another document begins."""
    result = ()
    for back in tl.static_range(WIDTH - 1):
        result = result + (tl.where(opens, 0.0, window[back]),)
    return result


@triton.jit
def _window_before(
    x_ptr, initial_ptr, order_ptr, rank, d, channels, x_step, initial_channel, initial_tap,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the WIDTH - 1 inputs before a rank, newest first, and the number of taps that the last of them uses.

    Pointers are those of the row. Ranks before 0 are entries of the initial state.
    """
    window = _zeros(WIDTH - 1, BLOCK_D)
    reach = rank * 0 + WIDTH
    for i in tl.static_range(WIDTH - 1):
        earlier = rank - (WIDTH - 1) + i
        position = tl.cast(earlier, tl.int64)
        if order_ptr is not None:
            entry = tl.load(order_ptr + earlier, mask=earlier >= 0, other=0)
            position = tl.where(entry < 0, ~entry, entry).to(tl.int64)
            window = _clear(window, entry < 0, WIDTH)
            reach = tl.where(entry < 0, 1, tl.minimum(reach + 1, WIDTH))
        mask = d < tl.where(earlier >= 0, channels, 0)
        value = tl.load(x_ptr + position * x_step, mask=mask, other=0.0).to(tl.float32)
        if initial_ptr is not None:
            offset = d.to(tl.int64) * initial_channel + (earlier + WIDTH - 1) * initial_tap
            mask = d < tl.where(earlier < 0, channels, 0)
            value += tl.load(initial_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        window = (value,) + window[: WIDTH - 2]
    return window, reach


@triton.jit
def _gate(total):
    """Return the sigmoid as the square of a reciprocal root, which takes one instruction; a division takes five."""
    root = tl.rsqrt(1.0 + tl.exp2(total * -1.4426950408889634))  # log2(e)
    return root * root


@triton.jit(do_not_specialize=["length", "spans"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, order_ptr, rows_ptr, y_ptr, state_ptr,
    length, channels, spans, tokens,
    x_batch, x_token, x_channel, weight_channel, weight_tap, bias_channel, initial_batch, initial_channel,
    initial_tap,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, span, d = _part(channels, spans, BLOCK_D)
    inside = d < channels
    x_step = tl.cast(x_token, tl.int64)
    y_step = tl.cast(channels, tl.int64)
    x_ptr += b * x_batch + d * x_channel
    y_ptr += b * length * channels + d
    count = length
    if initial_ptr is not None:
        initial_ptr += b * initial_batch
    if order_ptr is not None:
        order_ptr += b * length
        count = tl.load(rows_ptr + b * 2)
    weights = _weights(weight_ptr, d.to(tl.int64), weight_channel, weight_tap, inside, WIDTH)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = _load(bias_ptr + d.to(tl.int64) * bias_channel, inside)

    first = span * tokens
    window, _ = _window_before(
        x_ptr, initial_ptr, order_ptr, tl.minimum(first, count), d, channels,
        x_step, initial_channel, initial_tap, WIDTH, BLOCK_D,
    )  # fmt: skip
    for begin in range(first, tl.minimum(first + tokens, length), TOGETHER):
        # All loads come before the stores, which for all that the compiler knows could change what is loaded.
        positions, openings = _tokens(order_ptr, begin, length, TOGETHER)
        values = _inputs(x_ptr, x_step, order_ptr, positions, begin, count, d, channels, TOGETHER)
        for i in tl.static_range(TOGETHER):
            if order_ptr is not None:
                window = _clear(window, openings[i], WIDTH)
            total = bias + values[i] * weights[0]
            for tap in tl.static_range(1, WIDTH):
                total += window[tap - 1] * weights[tap]
            if SILU:
                total *= _gate(total)
            if order_ptr is not None:
                total = tl.where(begin + i < count, total, 0.0)
            pointer = y_ptr + begin * y_step + i * y_step if order_ptr is None else y_ptr + positions[i] * y_step
            mask = d < tl.where(begin + i < length, channels, 0)
            tl.store(pointer, total.to(y_ptr.dtype.element_ty), mask=mask)
            window = (values[i],) + window[: WIDTH - 2]
    if state_ptr is not None:  # noqa: SIM102
        if span == spans - 1:
            window, _ = _window_before(
                x_ptr, initial_ptr, order_ptr, count, d, channels,
                x_step, initial_channel, initial_tap, WIDTH, BLOCK_D,
            )  # fmt: skip
            for back in tl.static_range(WIDTH - 1):
                offset = (b * channels + d) * (WIDTH - 1) + (WIDTH - 2 - back)
                tl.store(state_ptr + offset, window[back].to(state_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_step(
    rank, value, dy, opens, window, unfinished, sums, reach,
    order_ptr, dstate_ptr, dx_ptr, dinitial_ptr,
    weights, bias, d, channels, length, count, last, first,
    WIDTH: tl.constexpr, SILU: tl.constexpr, OWN: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Take a token of the span (OWN) or of the next, whose gradients the last inputs of the span still need.

    Returns window, unfinished, sums and reach after it. The gradient of the input WIDTH - 1 tokens back is complete, as
    no later token uses it, and stored.
    """
    PACKED: tl.constexpr = order_ptr is not None
    if PACKED:
        window = _clear(window, opens, WIDTH)
        reach = tl.where(opens, 1, tl.minimum(reach + 1, WIDTH))
    ds = dy
    if SILU:
        total = bias + value * weights[0]
        for tap in tl.static_range(1, WIDTH):
            total += window[tap - 1] * weights[tap]
        gate = _gate(total)
        ds *= gate * (1.0 + total * (1.0 - gate))
    if PACKED:
        ds = tl.where(rank < count, ds, 0.0)
    if SUMS and OWN:
        grown = (sums[0] + ds * value,)
        for tap in tl.static_range(1, WIDTH):
            grown = grown + (sums[tap] + ds * window[tap - 1],)
        sums = grown + (sums[WIDTH] + ds,)
    if dx_ptr is not None or dinitial_ptr is not None:
        own = ds * weights[0]
        if OWN and dstate_ptr is not None:
            place = rank - count + (WIDTH - 1)
            mask = d < tl.where((place >= 0) & (rank < count) & (rank >= last), channels, 0)
            own += tl.load(dstate_ptr + place * channels, mask=mask, other=0.0).to(tl.float32)
        remaining = (own,)
        for tap in tl.static_range(1, WIDTH):
            part = ds
            if PACKED:
                part = tl.where(tap < reach, ds, 0.0)
            remaining = remaining + (unfinished[tap - 1] + part * weights[tap],)
        unfinished = remaining[: WIDTH - 1]
        complete = remaining[WIDTH - 1]
        earlier = rank - (WIDTH - 1)
        if dx_ptr is not None:
            stored = (earlier >= first) & (earlier < length)
            position = tl.cast(earlier, tl.int64)
            if PACKED:
                entry = tl.load(order_ptr + earlier, mask=stored, other=0)
                position = tl.where(entry < 0, ~entry, entry).to(tl.int64)
            mask = d < tl.where(stored, channels, 0)
            tl.store(dx_ptr + position * channels, complete.to(dx_ptr.dtype.element_ty), mask=mask)
        if dinitial_ptr is not None:
            pointer = dinitial_ptr + (earlier + WIDTH - 1) * channels
            mask = d < tl.where(earlier < 0, channels, 0)
            tl.store(pointer, complete.to(dinitial_ptr.dtype.element_ty), mask=mask)
    return (value,) + window[: WIDTH - 2], unfinished, sums, reach


@triton.jit(do_not_specialize=["length", "spans"])
def backward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, order_ptr, rows_ptr, dy_ptr, dstate_ptr, dx_ptr, dinitial_ptr,
    partial_ptr,
    length, channels, spans, tokens,
    x_batch, x_token, x_channel, weight_channel, weight_tap, bias_channel, initial_batch, initial_channel,
    initial_tap, dy_batch, dy_token, dy_channel,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = order_ptr is not None
    b, span, d = _part(channels, spans, BLOCK_D)
    inside = d < channels
    x_step = tl.cast(x_token, tl.int64)
    dy_step = tl.cast(dy_token, tl.int64)
    x_ptr += b * x_batch + d * x_channel
    dy_ptr += b * dy_batch + d * dy_channel
    count = length
    last = 0
    if initial_ptr is not None:
        initial_ptr += b * initial_batch
    if PACKED:
        order_ptr += b * length
        count = tl.load(rows_ptr + b * 2)
        last = tl.load(rows_ptr + b * 2 + 1)
    if dstate_ptr is not None:
        dstate_ptr += b * (WIDTH - 1) * channels + d
    if dx_ptr is not None:
        dx_ptr += b * length * channels + d
    if dinitial_ptr is not None:
        dinitial_ptr += b * (WIDTH - 1) * channels + d
    weights = _weights(weight_ptr, d.to(tl.int64), weight_channel, weight_tap, inside, WIDTH)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = _load(bias_ptr + d.to(tl.int64) * bias_channel, inside)

    first = span * tokens
    window, reach = _window_before(
        x_ptr, initial_ptr, order_ptr, tl.minimum(first, count), d, channels,
        x_step, initial_channel, initial_tap, WIDTH, BLOCK_D,
    )  # fmt: skip
    sums = _zeros(WIDTH + 1, BLOCK_D)  # of weights, that of the current token first, and of bias
    unfinished = _zeros(WIDTH - 1, BLOCK_D)  # gradients of the last inputs, newest first
    if dstate_ptr is not None and dinitial_ptr is not None:
        unfinished = ()  # a short row leaves entries of the initial state in the final state
        for back in tl.static_range(WIDTH - 1):
            place = WIDTH - 2 - back - count
            mask = d < tl.where((span == 0) & (place >= 0) & (last == 0), channels, 0)
            unfinished = unfinished + (tl.load(dstate_ptr + place * channels, mask=mask, other=0.0).to(tl.float32),)

    size = tl.minimum(tokens, length - first)
    end = first + tl.cdiv(size, TOGETHER) * TOGETHER
    for begin in range(first, end, TOGETHER):
        # All loads come before the stores, which for all that the compiler knows could change what is loaded.
        positions, openings = _tokens(order_ptr, begin, length, TOGETHER)
        values = _inputs(x_ptr, x_step, order_ptr, positions, begin, count, d, channels, TOGETHER)
        outer = _inputs(dy_ptr, dy_step, order_ptr, positions, begin, count, d, channels, TOGETHER)
        for i in tl.static_range(TOGETHER):
            window, unfinished, sums, reach = _backward_step(
                begin + i, values[i], outer[i], openings[i] if PACKED else False, window, unfinished, sums, reach,
                order_ptr, dstate_ptr, dx_ptr, dinitial_ptr,
                weights, bias, d, channels, length, count, last, first,
                WIDTH, SILU, True, partial_ptr is not None,
            )  # fmt: skip
    if dx_ptr is not None or dinitial_ptr is not None:
        positions, openings = _tokens(order_ptr, end, length, WIDTH - 1)
        values = _inputs(x_ptr, x_step, order_ptr, positions, end, count, d, channels, WIDTH - 1)
        outer = _inputs(dy_ptr, dy_step, order_ptr, positions, end, count, d, channels, WIDTH - 1)
        for i in tl.static_range(WIDTH - 1):
            window, unfinished, sums, reach = _backward_step(
                end + i, values[i], outer[i], openings[i] if PACKED else False, window, unfinished, sums, reach,
                order_ptr, dstate_ptr, dx_ptr, dinitial_ptr,
                weights, bias, d, channels, length, count, last, first,
                WIDTH, SILU, False, partial_ptr is not None,
            )  # fmt: skip
    if partial_ptr is not None:
        sums_ptr = partial_ptr + (b * spans + span) * (WIDTH + 1) * channels + d
        for tap in tl.static_range(WIDTH):
            tl.store(sums_ptr + (WIDTH - 1 - tap) * channels, sums[tap], mask=inside)
        tl.store(sums_ptr + WIDTH * channels, sums[WIDTH], mask=inside)


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
        total *= _gate(total)
    tl.store(y_ptr + b * channels + d, total.to(y_ptr.dtype.element_ty), mask=inside_d)
    # Each entry moves to the place of its neighbour, which another thread may not have read yet.
    tl.debug_barrier()
    moved = inside & (place >= 1) & (place < WIDTH)
    tl.store(held - state_tap, window.to(state_ptr.dtype.element_ty), mask=moved)
