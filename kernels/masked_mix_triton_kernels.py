"""The Triton kernels of the mixing of positions, launched from `masked_mix_triton.py`.

Symbols: L length, H heads, P head width; a column is a feature of a row of the batch, of which a head has B P; M rows,
K places and C columns of a tile, T rows and columns of a tile of weights.

Where a row has few features, a tile of columns takes those of several rows. The weights of a head are (N, N), or (N) by
distance where TOEPLITZ: a tile then reads the same few numbers again and again, from the cache. Offsets count in 64
bits up to a tile and in 32 bits inside it, but for columns of several rows.
"""

from __future__ import annotations

from ._triton import tl, triton
from .triton_math import narrow


@triton.jit
def _as(values, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """An operand in the dtype that is multiplied in."""
    if values.dtype != dtype:
        values = narrow(values.to(tl.float32), dtype, EMULATE)
    return values


@triton.jit
def _columns(tile, columns, row_stride, WIDTH: tl.constexpr, PACKED: tl.constexpr, C: tl.constexpr):
    """Offsets of a tile's columns, a scalar and (C), and which of them there are; all of one row unless PACKED."""
    first = tile * C
    c = tl.arange(0, C)
    base = tl.zeros((), dtype=tl.int64)
    if PACKED:
        offsets = ((first + c) // WIDTH).to(tl.int64) * row_stride + (first + c) % WIDTH
        inside = first + c < columns
    else:
        base = (base + first // WIDTH) * row_stride + first % WIDTH
        offsets = c
        inside = c < C
    return base, offsets, inside


@triton.jit
def _weights(
    weight_ptr,
    first_m,
    first_k,
    length,
    w_m,
    w_k,
    TRANSPOSED: tl.constexpr,
    TOEPLITZ: tl.constexpr,
    DIAGONAL: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """(M, K) weights, of the tile at `weight_ptr` or from those by distance; the DIAGONAL may go through the tile.

    Masks are as coarse as they can be: one that changes inside the 16 bytes that a thread loads would make it load
    number by number. So what stands above the diagonal is loaded and dropped, except by distance, where nothing does.
    """
    m, k = tl.arange(0, M), tl.arange(0, K)
    distance = (first_m - first_k) + m[:, None] - k[None, :]
    in_m, in_k = (first_m + m < length)[:, None], (first_k + k < length)[None, :]
    if TRANSPOSED:
        distance = -distance
    # Off the diagonal, the others come before one that is inside.
    inside = in_k if TRANSPOSED else in_m
    if DIAGONAL:
        inside = in_m & in_k
    if TOEPLITZ:
        return tl.load(weight_ptr + distance, mask=inside & (distance >= 0), other=0.0)
    w = tl.load(weight_ptr + m[:, None] * w_m + k[None, :] * w_k, mask=inside, other=0.0)
    return tl.where(distance >= 0, w, 0.0) if DIAGONAL else w


@triton.jit(do_not_specialize=["tiles_m", "tiles_c"])
def mix_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # or None, as the next one
    residual_ptr,
    y_ptr,
    sums_ptr,  # or None
    length,
    columns,
    tiles_m,
    tiles_c,
    x_row,
    x_token,
    x_head,
    residual_row,
    residual_token,
    residual_head,
    y_row,
    y_token,
    y_head,
    w_head,
    w_m,
    w_k,
    bias_head,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TOEPLITZ: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Mixtures, a tile of positions and of columns of a head to a program; TRANSPOSED: the gradient of the inputs.

    That gradient is the same product with the weights' transpose, of the positions from each one on. On the way it sums
    (H, tiles_c, L) gradients over a tile's columns, for the bias.

    Programs that run together share what they read: GROUP tiles of columns, for all positions, those with most to sum
    first.
    """
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) // (GROUP * tiles_m)
    members = tl.minimum(tiles_c - group * GROUP, GROUP)
    place = tl.program_id(0) - group * GROUP * tiles_m
    tile_m = place // members
    tile_c = group * GROUP + place % members
    if not TRANSPOSED:
        tile_m = tiles_m - 1 - tile_m
    first_m = tile_m * M
    m, k = tl.arange(0, M), tl.arange(0, K)
    base, offsets, in_c = _columns(tile_c, columns, x_row, WIDTH, PACKED, C)
    x_ptr += head * x_head + base
    weight_ptr += head * w_head

    # The gradient of a float32 stream is multiplied in the dtype of the inputs.
    dot = y_ptr.dtype.element_ty if TRANSPOSED else x_ptr.dtype.element_ty
    acc = tl.zeros((M, C), dtype=tl.float32)
    begin = first_m + M if TRANSPOSED else first_m * 0
    end = length if TRANSPOSED else first_m
    x_at = x_ptr + begin.to(tl.int64) * x_token
    w_at = weight_ptr if TOEPLITZ else weight_ptr + first_m.to(tl.int64) * w_m + begin.to(tl.int64) * w_k
    for at in range(begin, end, K):
        w = _weights(w_at, first_m, at, length, w_m, w_k, TRANSPOSED, TOEPLITZ, False, M, K)
        mask = (at + k < length)[:, None] & in_c[None, :]
        x = tl.load(x_at + k[:, None] * x_token + offsets[None, :], mask=mask, other=0.0)
        acc = dot(_as(w, dot, EMULATE), _as(x, dot, EMULATE), acc, EMULATE)
        x_at += K * x_token
        w_at += 0 if TOEPLITZ else K * w_k
    x_at = x_ptr + first_m.to(tl.int64) * x_token
    w_at = weight_ptr if TOEPLITZ else weight_ptr + first_m.to(tl.int64) * w_m + first_m.to(tl.int64) * w_k
    for at in range(first_m, tl.minimum(first_m + M, length), K):
        w = _weights(w_at, first_m, at, length, w_m, w_k, TRANSPOSED, TOEPLITZ, True, M, K)
        mask = (at + k < length)[:, None] & in_c[None, :]
        x = tl.load(x_at + k[:, None] * x_token + offsets[None, :], mask=mask, other=0.0)
        acc = dot(_as(w, dot, EMULATE), _as(x, dot, EMULATE), acc, EMULATE)
        if sums_ptr is not None:
            sums = tl.sum(x.to(tl.float32), 1)
            tl.store(sums_ptr + (head * tiles_c + tile_c) * length + at + k, sums, mask=at + k < length)
        x_at += K * x_token
        w_at += 0 if TOEPLITZ else K * w_k

    in_m = first_m + m < length
    mask = in_m[:, None] & in_c[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head * bias_head + first_m + m, mask=in_m, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    if residual_ptr is not None:
        base, offsets, _ = _columns(tile_c, columns, residual_row, WIDTH, PACKED, C)
        residual_ptr += head * residual_head + base + first_m.to(tl.int64) * residual_token
        residual = tl.load(residual_ptr + m[:, None] * residual_token + offsets[None, :], mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    base, offsets, _ = _columns(tile_c, columns, y_row, WIDTH, PACKED, C)
    y_ptr += head * y_head + base + first_m.to(tl.int64) * y_token
    y = narrow(acc, y_ptr.dtype.element_ty, EMULATE)
    tl.store(y_ptr + m[:, None] * y_token + offsets[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["tiles", "tiles_c"])
def weight_products_kernel(
    x_ptr,
    dy_ptr,
    partial_ptr,
    length,
    columns,
    tiles,
    tiles_c,
    x_row,
    x_token,
    x_head,
    dy_row,
    dy_token,
    dy_head,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    TOEPLITZ: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Tiles of dy x^T on and below the diagonal, summed over a share of the columns: (shares, H, tiles, T, T).

    A program has a tile, by rows (0, 0), (1, 0), (1, 1), (2, 0), ...; or, where TOEPLITZ, a diagonal of them and their
    sum.
    """
    tile, share = tl.program_id(0), tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    t = tl.arange(0, T)
    if TOEPLITZ:
        below = tile
        tile_j = tile * 0
        steps = (tiles - below) * tiles_c
    else:
        # The largest i with i (i + 1) / 2 <= tile; the root is of a number that float32 may have rounded.
        tile_i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        tile_i = tl.where(tile_i * (tile_i + 1) // 2 > tile, tile_i - 1, tile_i)
        tile_i = tl.where((tile_i + 1) * (tile_i + 2) // 2 <= tile, tile_i + 1, tile_i)
        tile_j = tile - tile_i * (tile_i + 1) // 2
        below = tile_i - tile_j
        steps = tiles_c
    dot = x_ptr.dtype.element_ty
    x_ptr += head * x_head
    dy_ptr += head * dy_head
    each = tl.cdiv(steps, tl.num_programs(1))
    acc = tl.zeros((T, T), dtype=tl.float32)
    for step in range(share * each, tl.minimum((share + 1) * each, steps)):
        j = (tile_j + step // tiles_c) * T
        i = j + below * T
        base, offsets, in_c = _columns(step % tiles_c, columns, dy_row, WIDTH, PACKED, C)
        mask = (i + t < length)[:, None] & in_c[None, :]
        dy = tl.load(
            dy_ptr + (base + i.to(tl.int64) * dy_token) + t[:, None] * dy_token + offsets[None, :], mask=mask, other=0.0
        )
        base, offsets, in_c = _columns(step % tiles_c, columns, x_row, WIDTH, PACKED, C)
        mask = (j + t < length)[:, None] & in_c[None, :]
        x = tl.load(
            x_ptr + (base + j.to(tl.int64) * x_token) + t[:, None] * x_token + offsets[None, :], mask=mask, other=0.0
        )
        acc = dot(_as(dy, dot, EMULATE), tl.trans(_as(x, dot, EMULATE)), acc, EMULATE)
    place = (share * tl.num_programs(2) + head) * tl.num_programs(0) + tile
    tl.store(partial_ptr + place * (T * T) + t[:, None] * T + t[None, :], acc)


@triton.jit(do_not_specialize=["length", "shares"])
def dense_gradient_kernel(
    partial_ptr,
    dweight_ptr,
    length,
    shares,
    w_head,
    w_row,
    T: tl.constexpr,
    R: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum the shares of a tile; R of its rows to a program. Nothing is written above the diagonal."""
    tile = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    tile_i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    tile_i = tl.where(tile_i * (tile_i + 1) // 2 > tile, tile_i - 1, tile_i)
    tile_i = tl.where((tile_i + 1) * (tile_i + 2) // 2 <= tile, tile_i + 1, tile_i)
    tile_j = tile - tile_i * (tile_i + 1) // 2
    r = tl.program_id(1) * R + tl.arange(0, R)
    t = tl.arange(0, T)
    acc = tl.zeros((R, T), dtype=tl.float32)
    for share in range(shares):
        place = (share * tl.num_programs(2) + head) * tl.num_programs(0) + tile
        acc += tl.load(partial_ptr + place * (T * T) + r[:, None] * T + t[None, :])
    i, j = tile_i * T + r, tile_j * T + t
    dweight_ptr += head * w_head + i[:, None].to(tl.int64) * w_row + j[None, :]
    mask = (i < length)[:, None] & (j[None, :] <= i[:, None])
    tl.store(dweight_ptr, narrow(acc, dweight_ptr.dtype.element_ty, EMULATE), mask=mask)


@triton.jit(do_not_specialize=["length", "shares"])
def toeplitz_gradient_kernel(
    partial_ptr,
    dweight_ptr,
    length,
    shares,
    w_head,
    T: tl.constexpr,
    R: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum T diagonals over the shares, R rows at a time.

    A diagonal that begins at the first column of a tile ends in the next tile: of entry (a, b) the distance is
    T tile + a - b, so distance T tile + s has the columns (a - s) mod T, in the next tile where a < s.
    """
    tiles = tl.num_programs(0)
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, T)
    acc = tl.zeros((T,), dtype=tl.float32)
    for share in range(shares):
        place = (share * tl.num_programs(1) + head) * tiles + tile
        for first in range(0, T, R):
            a = first + tl.arange(0, R)[:, None]
            behind = a < s[None, :]
            b = tl.where(behind, a - s[None, :] + T, a - s[None, :])
            offsets = tl.where(behind, T * T, 0) + a * T + b
            mask = tl.where(behind, tile + 1, tile) < tiles
            acc += tl.sum(tl.load(partial_ptr + place * (T * T) + offsets, mask=mask, other=0.0), 0)
    distance = tile * T + s
    values = narrow(acc, dweight_ptr.dtype.element_ty, EMULATE)
    tl.store(dweight_ptr + head * w_head + distance, values, mask=distance < length)
