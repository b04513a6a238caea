"""`bounded_attention`, forward, and `bounded_attention_step` in Triton: launches and kernels.

Symbols as in `bounded_attention.py`: B batch, H query heads, KV key-value heads, J = H / KV query heads of a group, P
head width, N rows of the memory, w window, s sinks, C chunk size, S slots of a head with its sinks; R rows of a tile.

A program handles the rows of a key-value head. `step_kernel` writes the new token, attends and adds the attention to
the scores; it walks over the rows twice, since scores take normalised weights. Rows of 8 bits are multiplied as they
are: scores are q . k_8 times the scale of the key, and the weights of values are multiplied by theirs. `evict_kernel`
then lets the chunk that leaves the window compete for the slots if it is complete, without the host having to check.

`chunks_kernel` reads a prompt. A program takes the chunks of a document in turn for a key-value head, since the slots
of a chunk depend on the attention in all chunks before it; torch launches a dozen operations for each. Keys, values and
scores stay in the table of lines. What the slots hold is a list of lines for each chunk, which is all that the backward
needs.

There are no atomics: every sum has a fixed order, and programs share no rows. Offsets are 64-bit up to a head and
32-bit inside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import INTERPRETED, tl, triton
from .triton_math import dot, narrow, sigmoid, strides, unit_stride

WIDEST_HEAD = 256
# Rows of a tile and warps, by the largest head width. Compiled by Triton 3.9 for sm_90 nothing spills up to a width of
# 128, and 400 bytes of registers per thread at 256. No tile has been timed on a device.
_ROWS = {64: (32, 4), 128: (16, 8), 256: (16, 8)}
# Queries at most, rows and warps of a tile of `chunks_kernel`. Compiled by Triton 3.9 for sm_90, about 100 bytes per
# thread spill up to a width of 64 and 200 up to 128. Its products are three of TF32 each, almost as precise as float32,
# which would take twice the time (predicted).
_CHUNKS = {64: (64, 32, 4), 128: (32, 32, 4), 256: (16, 16, 8)}


def bounded_attention_step_triton(
    q: Tensor, k: Tensor, v: Tensor, memory: Any, rows: Any, window: int, sinks: int, scale: float, softcap: float
) -> Tensor:
    """Run a step whose arguments are checked.

    Args:
        q: (B, H, P) queries, not float64.
        k, v: (B, KV, P) key and value of the new token.
        memory: the `BoundedMemory`, contiguous, with float32 scores; changed in place.
        rows: the constants of the step, a `_Rows`.
        window: w.
        sinks: s.
        scale: factor of the scores of the softmax.
        softcap: limit of the scores; 0: none.

    Returns:
        (B, H, P) in the dtype of q.
    """
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, width = q.shape
    groups, number, chunk_size = k.shape[1], memory.keys.shape[1], len(rows.steps)
    o, norms = q.new_empty(q.shape), torch.empty_like(memory.scores)
    block_p = max(16, triton.next_power_of_2(width))
    members = heads // groups
    shared, (size, warps) = {"WIDTH": width, "BLOCK_P": block_p}, _ROWS[max(64, block_p)]
    with torch.cuda.device_of(q):
        step_kernel[(batch, groups)](
            *(q, k, v, memory.keys, memory.values, memory.keys_scales, memory.values_scales, memory.scores),
            *(memory.positions, rows.windows, rows.begun, rows.rest, norms, o, scale, softcap, number, window),
            *(chunk_size, *strides(2, q, k, v)),
            **shared,
            MEMBERS=members,
            BLOCK_J=max(16, triton.next_power_of_2(members)),
            SOFTCAP=softcap > 0,
            R=size,
            num_warps=warps,
            EMULATE=INTERPRETED,
        )
        if rows.slots.numel():
            evict_kernel[(batch, groups)](
                *(memory.keys, memory.values, memory.keys_scales, memory.values_scales, memory.scores),
                *(memory.positions, rows.windows, norms, number, window, sinks, chunk_size),
                **shared,
                R=64,
                BLOCK=max(16, triton.next_power_of_2(rows.slots.shape[1] + chunk_size)),
            )
    return o


def bounded_attention_chunks_triton(
    queries: Tensor,
    lines: Tensor,
    marks: Tensor,
    fading: Tensor,
    fades: Tensor | None,
    first: Tensor,
    chunks: Tensor,
    capacity: Tensor,
    held: Tensor,
    old: int,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Run the chunks of all documents in order, choosing what the slots hold.

    Symbols as in `bounded_attention_chunks.py`: n chunks, R documents, h heads, G = R h, J query heads of each; T lines
    of a table, and M slots of the head that has most.

    Args:
        queries: (n, R, h, J, C, P) contiguous, scaled.
        lines: (R, h, T, 2 P) contiguous keys and values; the last w + n C are those of positions.
        marks: (5, G, T) contiguous marks of the lines; the scores are changed in place.
        fading: (n, G, J C) contiguous factors of the attention that each query gives.
        fades: (n, G) contiguous factors of the attention given before; None: 1.
        first: (R) int64 position of the first line of positions.
        chunks: (R) int64 number of chunks to run for each document.
        capacity: (h) int64 slots of each head.
        held: (G, M) int32 lines in the slots at the start, negative where there is none.
        old: first line of positions: M with a memory to go on from, else 0.
        window: w.
        softcap: limit of the scores; 0: none.

    Returns:
        (n, G, J C, P) outputs, of chunks that are run, and (n + 1, G, M + C) int32 lines that the slots hold at the
        start of each chunk and, last, at the end; negative where there is none.
    """
    n, documents, heads, members, chunk_size, width = queries.shape
    groups, slots = documents * heads, held.shape[1]
    outputs = queries.new_zeros(n, groups, members * chunk_size, width)
    seen = torch.full((n + 1, groups, slots + chunk_size), -1, dtype=torch.int32, device=lines.device)
    seen[0, :, :slots] = held
    sums = queries.new_empty(groups, members * chunk_size)
    block_p = max(16, triton.next_power_of_2(width))
    most, size, warps = _CHUNKS[max(64, block_p)]
    block_q = max(16, min(most, triton.next_power_of_2(members * chunk_size)))
    with torch.cuda.device_of(queries):
        chunks_kernel[(groups,)](
            *(queries, lines, marks, fading, fades, first, chunks, capacity, seen, sums, outputs),
            *(softcap, n, heads, lines.shape[2], window, members * chunk_size, slots, old),
            CHUNK=chunk_size,
            WIDTH=width,
            BLOCK_P=block_p,
            BLOCK_Q=block_q,
            SOFTCAP=softcap > 0,
            R=size,
            BLOCK=max(16, triton.next_power_of_2(slots + chunk_size)),
            num_warps=warps,
        )
    return outputs, seen


@triton.jit
def _bounds(windows_ptr, head, window):
    """Return the first row of a head, and that of its window."""
    near = tl.load(windows_ptr + head)
    # Heads follow each other. The first one's address stays inside the table.
    before = tl.load(windows_ptr + tl.maximum(head - 1, 0)) + window
    return tl.where(head == 0, 0, before).to(tl.int32), near.to(tl.int32)


@triton.jit
def _last_position(positions_ptr, near, window, R: tl.constexpr):
    """Return the largest position in the window."""
    r = tl.arange(0, R)
    latest = tl.full((R,), -1, dtype=tl.int64)
    for at in range(0, window, R):
        found = tl.load(positions_ptr + near + at + r, mask=at + r < window, other=-1)
        latest = tl.maximum(latest, found)
    return tl.max(latest, 0)


@triton.jit
def _held(x_ptr, held_ptr, QUANTISED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, EMULATE: tl.constexpr):
    """Load the vector of a new token; return it as the memory holds it and its scale (1 without), both in float32."""
    p = tl.arange(0, BLOCK_P)
    x = tl.load(x_ptr + p, mask=p < WIDTH, other=0.0).to(tl.float32)
    scale = tl.max(tl.full((BLOCK_P,), 1.0, dtype=tl.float32), 0)
    if QUANTISED:
        # As `quantise_rows`, to the bit. A maximum may drop NaN: the scale of a vector with a NaN is NaN.
        most = tl.max(tl.where(x == x, tl.abs(x), 0.0), 0)
        most = tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), most)
        scale = narrow(tl.div_rn(most, 127.0 * scale), tl.bfloat16, EMULATE).to(tl.float32)
        x = tl.div_rn(x, tl.zeros((BLOCK_P,), dtype=tl.float32) + scale)
        # Where the scale is zero, infinite or NaN, so are the quotients, whose integers have no effect.
        x = tl.where(tl.abs(x) < 256.0, x, 0.0)
        # To the nearest integer, ties to even: float32 numbers from 2^23 on have no fraction.
        x = (x + 12582912.0) - 12582912.0
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    else:
        x = narrow(x, held_ptr.dtype.element_ty, EMULATE).to(tl.float32)
    return x, scale


@triton.jit
def _row_values(x_ptr, scales_ptr, row, new, new_x, new_scale, end, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load (R, BLOCK_P) rows and their (R) scales, with the new token's in its place, in float32."""
    p = tl.arange(0, BLOCK_P)
    mask = (row < end)[:, None] & (p < WIDTH)[None, :]
    x = tl.load(x_ptr + row[:, None] * WIDTH + p[None, :], mask=mask, other=0).to(tl.float32)
    x = tl.where((row == new)[:, None], new_x[None, :], x)
    scales = tl.where(row == new, new_scale, 1.0)
    if scales_ptr is not None:
        loaded = tl.load(scales_ptr + row, mask=row < end, other=0.0).to(tl.float32)
        scales = tl.where(row == new, new_scale, loaded)
    return x, scales


@triton.jit
def _capped(scores, softcap):
    """Return softcap tanh(scores / softcap)."""
    return softcap * (2.0 * sigmoid(2.0 * scores / softcap) - 1.0)


@triton.jit
def _scores(
    q, k, key_scales, positions_ptr, row, new, now, near, end, oldest, scale, softcap,
    SOFTCAP: tl.constexpr, BLOCK_J: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return the (BLOCK_J, R) scores to base 2, minus infinity at rows that no query sees."""
    position = tl.load(positions_ptr + row, mask=row < end, other=-1)
    position = tl.where(row == new, now, position)
    seen = (row < end) & (position >= tl.where(row >= near, oldest, 0))
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_J, R), dtype=tl.float32), False) * (scale * key_scales)[None, :]
    if SOFTCAP:
        scores = _capped(scores, softcap)
    return tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))  # log2(e)


@triton.jit(do_not_specialize=["number"])
def step_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, keys_scales_ptr, values_scales_ptr, scores_ptr, positions_ptr,
    windows_ptr, begun_ptr, rest_ptr, norms_ptr, o_ptr, scale, softcap, number, window, chunk_size,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_J: tl.constexpr, SOFTCAP: tl.constexpr,
    R: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Write the new token of a head, attend, and update the scores; keep the norms of the values for the eviction."""
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    keys_ptr += batch * number * WIDTH
    values_ptr += batch * number * WIDTH
    scores_ptr += batch * number
    positions_ptr += batch * number
    norms_ptr += batch * number
    QUANTISED: tl.constexpr = keys_scales_ptr is not None
    if QUANTISED:
        keys_scales_ptr += batch * number
        values_scales_ptr += batch * number
    start, near = _bounds(windows_ptr, head, window)
    end = near + window
    now = _last_position(positions_ptr, near, window, R) + 1
    age = now % chunk_size
    new = near + (now % window).to(tl.int32)
    oldest = tl.maximum((now // chunk_size + 1) * chunk_size - window, 0)
    new_k, k_scale = _held(k_ptr + batch * k_batch + head * k_head, keys_ptr, QUANTISED, WIDTH, BLOCK_P, EMULATE)
    new_v, v_scale = _held(v_ptr + batch * v_batch + head * v_head, values_ptr, QUANTISED, WIDTH, BLOCK_P, EMULATE)
    j = tl.arange(0, BLOCK_J)
    p = tl.arange(0, BLOCK_P)
    r = tl.arange(0, R)
    mask = (j < MEMBERS)[:, None] & (p < WIDTH)[None, :]
    q_ptr += batch * q_batch + head * MEMBERS * q_head
    q = tl.load(q_ptr + j[:, None] * q_head + p[None, :], mask=mask, other=0.0).to(tl.float32)

    highest = tl.full((BLOCK_J,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_J,), dtype=tl.float32)
    o = tl.zeros((BLOCK_J, BLOCK_P), dtype=tl.float32)
    for at in range(start, end, R):
        row = at + r
        k, key_scales = _row_values(keys_ptr, keys_scales_ptr, row, new, new_k, k_scale, end, WIDTH, BLOCK_P)
        scores = _scores(
            q, k, key_scales, positions_ptr, row, new, now, near, end, oldest, scale, softcap, SOFTCAP, BLOCK_J, R
        )
        raised = tl.maximum(highest, tl.max(scores, 1))
        # While nothing has been seen, -inf minus -inf would be NaN.
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        total = total * kept + tl.sum(weights, 1)
        v, scales = _row_values(values_ptr, values_scales_ptr, row, new, new_v, v_scale, end, WIDTH, BLOCK_P)
        tl.store(norms_ptr + row, tl.sqrt(tl.sum(v * v, 1)) * scales, mask=row < end)
        o = dot(weights * scales[None, :], v, o * kept[:, None], False)
        highest = raised
    o_ptr += (batch * tl.num_programs(1) + head) * (MEMBERS * WIDTH)
    o = narrow(o / total[:, None], o_ptr.dtype.element_ty, EMULATE)
    tl.store(o_ptr + j[:, None] * WIDTH + p[None, :], o, mask=mask)
    lse = highest + tl.log2(total)

    begun = tl.load(begun_ptr + age * number + near)
    rest = tl.load(rest_ptr + age * number + near)
    for at in range(start, end, R):
        row = at + r
        k, key_scales = _row_values(keys_ptr, keys_scales_ptr, row, new, new_k, k_scale, end, WIDTH, BLOCK_P)
        scores = _scores(
            q, k, key_scales, positions_ptr, row, new, now, near, end, oldest, scale, softcap, SOFTCAP, BLOCK_J, R
        )
        weights = tl.where((j < MEMBERS)[:, None], tl.exp2(scores - lse[:, None]), 0.0)
        held = tl.load(scores_ptr + row, mask=(row < end) & (row != new), other=0.0)
        tl.store(scores_ptr + row, held * begun + tl.sum(weights, 0) * rest, mask=row < end)
    # No row of the tiles is read after this: a tile takes the new token from registers.
    new_k, new_v = (
        narrow(new_k, keys_ptr.dtype.element_ty, EMULATE),
        narrow(new_v, values_ptr.dtype.element_ty, EMULATE),
    )
    tl.store(keys_ptr + new * WIDTH + p, new_k, mask=p < WIDTH)
    tl.store(values_ptr + new * WIDTH + p, new_v, mask=p < WIDTH)
    tl.store(positions_ptr + new, now)
    if QUANTISED:
        tl.store(keys_scales_ptr + new, narrow(k_scale, tl.bfloat16, EMULATE))
        tl.store(values_scales_ptr + new, narrow(v_scale, tl.bfloat16, EMULATE))


@triton.jit
def _copy(x_ptr, source, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a row of a tensor."""
    p = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + source * WIDTH + p, mask=p < WIDTH)
    tl.store(x_ptr + target * WIDTH + p, x, mask=p < WIDTH)


@triton.jit(do_not_specialize=["number"])
def evict_kernel(
    keys_ptr, values_ptr, keys_scales_ptr, values_scales_ptr, scores_ptr, positions_ptr, windows_ptr, norms_ptr,
    number, window, sinks, chunk_size,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Let the C oldest positions of a head's window compete for its slots, if its chunk is complete.

    Of the slots and of those positions, C are dropped. Positions that win are copied to slots that lose.
    """
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    keys_ptr += batch * number * WIDTH
    values_ptr += batch * number * WIDTH
    scores_ptr += batch * number
    positions_ptr += batch * number
    norms_ptr += batch * number
    start, near = _bounds(windows_ptr, head, window)
    capacity = near - start
    after = _last_position(positions_ptr, near, window, R) + 1
    if (capacity > 0) & (after % chunk_size == 0) & (after - window + chunk_size > 0):
        oldest = after - window
        # Candidates: the slots, then the positions that leave, which may be negative while the window fills.
        c = tl.arange(0, BLOCK)
        slot = c < capacity
        leaver = (c >= capacity) & (c < capacity + chunk_size)
        leaving = oldest + c - capacity
        real = leaver & (leaving >= 0)
        row = tl.where(slot, start + c, near + tl.where(real, leaving % window, 0).to(tl.int32))
        read = slot | real
        position = tl.load(positions_ptr + row, mask=read, other=-1)
        rank = tl.load(scores_ptr + row, mask=read, other=0.0) * tl.load(norms_ptr + row, mask=read, other=0.0)
        # The order as in `chunks_kernel`, after positions that are absent. All ranks are finite, so that C are dropped.
        rank = tl.where(rank != rank, 2e38, tl.minimum(tl.maximum(rank, 0.0), 1e38))
        rank = tl.where(position < sinks, 3e38, rank)
        rank = tl.where(slot & (position < 0), -1.0, rank)
        rank = tl.where(leaver & ~real, -2.0, rank)
        rank = tl.where(slot | leaver, rank, float("inf"))
        dropped = c < 0
        for _ in range(chunk_size):
            least = c == tl.argmin(tl.where(dropped, float("inf"), rank), 0)
            dropped = dropped | least
        winner = real & ~dropped
        loser = slot & dropped
        winners = tl.sum(winner.to(tl.int32), 0)
        winner_number = tl.cumsum(winner.to(tl.int32), 0) - 1
        loser_number = tl.cumsum(loser.to(tl.int32), 0) - 1
        # Each warp may hold all candidates: none may write a row before all have read them.
        tl.debug_barrier()
        for pair in range(winners):
            source = tl.sum(tl.where(winner & (winner_number == pair), row, 0), 0)
            target = tl.sum(tl.where(loser & (loser_number == pair), row, 0), 0)
            _copy(keys_ptr, source, target, WIDTH, BLOCK_P)
            _copy(values_ptr, source, target, WIDTH, BLOCK_P)
            _copy(scores_ptr, source, target, 1, 1)
            _copy(positions_ptr, source, target, 1, 1)
            if keys_scales_ptr is not None:
                _copy(keys_scales_ptr + batch * number, source, target, 1, 1)
                _copy(values_scales_ptr + batch * number, source, target, 1, 1)


@triton.jit
def _tile(
    q, lines_ptr, seen_ptr, query, at, near, begin, origin, window, softcap,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, SOFTCAP: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """Return the (BLOCK_Q, R) scores to base 2 of R rows, minus infinity at those that are not seen, and their lines.

    Rows are those of the slots, of which there are `near`, then those of the window, whose first has the line `begin`
    and the position `origin`. A line is negative where nothing is seen.
    """
    row = at + tl.arange(0, R)
    p = tl.arange(0, BLOCK_P)
    column = row - near
    line = tl.load(seen_ptr + row, mask=row < near, other=-1)
    there = (column >= 0) & (column < window) & (origin + column >= 0)
    line = tl.where(there, begin + column, line)
    mask = (line >= 0)[:, None] & (p < WIDTH)[None, :]
    k = tl.load(lines_ptr + line.to(tl.int64)[:, None] * (2 * WIDTH) + p[None, :], mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if SOFTCAP:
        scores = _capped(scores, softcap)
    seen = (line >= 0)[None, :] & (column[None, :] <= (query % CHUNK)[:, None] + window - CHUNK)
    return tl.where(seen, scores * 1.4426950408889634, float("-inf")), line  # log2(e)


@triton.jit(do_not_specialize=["number", "length"])
def chunks_kernel(
    q_ptr, lines_ptr, marks_ptr, fading_ptr, fades_ptr, first_ptr, chunks_ptr, capacity_ptr, seen_ptr, sums_ptr, o_ptr,
    softcap, number, heads, length, window, queries, slots, old,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, SOFTCAP: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend chunk by chunk for a document and a head; after each, let what leaves the window compete for the slots."""
    group = tl.program_id(0).to(tl.int64)
    groups = tl.num_programs(0).to(tl.int64)
    document = group // heads
    origin = tl.load(first_ptr + document) + CHUNK
    chunks = tl.load(chunks_ptr + document)
    rows = (tl.load(capacity_ptr + group % heads) + CHUNK).to(tl.int32)
    lines_ptr += group * length * (2 * WIDTH)
    scores_ptr = marks_ptr + group * length
    plane = groups * length  # numbers of a kind of marks
    seen_ptr += group * (slots + CHUNK)
    seen_step = groups * (slots + CHUNK)
    q_ptr += group * queries * WIDTH
    o_ptr += group * queries * WIDTH
    fading_ptr += group * queries
    sums_ptr += group * queries
    p = tl.arange(0, BLOCK_P)
    b = tl.arange(0, BLOCK)
    near = tl.where(old > 0, rows - CHUNK, 0)
    for chunk in range(0, chunks):
        begin = (old + (chunk + 1) * CHUNK).to(tl.int32)
        for block in range(0, queries, BLOCK_Q):
            query = block + tl.arange(0, BLOCK_Q)
            place = query[:, None] * WIDTH + p[None, :]
            mask = (query < queries)[:, None] & (p < WIDTH)[None, :]
            q = tl.load(q_ptr + place, mask=mask, other=0.0)
            highest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
            o = tl.zeros((BLOCK_Q, BLOCK_P), dtype=tl.float32)
            for at in range(0, near + window, R):
                scores, line = _tile(
                    q, lines_ptr, seen_ptr, query, at, near, begin, origin, window, softcap,
                    CHUNK, WIDTH, BLOCK_P, BLOCK_Q, SOFTCAP, R,
                )  # fmt: skip
                raised = tl.maximum(highest, tl.max(scores, 1))
                # While nothing has been seen, -inf minus -inf would be NaN.
                base = tl.where(raised == float("-inf"), 0.0, raised)
                weights = tl.exp2(scores - base[:, None])
                kept = tl.exp2(highest - base)
                total = total * kept + tl.sum(weights, 1)
                there = (line >= 0)[:, None] & (p < WIDTH)[None, :]
                v_ptr = lines_ptr + line.to(tl.int64)[:, None] * (2 * WIDTH) + WIDTH + p[None, :]
                o = tl.dot(
                    weights, tl.load(v_ptr, mask=there, other=0.0), acc=o * kept[:, None], input_precision="tf32x3"
                )
                highest = raised
            # A query beyond its document may see nothing; its result is not used, but must be finite.
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            tl.store(o_ptr + place, o / total[:, None], mask=mask)
            tl.store(sums_ptr + query, tl.where(empty, 0.0, highest + tl.log2(total)), mask=query < queries)
        fade = tl.max(tl.full((R,), 1.0, dtype=tl.float32), 0)
        if fades_ptr is not None:
            fade = tl.load(fades_ptr + chunk * groups + group)
        # The sums were written by other threads than those that read them.
        tl.debug_barrier()
        for at in range(0, near + window, R):
            received = tl.zeros((R,), dtype=tl.float32)
            line = tl.full((R,), -1, dtype=tl.int32)
            for block in range(0, queries, BLOCK_Q):
                query = block + tl.arange(0, BLOCK_Q)
                mask = (query < queries)[:, None] & (p < WIDTH)[None, :]
                q = tl.load(q_ptr + query[:, None] * WIDTH + p[None, :], mask=mask, other=0.0)
                scores, line = _tile(
                    q, lines_ptr, seen_ptr, query, at, near, begin, origin, window, softcap,
                    CHUNK, WIDTH, BLOCK_P, BLOCK_Q, SOFTCAP, R,
                )  # fmt: skip
                factor = tl.load(fading_ptr + query, mask=query < queries, other=0.0)
                weights = tl.exp2(scores - tl.load(sums_ptr + query, mask=query < queries, other=0.0)[:, None])
                received += tl.sum(weights * factor[:, None], 0)
            held = tl.load(scores_ptr + line, mask=line >= 0, other=0.0)
            tl.store(scores_ptr + line, held * fade + received, mask=line >= 0)
        tl.debug_barrier()
        line = tl.load(seen_ptr + b, mask=b < rows, other=-1)
        if (old > 0) | ((chunk + 2) * CHUNK > window):
            # The chunk that leaves the window takes the first rows that are free: there are at least as many.
            free = (b < rows) & (line < 0)
            leaving = tl.cumsum(free.to(tl.int32), 0) - 1
            entering = free & (leaving < CHUNK)
            leaving += begin
            hidden = tl.load(scores_ptr + 3 * plane + leaving, mask=entering, other=0.0) < 0.0
            line = tl.where(entering & ~hidden, leaving, line)
            rank = tl.load(scores_ptr + line, mask=line >= 0, other=0.0)
            rank *= tl.load(scores_ptr + plane + line, mask=line >= 0, other=0.0)
            # The order: empty rows are dropped first, then the lowest scores, then scores that are not numbers, which
            # cannot be compared, and sinks last. All ranks are finite: infinity marks rows that are dropped already.
            rank = tl.where(rank != rank, 2e38, tl.minimum(tl.maximum(rank, 0.0), 1e38))
            always = tl.load(scores_ptr + 2 * plane + line, mask=line >= 0, other=0.0)
            rank = tl.where(always > 0.0, 3e38, rank)
            rank = tl.where(line < 0, -1.0, rank)
            rank = tl.where(b < rows, rank, float("inf"))
            dropped = b < 0
            for _ in range(CHUNK):
                least = b == tl.argmin(tl.where(dropped, float("inf"), rank), 0)
                dropped = dropped | least
            line = tl.where(dropped, -1, line)
            near = tl.minimum(near + CHUNK, rows)
        q_ptr += groups * queries * WIDTH
        o_ptr += groups * queries * WIDTH
        fading_ptr += groups * queries
        seen_ptr += seen_step
        origin += CHUNK
        tl.store(seen_ptr + b, line, mask=b < rows)
        tl.debug_barrier()
    # The last list is that at the end, whatever the number of chunks.
    line = tl.load(seen_ptr + b, mask=b < rows, other=-1)
    tl.store(seen_ptr + (number - chunks) * seen_step + b, line, mask=b < rows)
