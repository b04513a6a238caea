"""The device code of :mod:`.ssd_triton`, whose docstrings give the symbols and the formulas.

Offsets count in 64 bits up to a chunk's first token and a head, and in 32 bits inside the tile from there: that leaves
registers for the tiles.
"""

from __future__ import annotations

from ._triton import tl, triton


# Triton's interpreter keeps bfloat16 as bit patterns: it multiplies those in a dot product, and it cuts a float32 off
# where a device rounds to the nearest. EMULATE makes the next two do there what the compiled code does.
@triton.jit
def _dot(a, b, acc, EMULATE: tl.constexpr):
    """acc + a b, summed in float32; float32 operands are multiplied as such, not as TF32."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def _narrow(values, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Round float32 values to the nearest of `dtype`, ties to even."""
    if EMULATE and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _decay_sums(log_decay_ptr, offsets, mask):
    """Inclusive sums, in two parts, of a chunk's log2-decays.

    A decay of less than 2^-256 is zero in float32, and so is every product with it; the bound makes -inf finite. The
    first part sums multiples of 2^-9 up to 64 * 256, which float32 holds exactly; the second sums rests of at most
    2^-10. So a difference of two sums is as good as the sum of the terms between: with one sum, at -4000, what a mild
    decay adds would be lost.
    """
    a = tl.load(log_decay_ptr + offsets, mask=mask, other=0.0) * 1.4426950408889634
    a = tl.where(a < -256.0, -256.0, a)  # keeps a NaN, unlike maximum
    coarse = tl.floor(a * 512.0 + 0.5) * 0.001953125
    return tl.cumsum(coarse, 0), tl.cumsum(a - coarse, 0)


@triton.jit
def _to_end(coarse, fine, rows, Q: tl.constexpr):
    """The decays from each token to the chunk's end, and the one over the whole chunk."""
    last = rows == Q - 1
    coarse_end = tl.sum(tl.where(last, coarse, 0.0), 0)
    fine_end = tl.sum(tl.where(last, fine, 0.0), 0)
    return tl.exp2((coarse_end - coarse) + (fine_end - fine)), tl.exp2(coarse_end + fine_end)


@triton.jit
def _between(coarse, fine, rows):
    """(Q target, Q source) decays from each token to each later one; zero above the diagonal."""
    sums = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    # Masked before exp2: above the diagonal the differences are positive.
    return tl.exp2(tl.where(rows[:, None] >= rows[None, :], sums, -256.0))


@triton.jit(do_not_specialize=["length", "chunks"])
def walk_kernel(
    value_ptr,
    key_ptr,
    log_decay_ptr,
    scale_ptr,
    start_ptr,
    states_ptr,
    end_ptr,
    length,
    chunks,
    heads,
    per_group,
    value_batch,
    value_token,
    value_head,
    key_batch,
    key_token,
    key_group,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, Q)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p = p < WIDTH
    in_n = n < SIZE
    in_state = in_p[:, None] & in_n[None, :]
    inside = p[:, None] * SIZE + n[None, :]  # (P, N) offsets in a head's state
    value_ptr += batch * value_batch + head * value_head
    key_ptr += batch * key_batch + (head // per_group) * key_group
    dtype = key_ptr.dtype.element_ty

    row_state = (batch * heads + head) * (WIDTH * SIZE)
    state = tl.load(start_ptr + row_state + inside, mask=in_state, other=0.0)
    for step in range(chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        at = ((batch * chunks + chunk) * heads + head) * (WIDTH * SIZE)
        tl.store(states_ptr + at + inside, _narrow(state, dtype, EMULATE), mask=in_state)

        begin = (tl.zeros((), dtype=tl.int64) + chunk) * Q
        present = rows < tl.minimum(length - begin, Q).to(tl.int32)
        scalars = (batch * length + begin) * heads + head
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        weight, whole = _to_end(coarse, fine, rows, Q)
        if REVERSE:
            weight = tl.exp2(coarse + fine)
        if HAS_SCALE:
            weight *= tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)
        value = tl.load(
            value_ptr + begin * value_token + rows[:, None] * value_token + p[None, :],
            mask=present[:, None] & in_p[None, :],
            other=0.0,
        )  # (Q, P)
        value = _narrow(value.to(tl.float32), dtype, EMULATE)
        key = tl.load(
            key_ptr + begin * key_token + rows[:, None] * key_token + n[None, :],
            mask=present[:, None] & in_n[None, :],
            other=0.0,
        )  # (Q, N)
        weighted = key.to(tl.float32) * weight[:, None]
        state *= whole
        if SPLIT:
            # The state adds up a whole row. Two half-precision terms keep 16 or more bits of the weights, where
            # rounding them once would leave 8: the final state is as good as float32 sums of the given inputs.
            high = _narrow(weighted, dtype, EMULATE)
            low = _narrow(weighted - high.to(tl.float32), dtype, EMULATE)
            state = _dot(tl.trans(value), high, state, EMULATE)
            state = _dot(tl.trans(value), low, state, EMULATE)
        else:
            state = _dot(tl.trans(value), weighted, state, EMULATE)
    tl.store(end_ptr + row_state + inside, state, mask=in_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def output_kernel(
    x_ptr,
    log_decay_ptr,
    scale_ptr,
    B_ptr,
    C_ptr,
    states_ptr,
    y_ptr,
    length,
    chunks,
    heads,
    per_group,
    x_batch,
    x_token,
    x_head,
    B_batch,
    B_token,
    B_group,
    C_batch,
    C_token,
    C_group,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # neighbours are heads of one chunk, which read the same B and C
    head = program % heads
    chunk = (program // heads) % chunks
    batch = program // heads // chunks
    group = head // per_group
    rows = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    in_n = n < SIZE
    begin = chunk * Q
    present = rows < tl.minimum(length - begin, Q).to(tl.int32)
    in_maps = present[:, None] & in_n[None, :]
    first_row = (batch * length + begin) * heads
    dtype = x_ptr.dtype.element_ty
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    B = tl.load(B_ptr + rows[:, None] * B_token + n[None, :], mask=in_maps, other=0.0)  # (Q, N)
    C = tl.load(C_ptr + rows[:, None] * C_token + n[None, :], mask=in_maps, other=0.0)
    scalars = first_row + head
    coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
    mix = _dot(C, tl.trans(B), None, EMULATE) * _between(coarse, fine, rows)  # (Q target, Q source)
    if HAS_SCALE:
        mix *= tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)[None, :]
    mix = _narrow(mix, dtype, EMULATE)
    from_start = tl.exp2(coarse + fine)[:, None]
    x_ptr += batch * x_batch + begin * x_token + head * x_head
    y_ptr += scalars * WIDTH
    states_ptr += program * (WIDTH * SIZE)
    for first in range(0, WIDTH, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        in_p = p < WIDTH
        in_x = present[:, None] & in_p[None, :]
        state = tl.load(
            states_ptr + p[:, None] * SIZE + n[None, :], mask=in_p[:, None] & in_n[None, :], other=0.0
        )  # (P, N)
        x = tl.load(x_ptr + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
        y = _dot(C, tl.trans(state), None, EMULATE) * from_start
        y = _dot(mix, x, y, EMULATE)
        y = _narrow(y, y_ptr.dtype.element_ty, EMULATE)
        tl.store(y_ptr + rows[:, None] * (heads * WIDTH) + p[None, :], y, mask=in_x)


@triton.jit(do_not_specialize=["length", "chunks"])
def chunk_gradients_kernel(
    x_ptr,
    log_decay_ptr,
    scale_ptr,
    B_ptr,
    C_ptr,
    states_ptr,
    dy_ptr,
    dstates_ptr,
    dx_ptr,
    dlog_decay_ptr,
    dscale_ptr,
    dB_ptr,
    dC_ptr,
    length,
    chunks,
    heads,
    per_group,
    x_batch,
    x_token,
    x_head,
    B_batch,
    B_token,
    B_group,
    C_batch,
    C_token,
    C_group,
    dy_batch,
    dy_token,
    dy_head,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    parts = heads // TOGETHER
    part = program % parts
    chunk = (program // parts) % chunks
    batch = program // parts // chunks
    group = part * TOGETHER // per_group
    rows = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    in_n = n < SIZE
    begin = chunk * Q
    present = rows < tl.minimum(length - begin, Q).to(tl.int32)
    in_maps = present[:, None] & in_n[None, :]
    first_row = (batch * length + begin) * heads
    dtype = x_ptr.dtype.element_ty
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    B = tl.load(B_ptr + rows[:, None] * B_token + n[None, :], mask=in_maps, other=0.0)  # (Q, N)
    C = tl.load(C_ptr + rows[:, None] * C_token + n[None, :], mask=in_maps, other=0.0)
    scores = _dot(C, tl.trans(B), None, EMULATE)  # (Q target, Q source)
    dB = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    dC = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    x_ptr += batch * x_batch + begin * x_token
    dy_ptr += batch * dy_batch + begin * dy_token
    for index in range(TOGETHER):
        head = part * TOGETHER + index
        scalars = first_row + head
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        between = _between(coarse, fine, rows)
        to_end, whole = _to_end(coarse, fine, rows, Q)
        from_start = tl.exp2(coarse + fine)
        mix = _narrow(scores * between, dtype, EMULATE)
        scale = tl.full((Q,), 1.0, dtype=tl.float32)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)

        dmix = tl.zeros((Q, Q), dtype=tl.float32)  # dy_i . x_j
        dscale = tl.zeros((Q,), dtype=tl.float32)
        read = tl.zeros((Q,), dtype=tl.float32)  # by each token from the state entering
        left = tl.zeros((Q,), dtype=tl.float32)  # by each token in the state leaving
        passed = tl.zeros((BLOCK_P,), dtype=tl.float32)  # from the one to the other
        at = ((batch * chunks + chunk) * heads + head) * (WIDTH * SIZE)
        for first in range(0, WIDTH, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            in_p = p < WIDTH
            in_x = present[:, None] & in_p[None, :]
            in_state = in_p[:, None] & in_n[None, :]
            inside = p[:, None] * SIZE + n[None, :]
            x = tl.load(x_ptr + head * x_head + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
            dy = tl.load(dy_ptr + head * dy_head + rows[:, None] * dy_token + p[None, :], mask=in_x, other=0.0)
            dy = _narrow(dy.to(tl.float32), dtype, EMULATE)
            dmix = _dot(dy, tl.trans(x), dmix, EMULATE)

            state = tl.load(states_ptr + at + inside, mask=in_state, other=0.0)  # (P, N)
            dstate = tl.load(dstates_ptr + at + inside, mask=in_state, other=0.0)
            passed += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
            carried = _dot(C, tl.trans(state), None, EMULATE) * from_start[:, None]  # (Q, P), a term of y
            read += tl.sum(carried * dy.to(tl.float32), 1)
            weighted = _narrow(dy.to(tl.float32) * from_start[:, None], dtype, EMULATE)
            dC = _dot(weighted, state, dC, EMULATE)

            du = _dot(B, tl.trans(dstate), None, EMULATE) * to_end[:, None]  # (Q, P), the gradient of scale * x
            left += tl.sum(du * x.to(tl.float32), 1) * scale
            weighted = _narrow(x.to(tl.float32) * (to_end * scale)[:, None], dtype, EMULATE)
            dB = _dot(weighted, dstate, dB, EMULATE)

            du = _dot(tl.trans(mix), dy, du, EMULATE)
            dscale += tl.sum(du * x.to(tl.float32), 1)
            dx = _narrow(du * scale[:, None], dtype, EMULATE)
            tl.store(dx_ptr + scalars * WIDTH + rows[:, None] * (heads * WIDTH) + p[None, :], dx, mask=in_x)

        if HAS_SCALE:
            tl.store(dscale_ptr + scalars + rows * heads, dscale, mask=present)
        dmix *= between * scale[None, :]
        half = _narrow(dmix, dtype, EMULATE)
        dC = _dot(half, B, dC, EMULATE)
        dB = _dot(tl.trans(half), C, dB, EMULATE)

        # What passes from token m or before to a token after m is the gradient at m + 1.
        kept = whole * tl.sum(passed, 0)
        flow = tl.cumsum(dmix * scores, 1) + read[:, None]
        later = rows[:, None] > rows[None, :]
        crossing = tl.sum(tl.where(later, flow, 0.0), 0) + tl.cumsum(left, 0) + kept
        following = (rows < Q - 1) & (rows + 1 < length - begin)
        tl.store(dlog_decay_ptr + scalars + (rows + 1) * heads, crossing, mask=following)
        tl.store(dlog_decay_ptr + scalars, tl.sum(read, 0) + kept)

    partial = first_row // TOGETHER + part
    dB_ptr += partial * SIZE
    dC_ptr += partial * SIZE
    offsets = rows[:, None] * (parts * SIZE) + n[None, :]
    tl.store(dB_ptr + offsets, dB, mask=in_maps)
    tl.store(dC_ptr + offsets, dC, mask=in_maps)
