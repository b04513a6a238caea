"""Triton kernels for the gradients of the SSD scan inside chunks, which :mod:`.ssd_triton` runs.

Symbols, M and the derivation are those of :mod:`.ssd_triton`. Two kernels have a program per chunk and group of heads
each. The first computes what belongs to targets: dC, dz, reads of the entering state, and the gradients of decays and
step sizes inside the chunk. The second computes what belongs to sources: dx, dB, contributions to the leaving state.
Both compute x . dy. One kernel for all would need more registers than there are, even with one program on a processor;
in half precision two programs of these fit.

Elementwise results are right operands of products or transposed left ones, which go through shared memory: as other
left operands they would be in registers, several times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import INTERPRETED, tl, triton
from .ssd_decays_triton import CHUNKS_OF_SPAN, real_tokens, sums_before
from .triton_math import dot, load_gate, narrow, strides


class ChunkGradients:
    """Gradients of x, B, C, D and z, section by section.

    Attributes:
        dx, dB, dC, dz: gradients, dz None without a gate.

    Args:
        x, sums, marks, B, C, D, z: what the scan saves; D (H, 1), (H, P) or None.
        states: (B, c, H, P or P + 1, N) states entering the chunks.
        dy: (B, L, H, P) gradient of the outputs.
        drow_sums: (B, L, H) gradient of the row sums, or None.
        scaled: whether inputs are multiplied by step sizes.
        chunk: tokens of a chunk.
        together: heads of a program.
        capacity: chunks of a section, at most.
        options: BLOCK_P, BLOCK_N, and options of the launch.
    """

    def __init__(
        self,
        operands: tuple[Any, ...],
        dy: Tensor,
        drow_sums: Tensor | None,
        scaled: bool,
        chunk: int,
        together: int,
        capacity: int,
        options: dict[str, Any],
    ) -> None:
        x, _, _, B, C, D, z, states = operands
        batch, _, heads, width = x.shape
        self._operands, self._outer, self._chunk, self._capacity = operands, (dy, drow_sums), chunk, capacity
        self._parts = heads // together
        self.dx = x.new_empty(x.shape)
        self.dB, self.dC = B.new_empty(B.shape), C.new_empty(C.shape)
        self.dz = None if z is None else z.new_empty(z.shape)
        chunks = states.shape[1]
        self._skips = None if D is None else x.new_empty(batch, chunks, *D.shape, dtype=torch.float32)
        parts = capacity * chunk, self._parts, B.shape[3]
        self._partial = x.new_empty(batch, *parts, dtype=torch.float32)
        self._skip = None if D is None else D.expand(heads, width)
        self._strides = *strides(3, x, B, C), *strides(2, self._skip), *strides(3, z, dy)
        self._options = {
            "TOGETHER": together,
            "SCALED": scaled,
            "SPAN": chunk * CHUNKS_OF_SPAN,
            "WIDTH": width,
            "ROWS": states.shape[3],
            "SIZE": B.shape[3],
            "Q": chunk,
            "WIDE_SKIP": D is not None and D.shape[1] > 1,
            "EMULATE": INTERPRETED,
            "num_stages": 1,
        } | options

    def add(self, dstates: Tensor, flows: Tensor, passed: Tensor, first: int, count: int) -> None:
        """Compute the gradients of the chunks from `first` to `first + count`.

        Args:
            dstates: (B, `capacity`, H, P or P + 1, N) gradients of the states leaving the chunks.
            flows, passed: outputs for :meth:`.ssd_decays_triton.DecayGradients.add`.
            first: first chunk of the section.
            count: chunks of the section.
        """
        x, sums, marks, B, C, _, z, states = self._operands
        batch, length, heads, _ = x.shape
        part = slice(first * self._chunk, min((first + count) * self._chunk, length))
        sizes = length, sums.shape[3], states.shape[1], first, count, self._capacity, heads, heads // B.shape[2]
        inputs = x, sums, marks, B, C, self._skip, z
        grid = (batch * count * self._parts,)
        options = self._options | {"GRADIENT_ROWS": dstates.shape[3]}
        outputs = flows, passed, self._partial, self._skips, self.dz
        target_gradients_kernel[grid](
            *(*inputs, states, *self._outer, dstates, *outputs, *sizes, *self._strides), **options
        )
        self._sum(self.dC, part)
        source_gradients_kernel[grid](
            *(*inputs, *self._outer, dstates, self.dx, flows, self._partial, *sizes, *self._strides), **options
        )
        self._sum(self.dB, part)

    def _sum(self, whole: Tensor, part: slice) -> None:
        tokens = part.stop - part.start
        whole[:, part] = self._partial[:, :tokens].unflatten(2, (whole.shape[2], -1)).sum(3)

    def skip(self) -> Tensor | None:
        """Return the (H, 1) or (H, P) gradient of D after all sections."""
        return None if self._skips is None else self._skips.sum((0, 1))


@triton.jit
def times_vector(matrix, vector, SPLIT: tl.constexpr, EMULATE: tl.constexpr):
    """Return the (R) float32 products of an (R, N) matrix with an (N) float32 vector.

    In half precision this is a matrix product, which takes fewer instructions than sums. The vector is one column, or
    two if SPLIT, which keep 16 or more bits of it.
    """
    dtype: tl.constexpr = matrix.dtype
    if dtype == tl.float32:
        return tl.sum(matrix * vector[None, :], 1)
    column = tl.arange(0, 16)[None, :]
    high = narrow(vector, dtype, EMULATE)
    columns = tl.where(column == 0, high[:, None], 0.0).to(dtype)
    if SPLIT:
        low = narrow(vector - high.to(tl.float32), dtype, EMULATE)
        columns = tl.where(column == 1, low[:, None], columns)
    return tl.sum(dot(matrix, columns, None, EMULATE), 1)


@triton.jit
def _crossing(flow, rows, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Return for each token k the sum over sources j < k and targets i >= k of (Q source, Q target) terms.

    In half precision the terms are rounded to it. The sum over targets is a product with a matrix of ones and zeros.
    """
    if dtype == tl.float32:
        flow = tl.cumsum(flow, 1, reverse=True)
        return tl.sum(tl.where(rows[:, None] < rows[None, :], flow, 0.0), 0)
    later = narrow((rows[:, None] >= rows[None, :]).to(tl.float32), dtype, EMULATE)  # (Q target, Q token)
    flow = dot(tl.trans(later), tl.trans(narrow(flow, dtype, EMULATE)), None, EMULATE)  # (Q token, Q source)
    return tl.sum(tl.where(rows[:, None] > rows[None, :], flow, 0.0), 1)


# `sums` are those of `decay_sums`; `real` is false at padding, which is read as zero. A decay between tokens is a power
# of a difference of coarse sums, times a number of the target and one of the source. The difference is masked before
# exp2: above the diagonal it is positive.
@triton.jit(do_not_specialize=["length", "chunks", "first", "count", "capacity"])
def target_gradients_kernel(
    x_ptr, sums_ptr, marks_ptr, B_ptr, C_ptr, D_ptr, z_ptr, states_ptr, dy_ptr, drow_sums_ptr, dstates_ptr,
    flows_ptr, passed_ptr, dC_ptr, dD_ptr, dz_ptr,
    length, tokens, chunks, first, count, capacity, heads, per_group,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group, D_head, D_width, z_batch,
    z_token, z_head, dy_batch, dy_token, dy_head,
    TOGETHER: tl.constexpr, SCALED: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    GRADIENT_ROWS: tl.constexpr, SIZE: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE_SKIP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
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
    real = real_tokens(marks_ptr, batch * length + begin, rows, present)
    in_maps = real[:, None] & in_n[None, :]
    first_row = (batch * length + begin) * heads
    dtype = x_ptr.dtype.element_ty
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    B = tl.load(B_ptr + rows[:, None] * B_token + n[None, :], mask=in_maps, other=0.0)  # (Q, N)
    C = tl.load(C_ptr + rows[:, None] * C_token + n[None, :], mask=in_maps, other=0.0)
    scores = dot(B, tl.trans(C), None, EMULATE)  # (Q source, Q target)
    dC = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    x_ptr += batch * x_batch + begin * x_token
    if z_ptr is not None:
        z_ptr += batch * z_batch + begin * z_token
    dy_ptr += batch * dy_batch + begin * dy_token
    for place in range(TOGETHER):
        head = part * TOGETHER + place
        sums = sums_ptr + (batch * heads + head) * 3 * tokens
        before, fine_before = sums_before(sums, tokens, begin, SPAN)
        sums += begin
        coarse, fine = tl.load(sums + rows), tl.load(sums + tokens + rows)
        from_start = tl.exp2((coarse - before) + (fine - fine_before))
        if z_ptr is not None:
            decay = tl.where(rows[:, None] <= rows[None, :], coarse[None, :] - coarse[:, None], -256.0)
            mix = scores * tl.exp2(decay) * (tl.load(sums + 2 * tokens + rows)[:, None] * tl.exp2(fine)[None, :])
            mix = narrow(mix, dtype, EMULATE)

        dmix = tl.zeros((Q, Q), dtype=tl.float32)  # x_j . dy_i
        read = tl.zeros((Q,), dtype=tl.float32)  # reads of the entering state by each token
        skipped = tl.zeros((Q,), dtype=tl.float32)
        # The contribution of the entering to the leaving state: the trace of a product, or a sum in float32.
        passed = tl.zeros((BLOCK_P, BLOCK_P), dtype=tl.float32)
        passed_rows = tl.zeros((BLOCK_P,), dtype=tl.float32)
        of_head = (batch * chunks + chunk) * heads + head
        state_ptr = states_ptr + of_head * (ROWS * SIZE)
        dstate_ptr = dstates_ptr + ((batch * capacity + index) * heads + head) * (GRADIENT_ROWS * SIZE)
        for begin_p in range(0, WIDTH, BLOCK_P):
            p = begin_p + tl.arange(0, BLOCK_P)
            in_p = p < WIDTH
            in_x = real[:, None] & in_p[None, :]
            written = present[:, None] & in_p[None, :]
            in_state = in_p[:, None] & in_n[None, :]
            inside = p[:, None] * SIZE + n[None, :]
            x = tl.load(x_ptr + head * x_head + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
            dy = tl.load(dy_ptr + head * dy_head + rows[:, None] * dy_token + p[None, :], mask=in_x, other=0.0)
            state = tl.load(state_ptr + inside, mask=in_state, other=0.0)  # (P, N)
            dstate = tl.load(dstate_ptr + inside, mask=in_state, other=0.0)
            if dtype == tl.float32:
                passed_rows += tl.sum(state * dstate, 1)
            else:
                passed = dot(state, tl.trans(dstate), passed, EMULATE)
            carried = dot(C, tl.trans(state), None, EMULATE) * from_start[:, None]  # (Q, P), a term of y
            through = dy.to(tl.float32)  # gradient of the output before the gate
            if z_ptr is not None:
                smooth, gate = load_gate(z_ptr + head * z_head, rows[:, None] * z_token + p[None, :], in_x)
                slope = through * (smooth + gate * (1.0 - smooth))
                dz = carried * slope
                dz += dot(tl.trans(mix), x, None, EMULATE) * slope
                if D_ptr is not None:
                    D = tl.load(D_ptr + head * D_head + p * D_width, mask=in_p, other=0.0)
                    dz += x.to(tl.float32) * D[None, :] * slope
                dense = (first_row + head) * WIDTH + rows[:, None] * (heads * WIDTH) + p[None, :]
                tl.store(dz_ptr + dense, narrow(dz, dz_ptr.dtype.element_ty, EMULATE), mask=written)
                through *= gate
                dy = narrow(through, dtype, EMULATE)
            if WIDE_SKIP:
                by_channel = tl.sum(through * x.to(tl.float32), 0)
                tl.store(dD_ptr + of_head * WIDTH + p, by_channel, mask=in_p)
            elif z_ptr is not None:
                skipped += tl.sum(through * x.to(tl.float32), 1)
            dmix = dot(x, tl.trans(dy), dmix, EMULATE)
            read += tl.sum(carried * through, 1)
            weighted = narrow(through * from_start[:, None], dtype, EMULATE)
            dC = dot(tl.trans(state), tl.trans(weighted), dC, EMULATE)
        if D_ptr is not None and not WIDE_SKIP:
            if z_ptr is None:  # with a gate, dmix is a product of rounded gradients
                skipped = tl.sum(tl.where(rows[:, None] == rows[None, :], dmix, 0.0), 1)
            tl.store(dD_ptr + of_head, tl.sum(skipped, 0))

        end, fine_end = tl.load(sums + Q - 1), tl.load(sums + tokens + Q - 1)
        row = tl.arange(0, BLOCK_P)
        passed_sum = tl.sum(passed_rows + tl.sum(tl.where(row[:, None] == row[None, :], passed, 0.0), 1), 0)
        if GRADIENT_ROWS > WIDTH:
            drow_sums = tl.load(drow_sums_ptr + first_row + head + rows * heads, mask=real, other=0.0)
            dmix += drow_sums[None, :]
            drow_sums *= from_start
            last_row = tl.load(state_ptr + WIDTH * SIZE + n, mask=in_n, other=0.0).to(tl.float32)
            dlast_row = tl.load(dstate_ptr + WIDTH * SIZE + n, mask=in_n, other=0.0).to(tl.float32)
            read += times_vector(C, last_row, False, EMULATE) * drow_sums
            dC += last_row[:, None] * drow_sums[None, :]
            passed_sum += tl.sum(last_row * dlast_row, 0)
        passed_sum *= tl.exp2((end - before) + (fine_end - fine_before))
        tl.store(passed_ptr + (batch * capacity + index) * heads + head, passed_sum)

        decay = tl.where(rows[:, None] <= rows[None, :], coarse[None, :] - coarse[:, None], -256.0)
        dmix *= tl.exp2(decay) * tl.exp2(fine)[None, :]
        flow = dmix * scores
        out = flows_ptr + (batch * heads + head) * (3 + SCALED) * capacity * Q + index * Q + rows
        if SCALED:
            tl.store(out + 3 * capacity * Q, tl.sum(flow, 1) * tl.exp2(-fine))
        factor = tl.load(sums + 2 * tokens + rows)
        half = narrow(dmix * factor[:, None], dtype, EMULATE)
        dC = dot(tl.trans(B), half, dC, EMULATE)
        tl.store(out, _crossing(flow * factor[:, None], rows, dtype, EMULATE))
        tl.store(out + capacity * Q, read)

    # (B, capacity Q, parts, N)
    partial = ((batch * capacity + index) * Q * parts + part) * SIZE
    offsets = rows[None, :] * (parts * SIZE) + n[:, None]
    tl.store(dC_ptr + partial + offsets, dC, mask=in_n[:, None] & present[None, :])


@triton.jit(do_not_specialize=["length", "chunks", "first", "count", "capacity"])
def source_gradients_kernel(
    x_ptr, sums_ptr, marks_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dy_ptr, drow_sums_ptr, dstates_ptr,
    dx_ptr, flows_ptr, dB_ptr,
    length, tokens, chunks, first, count, capacity, heads, per_group,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group, D_head, D_width, z_batch,
    z_token, z_head, dy_batch, dy_token, dy_head,
    TOGETHER: tl.constexpr, SCALED: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    GRADIENT_ROWS: tl.constexpr, SIZE: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE_SKIP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    parts = heads // TOGETHER
    part = program % parts
    index = (program // parts) % count
    batch = program // parts // count
    group = part * TOGETHER // per_group
    rows = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    in_n = n < SIZE
    begin = (first + index) * Q
    present = rows < tl.minimum(length - begin, Q).to(tl.int32)
    real = real_tokens(marks_ptr, batch * length + begin, rows, present)
    in_maps = real[:, None] & in_n[None, :]
    first_row = (batch * length + begin) * heads
    dtype = x_ptr.dtype.element_ty
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    B = tl.load(B_ptr + rows[:, None] * B_token + n[None, :], mask=in_maps, other=0.0)  # (Q, N)
    C = tl.load(C_ptr + rows[:, None] * C_token + n[None, :], mask=in_maps, other=0.0)
    scores = dot(C, tl.trans(B), None, EMULATE)  # (Q target, Q source)
    dB = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    x_ptr += batch * x_batch + begin * x_token
    if z_ptr is not None:
        z_ptr += batch * z_batch + begin * z_token
    dy_ptr += batch * dy_batch + begin * dy_token
    for place in range(TOGETHER):
        head = part * TOGETHER + place
        sums = sums_ptr + (batch * heads + head) * 3 * tokens + begin
        coarse, fine = tl.load(sums + rows), tl.load(sums + tokens + rows)
        factor = tl.load(sums + 2 * tokens + rows)
        end, fine_end = tl.load(sums + Q - 1), tl.load(sums + tokens + Q - 1)
        to_end = tl.exp2((end - coarse) + (fine_end - fine))
        scale = tl.full((Q,), 1.0, dtype=tl.float32)
        if SCALED:
            scale = factor * tl.exp2(fine)
        decay = tl.where(rows[:, None] >= rows[None, :], coarse[:, None] - coarse[None, :], -256.0)
        decay = tl.exp2(decay) * (tl.exp2(fine)[:, None] * factor[None, :])
        mix = narrow(scores * decay, dtype, EMULATE)

        dmix = tl.zeros((Q, Q), dtype=tl.float32)  # dy_i . x_j
        left = tl.zeros((Q,), dtype=tl.float32)  # contributions of each token to the leaving state, without scale
        dstate_ptr = dstates_ptr + ((batch * capacity + index) * heads + head) * (GRADIENT_ROWS * SIZE)
        for begin_p in range(0, WIDTH, BLOCK_P):
            p = begin_p + tl.arange(0, BLOCK_P)
            in_p = p < WIDTH
            in_x = real[:, None] & in_p[None, :]
            written = present[:, None] & in_p[None, :]
            in_state = in_p[:, None] & in_n[None, :]
            x = tl.load(x_ptr + head * x_head + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
            dy = tl.load(dy_ptr + head * dy_head + rows[:, None] * dy_token + p[None, :], mask=in_x, other=0.0)
            through = dy.to(tl.float32)  # gradient of the output before the gate
            if z_ptr is not None:
                _, gate = load_gate(z_ptr + head * z_head, rows[:, None] * z_token + p[None, :], in_x)
                through *= gate
                dy = narrow(through, dtype, EMULATE)
            dmix = dot(dy, tl.trans(x), dmix, EMULATE)
            dstate = tl.load(dstate_ptr + p[:, None] * SIZE + n[None, :], mask=in_state, other=0.0)  # (P, N)
            du = dot(B, tl.trans(dstate), None, EMULATE) * to_end[:, None]  # (Q, P), the gradient of scale * x
            left += tl.sum(du * x.to(tl.float32), 1)
            weighted = narrow(x.to(tl.float32) * (to_end * scale)[:, None], dtype, EMULATE)
            dB = dot(tl.trans(dstate), tl.trans(weighted), dB, EMULATE)
            dx = dot(tl.trans(mix), dy, None, EMULATE) + du * scale[:, None]
            if D_ptr is not None:
                if WIDE_SKIP:
                    D = tl.load(D_ptr + head * D_head + p * D_width, mask=in_p, other=0.0)
                    dx += through * D[None, :]
                else:
                    dx += through * tl.load(D_ptr + head * D_head)
            dense = (first_row + head) * WIDTH + rows[:, None] * (heads * WIDTH) + p[None, :]
            tl.store(dx_ptr + dense, narrow(dx, dtype, EMULATE), mask=written)

        if GRADIENT_ROWS > WIDTH:
            drow_sums = tl.load(drow_sums_ptr + first_row + head + rows * heads, mask=real, other=0.0)
            dmix += drow_sums[:, None]
            dlast_row = tl.load(dstate_ptr + WIDTH * SIZE + n, mask=in_n, other=0.0).to(tl.float32)
            left += times_vector(B, dlast_row, False, EMULATE) * to_end
            dB += dlast_row[:, None] * to_end[None, :]
        dB = dot(tl.trans(C), narrow(dmix * decay, dtype, EMULATE), dB, EMULATE)
        out = flows_ptr + (batch * heads + head) * (3 + SCALED) * capacity * Q + index * Q + rows
        if SCALED:
            of_step = out + 3 * capacity * Q
            tl.store(of_step, tl.load(of_step) + left)
            left *= scale
        tl.store(out + 2 * capacity * Q, left)

    # (B, capacity Q, parts, N)
    partial = ((batch * capacity + index) * Q * parts + part) * SIZE
    offsets = rows[None, :] * (parts * SIZE) + n[:, None]
    if marks_ptr is not None:
        dB = tl.where(real[None, :], dB, 0.0)  # the additional input of row sums is 1 at padding, too
    tl.store(dB_ptr + partial + offsets, dB, mask=in_n[:, None] & present[None, :])
