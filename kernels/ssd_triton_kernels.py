"""The device code of :mod:`.ssd_triton`, whose docstrings give the symbols and the formulas.

Offsets count in 64 bits up to a chunk's first token and a head, and in 32 bits inside the tile from there: that leaves
registers for the tiles.
"""

from __future__ import annotations

from ._triton import tl, triton
from .triton_math import dot, load_gate, narrow


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
def _between(coarse, fine, rows, BY_SOURCE: tl.constexpr):
    """(Q target, Q source) decays from each token to each later one, zero above the diagonal; or the transpose."""
    sums = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    counts = rows[:, None] >= rows[None, :]
    if BY_SOURCE:
        sums = -sums
        counts = rows[:, None] <= rows[None, :]
    # Masked before exp2: on the other side of the diagonal the differences are positive.
    return tl.exp2(tl.where(counts, sums, -256.0))


@triton.jit(do_not_specialize=["length", "first", "count", "stretch", "stretches", "capacity"])
def walk_kernel(
    value_ptr,
    z_ptr,
    key_ptr,
    log_decay_ptr,
    scale_ptr,
    start_ptr,
    states_ptr,
    end_ptr,
    summary_ptr,
    passing_ptr,
    length,
    first,
    count,
    stretch,
    stretches,
    capacity,
    heads,
    per_group,
    value_batch,
    value_token,
    value_head,
    z_batch,
    z_token,
    z_head,
    key_batch,
    key_token,
    key_group,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_Z: tl.constexpr,
    SPLIT: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    walked = stretches
    if SUMMARY:
        walked = stretches - 1  # no one starts where the last ends
    batch = (tl.program_id(2) // walked).to(tl.int64)
    place = tl.program_id(2) % walked
    rows = tl.arange(0, Q)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p = p < WIDTH
    in_n = n < SIZE
    in_state = in_n[:, None] & in_p[None, :]
    inside = n[:, None] + p[None, :] * SIZE  # (P, N) offsets in a head's state
    value_ptr += batch * value_batch + head * value_head
    z_ptr += batch * z_batch + head * z_head
    key_ptr += batch * key_batch + (head // per_group) * key_group
    dtype = key_ptr.dtype.element_ty

    row_state = (batch * heads + head) * (WIDTH * SIZE)
    passing = batch * (stretches - 1) * heads + head  # of the row's first stretch
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    decay = tl.full((), 1.0, dtype=tl.float32)
    if not SUMMARY:
        if HAS_START:
            state = tl.load(start_ptr + row_state + inside, mask=in_state, other=0.0)
        for before in range(place):
            at = passing + before * heads
            left = tl.load(summary_ptr + at * (WIDTH * SIZE) + inside, mask=in_state, other=0.0)
            state = state * tl.load(passing_ptr + at) + left
    for step in range(place * stretch, tl.minimum((place + 1) * stretch, count)):
        index = step
        if REVERSE:
            index = count - 1 - step
        if not SUMMARY:
            at = ((batch * capacity + index) * heads + head) * (WIDTH * SIZE)
            tl.store(states_ptr + at + inside, narrow(state, dtype, EMULATE), mask=in_state)

        begin = (tl.zeros((), dtype=tl.int64) + first + index) * Q
        present = rows < tl.minimum(length - begin, Q).to(tl.int32)
        scalars = (batch * length + begin) * heads + head
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        weight, whole = _to_end(coarse, fine, rows, Q)
        if REVERSE:
            weight = tl.exp2(coarse + fine)
        if HAS_SCALE:
            weight *= tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)
        in_value = present[:, None] & in_p[None, :]
        value = tl.load(
            value_ptr + begin * value_token + rows[:, None] * value_token + p[None, :], mask=in_value, other=0.0
        ).to(tl.float32)  # (Q, P)
        if HAS_Z:
            _, gate = load_gate(z_ptr + begin * z_token, rows[:, None] * z_token + p[None, :], in_value)
            value *= gate
        key = tl.load(
            key_ptr + begin * key_token + rows[:, None] * key_token + n[None, :],
            mask=present[:, None] & in_n[None, :],
            other=0.0,
        )  # (Q, N)
        weighted = value * weight[:, None]
        state *= whole
        decay *= whole
        if SPLIT:
            # The state adds up a whole row. Two half-precision terms keep 16 or more bits of the weighted values,
            # where rounding them once would leave 8: the final state is as good as float32 sums of the given inputs.
            high = narrow(weighted, dtype, EMULATE)
            low = narrow(weighted - high.to(tl.float32), dtype, EMULATE)
            state = dot(tl.trans(key), high, state, EMULATE)
            state = dot(tl.trans(key), low, state, EMULATE)
        else:
            state = dot(tl.trans(key), weighted, state, EMULATE)
    if SUMMARY:
        at = passing + place * heads
        tl.store(summary_ptr + at * (WIDTH * SIZE) + inside, state, mask=in_state)
        tl.store(passing_ptr + at, decay)  # the same from every tile of the head
    elif place == stretches - 1:
        tl.store(end_ptr + row_state + inside, state, mask=in_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def output_kernel(
    x_ptr,
    log_decay_ptr,
    scale_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
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
    D_head,
    D_width,
    z_batch,
    z_token,
    z_head,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
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
    mix = dot(C, tl.trans(B), None, EMULATE) * _between(coarse, fine, rows, False)  # (Q target, Q source)
    if HAS_SCALE:
        mix *= tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)[None, :]
    mix = narrow(mix, dtype, EMULATE)
    from_start = tl.exp2(coarse + fine)[:, None]
    x_ptr += batch * x_batch + begin * x_token + head * x_head
    D_ptr += head * D_head
    z_ptr += batch * z_batch + begin * z_token + head * z_head
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
        y = dot(C, tl.trans(state), None, EMULATE) * from_start
        y = dot(mix, x, y, EMULATE)
        if HAS_D:
            y += x.to(tl.float32) * tl.load(D_ptr + p * D_width, mask=in_p, other=0.0)[None, :]
        if HAS_Z:
            _, gate = load_gate(z_ptr, rows[:, None] * z_token + p[None, :], in_x)
            y *= gate
        y = narrow(y, y_ptr.dtype.element_ty, EMULATE)
        tl.store(y_ptr + rows[:, None] * (heads * WIDTH) + p[None, :], y, mask=in_x)


@triton.jit(do_not_specialize=["length", "chunks", "first", "count", "capacity"])
def chunk_gradients_kernel(
    x_ptr,
    log_decay_ptr,
    scale_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    states_ptr,
    dy_ptr,
    dstates_ptr,
    dx_ptr,
    dlog_decay_ptr,
    dscale_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    dz_ptr,
    length,
    chunks,
    first,
    count,
    capacity,
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
    D_head,
    D_width,
    z_batch,
    z_token,
    z_head,
    dy_batch,
    dy_token,
    dy_head,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    parts = heads // TOGETHER
    part = program % parts
    index = (program // parts) % count
    batch = program // parts // count
    chunk = first + index
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
    # This kernel is short of registers. What is computed elementwise enters products on the right, by way of shared
    # memory, where the left would have it a second time in the layout of an operand; and products are added up with a
    # factor each, because one product that starts from another makes the compiler lay both out twice over the warps.
    scores = dot(B, tl.trans(C), None, EMULATE)  # (Q source, Q target)
    dB = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    dC = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    x_ptr += batch * x_batch + begin * x_token
    z_ptr += batch * z_batch + begin * z_token
    dy_ptr += batch * dy_batch + begin * dy_token
    for place in range(TOGETHER):
        head = part * TOGETHER + place
        scalars = first_row + head
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        to_end, whole = _to_end(coarse, fine, rows, Q)
        from_start = tl.exp2(coarse + fine)
        scale = tl.full((Q,), 1.0, dtype=tl.float32)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)
        mix = narrow(scores * _between(coarse, fine, rows, True), dtype, EMULATE)

        dmix = tl.zeros((Q, Q), dtype=tl.float32)  # x_j . dy_i
        read = tl.zeros((Q,), dtype=tl.float32)  # by each token from the state entering
        left = tl.zeros((Q,), dtype=tl.float32)  # by each token in the state leaving, but for its scale
        passed = tl.zeros((BLOCK_P,), dtype=tl.float32)  # from the one to the other
        of_head = (batch * chunks + chunk) * heads + head
        state_ptr = states_ptr + of_head * (WIDTH * SIZE)
        dstate_ptr = dstates_ptr + ((batch * capacity + index) * heads + head) * (WIDTH * SIZE)
        for begin_p in range(0, WIDTH, BLOCK_P):
            p = begin_p + tl.arange(0, BLOCK_P)
            in_p = p < WIDTH
            in_x = present[:, None] & in_p[None, :]
            in_state = in_p[:, None] & in_n[None, :]
            inside = p[:, None] * SIZE + n[None, :]
            dense = scalars * WIDTH + rows[:, None] * (heads * WIDTH) + p[None, :]
            x = tl.load(x_ptr + head * x_head + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
            dy = tl.load(dy_ptr + head * dy_head + rows[:, None] * dy_token + p[None, :], mask=in_x, other=0.0)
            state = tl.load(state_ptr + inside, mask=in_state, other=0.0)  # (P, N)
            carried = dot(C, tl.trans(state), None, EMULATE) * from_start[:, None]  # (Q, P), a term of y
            if HAS_D:
                D = tl.load(D_ptr + head * D_head + p * D_width, mask=in_p, other=0.0)
            through = dy.to(tl.float32)  # what reaches the output before the gate
            if HAS_Z:
                smooth, gate = load_gate(z_ptr + head * z_head, rows[:, None] * z_token + p[None, :], in_x)
                slope = through * (smooth + gate * (1.0 - smooth))
                dz = carried * slope
                scaled = narrow(x.to(tl.float32) * scale[:, None], dtype, EMULATE)
                dz += dot(tl.trans(mix), scaled, None, EMULATE) * slope
                if HAS_D:
                    dz += x.to(tl.float32) * D[None, :] * slope
                tl.store(dz_ptr + dense, narrow(dz, dz_ptr.dtype.element_ty, EMULATE), mask=in_x)
                through *= gate
                dy = narrow(through, dtype, EMULATE)
            dmix = dot(x, tl.trans(dy), dmix, EMULATE)
            read += tl.sum(carried * through, 1)
            weighted = narrow(through * from_start[:, None], dtype, EMULATE)
            dC = dot(tl.trans(state), tl.trans(weighted), dC, EMULATE)

            dstate = tl.load(dstate_ptr + inside, mask=in_state, other=0.0)
            passed += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
            du = dot(B, tl.trans(dstate), None, EMULATE) * to_end[:, None]  # (Q, P), the gradient of scale * x
            left += tl.sum(du * x.to(tl.float32), 1)
            weighted = narrow(x.to(tl.float32) * (to_end * scale)[:, None], dtype, EMULATE)
            dB = dot(tl.trans(dstate), tl.trans(weighted), dB, EMULATE)

            dx = dot(mix, dy, None, EMULATE) * scale[:, None] + du * scale[:, None]
            if HAS_D:
                dx += through * D[None, :]
                skipped = tl.sum(through * x.to(tl.float32), 0)
                tl.store(dD_ptr + of_head * WIDTH + p, skipped, mask=in_p)
            tl.store(dx_ptr + dense, narrow(dx, dtype, EMULATE), mask=in_x)

        # Loaded and summed again: kept, the decays between tokens would take up registers all along the loop.
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        dmix *= _between(coarse, fine, rows, True)
        flow = dmix * scores
        if HAS_SCALE:
            tl.store(dscale_ptr + scalars + rows * heads, tl.sum(flow, 1) + left, mask=present)
            dmix *= scale[:, None]
            flow *= scale[:, None]
            left *= scale
        half = narrow(dmix, dtype, EMULATE)
        dC = dot(tl.trans(B), half, dC, EMULATE)
        dB = dot(tl.trans(C), tl.trans(half), dB, EMULATE)

        # What passes from before k to k or later: from token to token, into the state leaving, from the one entering.
        flow = tl.cumsum(flow, 1, reverse=True) + left[:, None]
        crossing = tl.sum(tl.where(rows[:, None] < rows[None, :], flow, 0.0), 0)
        crossing += tl.cumsum(read, 0, reverse=True) + whole * tl.sum(passed, 0)
        tl.store(dlog_decay_ptr + scalars + rows * heads, crossing, mask=present)

    # (B, capacity Q, parts, N)
    partial = ((batch * capacity + index) * Q * parts + part) * SIZE
    offsets = rows[None, :] * (parts * SIZE) + n[:, None]
    in_partial = in_n[:, None] & present[None, :]
    tl.store(dB_ptr + partial + offsets, dB, mask=in_partial)
    tl.store(dC_ptr + partial + offsets, dC, mask=in_partial)
