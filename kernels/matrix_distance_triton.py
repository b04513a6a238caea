"""`row_distances` in Triton: launches, gradients and kernels.

Symbols: B batch, L length, H heads, G groups, N state size, P head width; R rows and J columns of a tile; U, M, A, S as
in `matrix_distance.py`; D = M - A with the skip on M's diagonal. The kernels compute scores to base 2: `factor` is
scaling log2(e).

The forward walks over the columns of a tile of rows twice: once for the log-sum-exp of the scores and the sums of the
rows of U, once for the distances. Expanding |M - A|^2 would save the second walk and cancel where M is close to A. The
backward computes each tile again, over columns for the gradients of rows and over rows for those of columns. There
are no atomics: every sum has a fixed order. Memory is linear in L.

The sums of log-decays come in two float32 parts, high and low, whose differences are as accurate as those of the
float64 sums rounded to float32. Offsets are 64-bit up to a tile and 32-bit inside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, tl, triton
from .tracing import opaque, tracing
from .triton_math import dot, narrow, strides, unit_stride

# (R, J, warps) of the forward, of the gradients of rows and of the gradients of columns, by bytes per element and
# the larger of state size and head width. Compiled by Triton 3.9 for sm_90 they spill at most 16 bytes of registers
# per thread; shared memory is at most 100 KiB. No tile has been timed on a device.
_TILES = {
    (2, 64): ((64, 64, 4), (64, 32, 4), (32, 64, 4)),
    (2, 128): ((64, 64, 8), (32, 32, 4), (32, 32, 4)),
    (2, 256): ((16, 32, 4), (32, 16, 8), (16, 32, 8)),
    (4, 64): ((32, 32, 4), (32, 32, 4), (32, 32, 4)),
    (4, 128): ((16, 32, 8), (16, 32, 8), (32, 16, 8)),
    (4, 256): ((16, 16, 4), (16, 16, 8), (16, 16, 8)),
}
WIDEST = 256


def row_distances_triton(
    sums: Tensor,
    B: Tensor,
    C: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    least_sum: float | None,
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    smallest: float,
) -> tuple[Tensor, Tensor]:
    """Compute the distances of :func:`row_distances`; differentiable.

    Args:
        sums: (B, H, L) float64 sums of log-decays, not empty.
        B, C: (B, L, G, N) maps.
        scale: (B, H, L) float32 factors of the columns, or None.
        skip: (H) float32 addend of the diagonal, or None.
        least_sum: least divisor of a normalised row, or None.
        queries, keys: (B, L, H, P), without gradients.
        scaling: factor on the scores.
        smallest: exponents up to this number count as minus infinity.

    Returns:
        (B, H, L) squared norms of the rows of D and of A, in float32.
    """
    B, C = _of_one_dtype(B, C)
    queries, keys = _of_one_dtype(queries, keys)
    arguments = sums, B, C, scale, skip, least_sum, queries, keys, scaling, smallest
    if tracing():
        errors, targets = _traced(*arguments)
        return errors, targets.detach()
    return _RowDistances.apply(*arguments)  # pyright: ignore[reportReturnType]


def _of_one_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operands of a product, which must have one dtype, not float64."""
    return (x, y) if x.dtype == y.dtype != torch.float64 else (x.float(), y.float())


class _RowDistances(torch.autograd.Function):
    """The Triton path; saves inputs, lse_i = log2 sum_j 2^s_ij, r_i = sum_j U_ij and c_i = sum_j D_ij M_ij.

    Backward, with outer_i the gradient of |D_i|^2, m_i = max(r_i, least) or 1, and M without its skip:

        dD_ij = 2 outer_i D_ij,  dskip = sum_i dD_ii,
        dU_ij = (dD_ij - 2 outer_i c_i [r_i >= least]) / m_i,  or dD_ij without normalisation,
        dscale_j = sum_i dU_ij V_ij  with  U_ij = V_ij scale_j,  dV_ij = dU_ij scale_j,
        dW_ij = sum_heads dV_ij exp(S_i - S_j)  with  W = C B^T,  dC = dW B,  dB = dW^T C,
        dS_i = sum_j<i dV_ij V_ij - sum_j>i dV_ji V_ji.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        sums, B, C, scale, skip, least, queries, keys, scaling, smallest = arguments
        B, C, queries, keys = map(unit_stride, (B, C, queries, keys))
        high = sums.float()
        low = (sums - high).float()
        errors, targets, lse = (torch.empty_like(high) for _ in range(3))
        row_sums = inner = None
        if least is not None:
            row_sums, inner = torch.empty_like(high), torch.empty_like(high)
        scale, skip = (None if each is None else each.contiguous() for each in (scale, skip))
        numbers = scaling * math.log2(math.e), smallest, 0.0 if least is None else least
        options = _options(B, queries)[0]
        batch, heads, length = high.shape
        tiles = triton.cdiv(length, options["R"])
        with torch.cuda.device_of(high):
            distances_kernel[(batch * tiles, heads)](
                *(high, low, B, C, scale, skip, queries, keys, errors, targets, lse, row_sums, inner),
                *(*numbers, length, tiles, heads, heads // B.shape[2]),
                *strides(3, B, C, queries, keys),
                **options,
            )
        ctx.save_for_backward(high, low, B, C, scale, skip, queries, keys, lse, row_sums, inner)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(targets)
        return errors, targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        high, low, B, C, scale, skip, queries, keys, lse, row_sums, inner = ctx.saved_tensors
        batch, heads, length = high.shape
        groups = B.shape[2]
        outer = 2 * gradients[0].contiguous()
        inverse = along = None
        if row_sums is not None:
            least = ctx.numbers[2]
            inverse = row_sums.clamp(min=least).reciprocal()
            along = outer * inner * (row_sums >= least)
        dB, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (B, C))
        by_rows, by_columns = torch.empty_like(high), torch.empty_like(high)
        diagonal = None if skip is None else torch.empty_like(high)
        dscale = None if scale is None else torch.empty_like(high)
        given = (high, low, B, C, scale, skip, queries, keys, lse, inverse, along, outer)
        _, over_rows, over_columns = _options(B, queries)
        with torch.cuda.device_of(high):
            tiles = triton.cdiv(length, over_rows["R"])
            row_gradients_kernel[(batch * tiles, groups)](
                *(*given, dC, by_rows, diagonal, *ctx.numbers[:2], length, tiles, heads, heads // groups),
                *strides(3, B, C, queries, keys),
                **over_rows,
            )
            tiles = triton.cdiv(length, over_columns["J"])
            column_gradients_kernel[(batch * tiles, groups)](
                *(*given, dB, by_columns, dscale, *ctx.numbers[:2], length, tiles, heads, heads // groups),
                *strides(3, B, C, queries, keys),
                **over_columns,
            )
        dsums = by_rows.double() - by_columns
        dskip = None if diagonal is None else diagonal.sum((0, 2))
        return dsums, dB, dC, dscale, dskip, None, None, None, None, None


_traced = opaque(
    _RowDistances,
    "row_distances",
    "Tensor sums, Tensor B, Tensor C, Tensor? scale, Tensor? skip, float? least_sum, Tensor queries, Tensor keys, "
    "float scaling, float smallest",
    lambda sums, *_: (sums.new_empty(sums.shape, dtype=torch.float32), sums.new_empty(sums.shape, dtype=torch.float32)),
)


def _options(B: Tensor, queries: Tensor) -> list[dict[str, int]]:
    """Return the constants of the launches: forward, gradients of rows, gradients of columns."""
    states, width = B.shape[3], queries.shape[3]
    block_n, block_p = (max(16, triton.next_power_of_2(size)) for size in (states, width))
    shared = {"STATES": states, "BLOCK_N": block_n, "WIDTH": width, "BLOCK_P": block_p, "EMULATE": INTERPRETED}
    tiles = _TILES[max(B.dtype.itemsize, queries.dtype.itemsize), max(64, block_n, block_p)]
    return [shared | {"R": R, "J": J, "num_warps": warps, "num_stages": 2} for R, J, warps in tiles]


@triton.jit
def _tile(x_ptr, count, x_token, T: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load (T, BLOCK) tokens of a head from `x_ptr` on, zeros after the first `count` and beyond SIZE."""
    t = tl.arange(0, T)
    column = tl.arange(0, BLOCK)
    mask = (t < count)[:, None] & (column < SIZE)[None, :]
    return tl.load(x_ptr + t[:, None] * x_token + column[None, :], mask=mask, other=0.0)


@triton.jit
def _numbers(x_ptr, token, length):
    """Load a number of each token, zero beyond the length."""
    return tl.load(x_ptr + token, mask=token < length, other=0.0)


# The next three functions take what belongs to rows and columns as tensors that broadcast to a tile, (R, J) or (J, R).
# The gradients of columns use the latter: a product with a transposed tile that is held in registers would spill.
@triton.jit
def _seen(row, column, length):
    """Return the mask of columns that a row sees; rows beyond the length see none."""
    return (column <= row) & (row < length)


@triton.jit
def _student(products, high, low, column_high, column_low, seen, smallest):
    """Return the decays, and the elements of U without the factors of the columns, zero where not seen."""
    exponents = (high - column_high) + (low - column_low)
    # Masked before exp: later columns have positive exponents. The comparison keeps NaN.
    exponents = tl.where(seen, exponents, float("-inf"))
    decay = tl.exp(tl.where(exponents <= smallest, float("-inf"), exponents))
    return decay, tl.where(seen, products * decay, 0.0)


@triton.jit
def _difference(unscaled, scale, inverse, skip_ptr, scores, lse, own, seen):
    """Return the elements of D, of M without the skip, and of A; `own` is the mask of the diagonal."""
    attention = tl.exp2(tl.where(seen, scores - lse, float("-inf")))
    matrix = unscaled * scale * inverse
    difference = matrix - attention
    if skip_ptr is not None:
        difference += tl.where(own & seen, tl.load(skip_ptr), 0.0)
    return difference, matrix, attention


@triton.jit(do_not_specialize=["length"])
def distances_kernel(
    high_ptr, low_ptr, b_ptr, c_ptr, scale_ptr, skip_ptr, q_ptr, k_ptr,
    errors_ptr, targets_ptr, lse_ptr, row_sums_ptr, inner_ptr,
    factor, smallest, least, length, tiles, heads, per_group,
    b_batch, b_token, b_group, c_batch, c_token, c_group, q_batch, q_token, q_head, k_batch, k_token, k_head,
    STATES: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, EMULATE: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Compute the distances and what the backward needs; a program handles a tile of rows of a head."""
    head = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * R
    end = tl.minimum(first + R, length)
    row = first + tl.arange(0, R)
    plane = (batch * heads + head) * length
    high_ptr += plane
    low_ptr += plane
    if scale_ptr is not None:
        scale_ptr += plane
    if skip_ptr is not None:
        skip_ptr += head
    high, low = _numbers(high_ptr, row, length)[:, None], _numbers(low_ptr, row, length)[:, None]
    c_ptr += batch * c_batch + head // per_group * c_group + first.to(tl.int64) * c_token
    q_ptr += batch * q_batch + head * q_head + first.to(tl.int64) * q_token
    c = _tile(c_ptr, length - first, c_token, R, STATES, BLOCK_N)
    q = _tile(q_ptr, length - first, q_token, R, WIDTH, BLOCK_P)
    b_ptr += batch * b_batch + head // per_group * b_group
    k_ptr += batch * k_batch + head * k_head

    highest = tl.full((R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((R,), dtype=tl.float32)
    row_sums = tl.zeros((R,), dtype=tl.float32)
    b_at = b_ptr
    k_at = k_ptr
    for at in range(0, end, J):
        column = at + tl.arange(0, J)
        seen = _seen(row[:, None], column[None, :], length)
        k = _tile(k_at, length - at, k_token, J, WIDTH, BLOCK_P)
        scores = tl.where(seen, dot(q, tl.trans(k), None, EMULATE) * factor, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        # For rows beyond the length, -inf minus -inf would be NaN.
        base = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        highest = raised
        if row_sums_ptr is not None:
            b = _tile(b_at, length - at, b_token, J, STATES, BLOCK_N)
            products = dot(c, tl.trans(b), None, EMULATE)
            column_high = _numbers(high_ptr, column, length)[None, :]
            column_low = _numbers(low_ptr, column, length)[None, :]
            _, unscaled = _student(products, high, low, column_high, column_low, seen, smallest)
            if scale_ptr is not None:
                unscaled *= _numbers(scale_ptr, column, length)[None, :]
            row_sums += tl.sum(unscaled, 1)
        b_at += J * b_token
        k_at += J * k_token
    lse = highest + tl.log2(tl.where(total == 0.0, 1.0, total))
    inverse = tl.full((R,), 1.0, dtype=tl.float32)
    if row_sums_ptr is not None:
        # A row sum that is NaN stays NaN, unlike with `maximum`.
        inverse = 1.0 / tl.where(row_sums < least, least, row_sums)

    errors = tl.zeros((R,), dtype=tl.float32)
    targets = tl.zeros((R,), dtype=tl.float32)
    inner = tl.zeros((R,), dtype=tl.float32)
    b_at = b_ptr
    k_at = k_ptr
    for at in range(0, end, J):
        column = at + tl.arange(0, J)
        seen = _seen(row[:, None], column[None, :], length)
        b = _tile(b_at, length - at, b_token, J, STATES, BLOCK_N)
        k = _tile(k_at, length - at, k_token, J, WIDTH, BLOCK_P)
        column_high = _numbers(high_ptr, column, length)[None, :]
        column_low = _numbers(low_ptr, column, length)[None, :]
        scale = tl.full((J,), 1.0, dtype=tl.float32)
        if scale_ptr is not None:
            scale = _numbers(scale_ptr, column, length)
        products = dot(c, tl.trans(b), None, EMULATE)
        _, unscaled = _student(products, high, low, column_high, column_low, seen, smallest)
        scores = dot(q, tl.trans(k), None, EMULATE) * factor
        own = column[None, :] == row[:, None]
        difference, matrix, attention = _difference(
            unscaled, scale[None, :], inverse[:, None], skip_ptr, scores, lse[:, None], own, seen
        )
        errors += tl.sum(difference * difference, 1)
        targets += tl.sum(attention * attention, 1)
        if inner_ptr is not None:
            inner += tl.sum(difference * matrix, 1)
        b_at += J * b_token
        k_at += J * k_token
    held = row < length
    tl.store(errors_ptr + plane + row, errors, mask=held)
    tl.store(targets_ptr + plane + row, targets, mask=held)
    tl.store(lse_ptr + plane + row, lse, mask=held)
    if row_sums_ptr is not None:
        tl.store(row_sums_ptr + plane + row, row_sums, mask=held)
        tl.store(inner_ptr + plane + row, inner, mask=held)


@triton.jit(do_not_specialize=["length"])
def row_gradients_kernel(
    high_ptr, low_ptr, b_ptr, c_ptr, scale_ptr, skip_ptr, q_ptr, k_ptr, lse_ptr, inverse_ptr, along_ptr, outer_ptr,
    dc_ptr, by_rows_ptr, diagonal_ptr,
    factor, smallest, length, tiles, heads, per_group,
    b_batch, b_token, b_group, c_batch, c_token, c_group, q_batch, q_token, q_head, k_batch, k_token, k_head,
    STATES: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, EMULATE: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Compute dC, the part of dS by rows and the diagonal of dD; a program handles a tile of rows of a group."""
    group = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * R
    end = tl.minimum(first + R, length)
    row = first + tl.arange(0, R)
    held = row < length
    c_ptr += batch * c_batch + group * c_group + first.to(tl.int64) * c_token
    c = _tile(c_ptr, length - first, c_token, R, STATES, BLOCK_N)
    b_ptr += batch * b_batch + group * b_group
    q_ptr += batch * q_batch + first.to(tl.int64) * q_token
    k_ptr += batch * k_batch

    dc = tl.zeros((R, BLOCK_N), dtype=tl.float32)
    for member in range(per_group):
        head = group * per_group + member
        plane = (batch * heads + head) * length
        head_skip = skip_ptr
        if skip_ptr is not None:
            head_skip = skip_ptr + head
        high = _numbers(high_ptr + plane, row, length)[:, None]
        low = _numbers(low_ptr + plane, row, length)[:, None]
        lse = _numbers(lse_ptr + plane, row, length)[:, None]
        outer = _numbers(outer_ptr + plane, row, length)[:, None]
        inverse = tl.full((R, 1), 1.0, dtype=tl.float32)
        along = tl.zeros((R, 1), dtype=tl.float32)
        if inverse_ptr is not None:
            inverse = _numbers(inverse_ptr + plane, row, length)[:, None]
            along = _numbers(along_ptr + plane, row, length)[:, None]
        q = _tile(q_ptr + head * q_head, length - first, q_token, R, WIDTH, BLOCK_P)
        by_rows = tl.zeros((R,), dtype=tl.float32)
        diagonal = tl.zeros((R,), dtype=tl.float32)
        b_at = b_ptr
        k_at = k_ptr + head * k_head
        for at in range(0, end, J):
            column = at + tl.arange(0, J)
            seen = _seen(row[:, None], column[None, :], length)
            b = _tile(b_at, length - at, b_token, J, STATES, BLOCK_N)
            k = _tile(k_at, length - at, k_token, J, WIDTH, BLOCK_P)
            column_high = _numbers(high_ptr + plane, column, length)[None, :]
            column_low = _numbers(low_ptr + plane, column, length)[None, :]
            scale = tl.full((1, J), 1.0, dtype=tl.float32)
            if scale_ptr is not None:
                scale = _numbers(scale_ptr + plane, column, length)[None, :]
            products = dot(c, tl.trans(b), None, EMULATE)
            decay, unscaled = _student(products, high, low, column_high, column_low, seen, smallest)
            scores = dot(q, tl.trans(k), None, EMULATE) * factor
            own = column[None, :] == row[:, None]
            difference, _, _ = _difference(unscaled, scale, inverse, head_skip, scores, lse, own, seen)
            gradient = difference * outer
            if diagonal_ptr is not None:
                diagonal += tl.sum(tl.where(own, gradient, 0.0), 1)
            gradient = (gradient - along) * inverse * scale
            dc = dot(gradient * decay, b.to(tl.float32), dc, EMULATE)
            by_rows += tl.sum(tl.where(own, 0.0, gradient * unscaled), 1)
            b_at += J * b_token
            k_at += J * k_token
        tl.store(by_rows_ptr + plane + row, by_rows, mask=held)
        if diagonal_ptr is not None:
            tl.store(diagonal_ptr + plane + row, diagonal, mask=held)
    groups = heads // per_group
    n = tl.arange(0, BLOCK_N)
    dc_ptr += ((batch * length + first) * groups + group) * STATES
    offset = tl.arange(0, R)[:, None] * (groups * STATES) + n[None, :]
    tl.store(dc_ptr + offset, narrow(dc, dc_ptr.dtype.element_ty, EMULATE), mask=held[:, None] & (n < STATES)[None, :])


@triton.jit(do_not_specialize=["length"])
def column_gradients_kernel(
    high_ptr, low_ptr, b_ptr, c_ptr, scale_ptr, skip_ptr, q_ptr, k_ptr, lse_ptr, inverse_ptr, along_ptr, outer_ptr,
    db_ptr, by_columns_ptr, dscale_ptr,
    factor, smallest, length, tiles, heads, per_group,
    b_batch, b_token, b_group, c_batch, c_token, c_group, q_batch, q_token, q_head, k_batch, k_token, k_head,
    STATES: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, EMULATE: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Compute dB, dscale and the part of dS by columns; a program handles a tile of columns of a group."""
    group = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles) * J
    start = at // R * R  # first tile with a row that sees a column
    column = at + tl.arange(0, J)
    held = column < length
    b_ptr += batch * b_batch + group * b_group + at.to(tl.int64) * b_token
    b = _tile(b_ptr, length - at, b_token, J, STATES, BLOCK_N)
    c_ptr += batch * c_batch + group * c_group + start.to(tl.int64) * c_token
    q_ptr += batch * q_batch + start.to(tl.int64) * q_token
    k_ptr += batch * k_batch + at.to(tl.int64) * k_token

    db = tl.zeros((J, BLOCK_N), dtype=tl.float32)
    for member in range(per_group):
        head = group * per_group + member
        plane = (batch * heads + head) * length
        head_skip = skip_ptr
        if skip_ptr is not None:
            head_skip = skip_ptr + head
        column_high = _numbers(high_ptr + plane, column, length)[:, None]
        column_low = _numbers(low_ptr + plane, column, length)[:, None]
        scale = tl.full((J, 1), 1.0, dtype=tl.float32)
        if scale_ptr is not None:
            scale = _numbers(scale_ptr + plane, column, length)[:, None]
        k = _tile(k_ptr + head * k_head, length - at, k_token, J, WIDTH, BLOCK_P)
        by_columns = tl.zeros((J,), dtype=tl.float32)
        dscale = tl.zeros((J,), dtype=tl.float32)
        c_at = c_ptr
        q_at = q_ptr + head * q_head
        for first in range(start, length, R):
            row = first + tl.arange(0, R)
            seen = _seen(row[None, :], column[:, None], length)
            c = _tile(c_at, length - first, c_token, R, STATES, BLOCK_N)
            q = _tile(q_at, length - first, q_token, R, WIDTH, BLOCK_P)
            high = _numbers(high_ptr + plane, row, length)[None, :]
            low = _numbers(low_ptr + plane, row, length)[None, :]
            lse = _numbers(lse_ptr + plane, row, length)[None, :]
            outer = _numbers(outer_ptr + plane, row, length)[None, :]
            inverse = tl.full((1, R), 1.0, dtype=tl.float32)
            along = tl.zeros((1, R), dtype=tl.float32)
            if inverse_ptr is not None:
                inverse = _numbers(inverse_ptr + plane, row, length)[None, :]
                along = _numbers(along_ptr + plane, row, length)[None, :]
            products = dot(b, tl.trans(c), None, EMULATE)
            decay, unscaled = _student(products, high, low, column_high, column_low, seen, smallest)
            scores = dot(k, tl.trans(q), None, EMULATE) * factor
            own = column[:, None] == row[None, :]
            difference, _, _ = _difference(unscaled, scale, inverse, head_skip, scores, lse, own, seen)
            gradient = (difference * outer - along) * inverse
            if dscale_ptr is not None:
                dscale += tl.sum(gradient * unscaled, 1)
            gradient *= scale
            db = dot(gradient * decay, c.to(tl.float32), db, EMULATE)
            by_columns += tl.sum(tl.where(own, 0.0, gradient * unscaled), 1)
            c_at += R * c_token
            q_at += R * q_token
        tl.store(by_columns_ptr + plane + column, by_columns, mask=held)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + plane + column, dscale, mask=held)
    groups = heads // per_group
    n = tl.arange(0, BLOCK_N)
    db_ptr += ((batch * length + at) * groups + group) * STATES
    offset = tl.arange(0, J)[:, None] * (groups * STATES) + n[None, :]
    tl.store(db_ptr + offset, narrow(db, db_ptr.dtype.element_ty, EMULATE), mask=held[:, None] & (n < STATES)[None, :])
