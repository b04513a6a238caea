"""The Triton kernels of `causal_conv1d` and `causal_conv1d_step`, launched from `causal_conv1d_triton.py`.

Symbols: B batch, L length, D channels, K convolution width; s_t the sum before the activation, ds its gradient. For
what a tap's source is see there. A pointer that is None leaves its part out when the kernel is compiled.
"""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def _sigmoid(s):
    return 1.0 / (1.0 + tl.exp2(s * -1.4426950408889634))  # log2(e)


@triton.jit
def _tap_source(sources_ptr, row, token, tap, inside, WIDTH: tl.constexpr):
    """(BLOCK_L) sources of a tap; `row` is the first token's number in the table, -K outside."""
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
    """(BLOCK_L, BLOCK_D) float32 values at the sources; the pointers are those of the batch row."""
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
    """(BLOCK_D) float32 weights that meet the input `tap` tokens back."""
    offset = d * weight_channel + (WIDTH - 1 - tap) * weight_tap
    return tl.load(weight_ptr + offset, mask=inside_d, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    sources_ptr,
    y_ptr,
    length,
    channels,
    x_batch,
    x_token,
    x_channel,
    weight_channel,
    weight_tap,
    bias_channel,
    initial_batch,
    initial_channel,
    initial_tap,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
        total *= _sigmoid(total)
    # A real token is its own newest tap; padding is nobody's.
    real = _tap_source(sources_ptr, b * (length + 1), t, 0, inside_t, WIDTH) >= 0
    total = tl.where(real[:, None], total, 0.0)
    offset = (b * length + t)[:, None] * channels + d[None, :]
    tl.store(y_ptr + offset, total.to(y_ptr.dtype.element_ty), mask=inside_t[:, None] & inside_d[None, :])


@triton.jit(do_not_specialize=["length"])
def final_state_kernel(
    x_ptr,
    initial_ptr,
    sources_ptr,
    state_ptr,
    length,
    channels,
    x_batch,
    x_token,
    x_channel,
    initial_batch,
    initial_channel,
    initial_tap,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, WINDOW)  # in the state, oldest first
    inside_d = d < channels
    inside = place < WIDTH - 1
    x_ptr += b * x_batch
    if initial_ptr is not None:
        initial_ptr += b * initial_batch
    tap = WIDTH - 1 - place  # of a token after the row
    source = _tap_source(sources_ptr, b * (length + 1), length, tap, inside, WIDTH)
    values = _tap_values(
        x_ptr, initial_ptr, source, d, inside_d, x_token, x_channel, initial_channel, initial_tap, WIDTH
    )
    offset = (b * channels + d)[None, :] * (WIDTH - 1) + place[:, None]
    tl.store(state_ptr + offset, values.to(state_ptr.dtype.element_ty), mask=inside[:, None] & inside_d[None, :])


@triton.jit(do_not_specialize=["length"])
def backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    sources_ptr,
    targets_ptr,
    dy_ptr,
    dstate_ptr,
    dx_ptr,
    dinitial_ptr,
    partial_ptr,
    length,
    channels,
    x_batch,
    x_token,
    x_channel,
    weight_channel,
    weight_tap,
    bias_channel,
    initial_batch,
    initial_channel,
    initial_tap,
    dy_batch,
    dy_token,
    dy_channel,
    dstate_batch,
    dstate_channel,
    dstate_tap,
    WIDTH: tl.constexpr,
    HALO: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L) - HALO  # negative: the initial state, as a source is
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_t = t < length
    inside_d = d < channels
    x_ptr += b * x_batch
    if initial_ptr is not None:
        initial_ptr += b * initial_batch
    entry = (b * (length + WIDTH - 1) + t + (WIDTH - 1)) * (WIDTH + 1)  # in the table of targets

    gradient = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
    for tap in tl.static_range(WIDTH):
        # Tap 0 is always needed: the sums over tokens are taken there, where the token that reads is t itself.
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
                        x_ptr,
                        initial_ptr,
                        source,
                        d,
                        inside_d,
                        x_token,
                        x_channel,
                        initial_channel,
                        initial_tap,
                        WIDTH,
                    )
                    w = _tap_weight(weight_ptr, d, inside_d, other, weight_channel, weight_tap, WIDTH)
                    s += values * w[None, :]
                gate = _sigmoid(s)
                ds *= gate * (1.0 + s * (1.0 - gate))
            w = _tap_weight(weight_ptr, d, inside_d, tap, weight_channel, weight_tap, WIDTH)
            gradient += ds * w[None, :]
            if tap == 0 and partial_ptr is not None:
                program = b * tl.num_programs(0) + tl.program_id(0)
                sums_ptr = partial_ptr + program * (WIDTH + 1) * channels + d
                for other in tl.static_range(WIDTH):
                    source = _tap_source(sources_ptr, b * (length + 1), target, other, read, WIDTH)
                    values = _tap_values(
                        x_ptr,
                        initial_ptr,
                        source,
                        d,
                        inside_d,
                        x_token,
                        x_channel,
                        initial_channel,
                        initial_tap,
                        WIDTH,
                    )
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
    x_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    channels,
    x_batch,
    x_channel,
    state_batch,
    state_channel,
    state_tap,
    weight_channel,
    weight_tap,
    bias_channel,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, WINDOW)[None, :].to(tl.int64)  # in the window, oldest first; the last of K is the token
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
        total *= _sigmoid(total)
    tl.store(y_ptr + b * channels + d, total.to(y_ptr.dtype.element_ty), mask=inside_d)
    # Each entry moves to its neighbour's place, which another thread may not have read yet.
    tl.debug_barrier()
    moved = inside & (place >= 1) & (place < WIDTH)
    tl.store(held - state_tap, window.to(state_ptr.dtype.element_ty), mask=moved)
