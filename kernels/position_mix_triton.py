"""The mixing of positions in Triton: launches, gradients, the one-token step and the kernels.

Symbols: B batch, L length, H heads, P head width, N positions with weights; a column is a feature of a row of the
batch, so a head has B P columns; M rows, K places and C columns of a tile, T rows and columns of a tile of weights. In
the step, K places of a history, S places of a share and C features of a tile.

The mixture is a matrix product that visits the tiles of weights on and below the diagonal. Bias and residual are added
before the only rounding. The gradient of the inputs is the product with the transpose. The gradient of the weights has
few tiles and long sums over the features of all rows: separate programs compute shares of these sums, and a second
launch adds the shares in order. There are no atomics, so that two runs are bit-identical.

If a row has few features, a tile of columns covers several rows. The weights of a head are (N, N), or (N) by distance
if TOEPLITZ. Tiles of the latter at the same distance from the diagonal are equal: a launch lays out the M rows of these
tiles, a band, and the mixture reads its tiles there, 16 bytes at a time. Offsets are 64-bit up to a tile and 32-bit
inside it, except for columns of several rows. If EVEN, all tiles are full and need no masks.

The step reads all inputs so far once and performs two operations on each, so it is limited by memory traffic. A program
takes a share of the places and a tile of features; a second launch adds the shares if there are several. The share of a
place depends on the place alone, so that a result depends neither on the batch nor on the size of the cache. Programs
of shares after a row's position return at once; only the device reads positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, tl, triton
from .tracing import launch, opaque, tracing
from .triton_math import dot, narrow, strides, unit_stride

# (M, C, K, warps, stages) of the mixture and (T, C, warps, stages) of the weights' gradient, by bytes per element. No
# tile has been timed on a device. Compiled by Triton 3.9, full tiles spill at most 8 bytes on sm_90 and none on sm_80.
# float32 has no tensor cores at full precision, and its products take registers.
_MIX_TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 16, 8, 2)}
_WEIGHT_TILES = {2: (128, 64, 8, 3), 4: (64, 32, 8, 2)}
# C of a mixture whose factors have 2 bytes per element and whose tiles are full. It halves the loads and products of
# weights. With 206 to 251 registers and 144 KiB of shared memory it spills nothing on sm_90, and up to 48 bytes on
# sm_80. With masks, or float32 factors, it would spill hundreds of bytes.
_WIDE = 256
# Tiles of columns that run together, for one position after the other. The programs of a group read the same weights at
# once, and the inputs of so few columns stay in the L2 cache until the last position has read them.
_GROUP = 8
# Fewest programs of the gradient of the weights, if there are enough columns: a few times the processors of a device.
_PROGRAMS = 512
# Rows of a tile per program of the second launch.
_ROWS = 8
# Elements per program that lays out weights by distance, and per program that adds shares.
_BAND, _SUMMED = 1024, 1024


def mix_triton(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Return the mixture of every token, differentiable.

    Args:
        x: (B, L, H, P) inputs, not float64.
        weight: (H, N, N) weights, or (H, N) by distance; N >= L.
        bias: (H, N) bias or None.
        residual: (B, L, H, P) tensor to which the mixture is added, or None.

    Returns:
        (B, L, H, P) in the dtype of `residual`, or of `x` if there is none.
    """
    mix = _traced if tracing() else _Mix.apply
    y: Any = mix(x, weight, bias, residual)
    return y


class _Mix(torch.autograd.Function):
    """The Triton mixture; saves its inputs only.

    Backward: dx_j = sum_{i >= j} W_ij dy_i,  dW_ij = sum over rows and features of dy_i x_j for j <= i,
    db_i = sum of dy_i. The gradient of weights by distance is the sum of dW_ij with equal i - j.
    """

    @staticmethod
    def save(ctx: Any, *inputs: Tensor | None) -> tuple[Any, ...]:
        """Save what the backward needs, and return the inputs in the layout of the kernels."""
        x, weight, bias, stream = map(unit_stride, inputs)
        ctx.save_for_backward(x, weight, bias)
        return x, weight, bias, stream

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, stream = _Mix.save(ctx, *inputs)
        y = torch.empty(x.shape, dtype=x.dtype if stream is None else stream.dtype, device=x.device)
        _mix(x, weight, bias, stream, y, None, transposed=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad
        dy = unit_stride(gradients[0])
        dx = dweight = dbias = sums = None
        if needs_x:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            tiles_c = triton.cdiv(x.shape[0] * x.shape[3], _mix_tile(x, dy, weight)[1])
            if needs_bias:
                sums = torch.empty(x.shape[2], tiles_c, x.shape[1], dtype=torch.float32, device=x.device)
            _mix(dy, weight, None, None, dx, sums, transposed=True)
        if needs_weight:
            dweight = _weight_gradient(x, dy, weight)
        if needs_bias:
            total = dy.sum((0, 3), dtype=torch.float32).T if sums is None else sums.sum(1)
            dbias = torch.zeros_like(bias)
            dbias[:, : x.shape[1]] = total
        return dx, dweight, dbias, gradients[0] if needs_residual else None


_traced = opaque(
    _Mix,
    "position_mix",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual",
    lambda x, weight, bias, residual: (x if residual is None else residual).new_empty(x.shape),
    results=1,
    restore=_Mix.save,
)


def _cut(size: int, length: int) -> int:
    """Return the size of a tile, reduced to a shorter length; a product needs at least 16."""
    return min(size, max(16, triton.next_power_of_2(length)))


def _mix_tile(x: Tensor, *loaded: Tensor) -> tuple[int, int, int, int, int]:
    """Return (M, C, K, warps, stages) for inputs, or their gradient, of this shape and dtype.

    Args:
        loaded: factors of the product, which may be wider than `x`.
    """
    M, C, K, warps, stages = _MIX_TILES[x.dtype.itemsize]
    M, columns = _cut(M, x.shape[1]), x.shape[0] * x.shape[3]
    if x.shape[1] % M == 0 and columns % _WIDE == 0 and all(tensor.dtype.itemsize == 2 for tensor in loaded):
        C = _WIDE
    return M, _cut(C, columns), min(M, K), warps, stages


def _mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    sums: Tensor | None,
    transposed: bool,
) -> None:
    """Write the mixture of x to y, by the transposed weights if `transposed`, and column sums per tile to `sums`."""
    B, L, H, P = x.shape
    M, C, K, warps, stages = _mix_tile(y if transposed else x, x, weight)
    tiles_m, tiles_c = triton.cdiv(L, M), triton.cdiv(B * P, C)
    toeplitz = weight.dim() == 2
    if toeplitz:
        weight = _band(weight, L, M, transposed)
    by_row, by_column = weight.stride()[1:]
    with torch.cuda.device_of(x):
        mix_kernel[tiles_m * tiles_c, H](
            *(x, weight, bias, residual, y, sums, L, B * P, tiles_m, tiles_c),
            *(*strides(3, x, residual, y), weight.stride(0)),
            *((by_column, by_row) if transposed and not toeplitz else (by_row, by_column)),
            *strides(1, bias),
            WIDTH=P,
            PACKED=P % C != 0,
            EVEN=L % M == 0 and B * P % C == 0,
            TRANSPOSED=transposed,
            TOEPLITZ=toeplitz,
            M=M,
            C=C,
            K=K,
            GROUP=_GROUP,
            EMULATE=INTERPRETED,
            num_warps=warps,
            num_stages=stages,
        )


def _band(weight: Tensor, length: int, M: int, transposed: bool) -> Tensor:
    """Lay out the weights of distances below `length` for tiles of M positions, as (H, M, tiles M) rows of a matrix.

    The weights of any tile are neighbouring columns. Read by distance, they would be loaded one by one.
    """
    heads, tiles = weight.shape[0], triton.cdiv(length, M)
    band = torch.empty(heads, M, tiles * M, dtype=weight.dtype, device=weight.device)
    rows = min(_BAND // M, M)
    with torch.cuda.device_of(weight):
        band_kernel[tiles, triton.cdiv(M, rows), heads](
            *(weight, band, length, weight.stride(0)), TRANSPOSED=transposed, M=M, R=rows, num_warps=4
        )
    return band


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    B, L, H, P = x.shape
    T, C, warps, stages = _WEIGHT_TILES[x.dtype.itemsize]
    T, C = _cut(T, L), _cut(C, B * P)
    tiles, tiles_c = triton.cdiv(L, T), triton.cdiv(B * P, C)
    toeplitz = weight.dim() == 2
    programs = tiles if toeplitz else tiles * (tiles + 1) // 2
    shares = max(1, min(tiles_c, _PROGRAMS // (programs * H)))
    partial = torch.empty(shares, H, programs, T, T, dtype=torch.float32, device=x.device)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    rows = min(_ROWS, T)
    with torch.cuda.device_of(x):
        weight_products_kernel[programs, shares, H](
            *(x, dy, partial, L, B * P, tiles, tiles_c),
            *strides(3, x, dy),
            WIDTH=P,
            PACKED=P % C != 0,
            EVEN=L % T == 0 and B * P % C == 0,
            TOEPLITZ=toeplitz,
            T=T,
            C=C,
            EMULATE=INTERPRETED,
            num_warps=warps,
            num_stages=stages,
        )
        if toeplitz:
            if shares > 1:
                elements = partial[0].numel()
                share_sums_kernel[(triton.cdiv(elements, _SUMMED),)](
                    partial, elements, shares, BLOCK=_SUMMED, num_warps=4
                )
            toeplitz_gradient_kernel[tiles, H](
                partial[0], dweight, L, dweight.stride(0), T=T, R=rows, EMULATE=INTERPRETED, num_warps=4
            )
        else:
            dense_gradient_kernel[programs, triton.cdiv(T, rows), H](
                *(partial, dweight, L, shares),
                *dweight.stride()[:2],
                T=T,
                R=rows,
                EMULATE=INTERPRETED,
                num_warps=4,
            )
    return dweight


@triton.jit
def _as(values, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Convert an operand to the dtype of a product."""
    if values.dtype != dtype:
        values = narrow(values.to(tl.float32), dtype, EMULATE)
    return values


@triton.jit
def _columns(tile, columns, row_stride, WIDTH: tl.constexpr, PACKED: tl.constexpr, C: tl.constexpr):
    """Return the column offsets of a tile as a scalar and (C), and a mask; the tile covers one row unless PACKED."""
    first = tile * C
    c = tl.arange(0, C)
    base = tl.zeros((), dtype=tl.int64)
    if PACKED:
        offsets = ((first + c) // WIDTH).to(tl.int64) * row_stride + (first + c) % WIDTH
        inside = first + c < columns
    else:
        # Not `first % WIDTH`, for which Triton 3.6 forgets that it is a multiple of C, and loads single elements.
        base = (base + tile // (WIDTH // C)) * row_stride + tile % (WIDTH // C) * C
        offsets = c
        inside = c < C
    return base, offsets, inside


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    """Load a tile, whose mask is all true if EVEN."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["length"])
def band_kernel(weight_ptr, band_ptr, length, w_head, TRANSPOSED: tl.constexpr, M: tl.constexpr, R: tl.constexpr):
    """Write R rows and M columns of a band, with zeros for negative distances.

    Row m of the band holds weights of position m of any tile, for those up to the end of the tile. If TRANSPOSED it
    holds weights of the positions from the beginning of the tile on, for position m.
    """
    tiles = tl.num_programs(0)
    head = tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) * R + tl.arange(0, R))[:, None]
    column = (tl.program_id(0) * M + tl.arange(0, M))[None, :]
    distance = column - m if TRANSPOSED else (tiles - 1) * M - column + m
    mask = (distance >= 0) & (distance < length)
    w = tl.load(weight_ptr + head * w_head + distance, mask=mask, other=0.0)
    tl.store(band_ptr + head * M * (tiles * M) + m * (tiles * M) + column, w, mask=m < M)


@triton.jit
def _weights(
    weight_ptr,
    first_m, first_k,
    length,
    w_m, w_k,
    EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, TOEPLITZ: tl.constexpr, DIAGONAL: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Return the (M, K) weights of a tile from `weight_ptr`; DIAGONAL tiles may cross the diagonal.

    Masks are as coarse as possible, because a mask that changes within the 16 bytes that a thread loads at once would
    make it load single elements. Therefore weights above the diagonal are loaded and dropped; a band holds zeros there.
    """
    m, k = tl.arange(0, M), tl.arange(0, K)
    in_m, in_k = (first_m + m < length)[:, None], (first_k + k < length)[None, :]
    # Off the diagonal, the other index is smaller than one that is inside.
    inside = in_k if TRANSPOSED else in_m
    if DIAGONAL:
        inside = in_m & in_k
    w = _load(weight_ptr + m[:, None] * w_m + k[None, :] * w_k, inside, EVEN or TOEPLITZ)
    if DIAGONAL and not TOEPLITZ:
        distance = (first_m - first_k) + m[:, None] - k[None, :]
        w = tl.where((-distance if TRANSPOSED else distance) >= 0, w, 0.0)
    return w


@triton.jit(do_not_specialize=["tiles_m", "tiles_c"])
def mix_kernel(
    x_ptr, weight_ptr,
    bias_ptr,  # or None, like residual_ptr and sums_ptr
    residual_ptr, y_ptr, sums_ptr,
    length, columns, tiles_m, tiles_c,
    x_row, x_token, x_head, residual_row, residual_token, residual_head, y_row, y_token, y_head, w_head, w_m, w_k,
    bias_head,
    WIDTH: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, TOEPLITZ: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Compute a tile of positions and columns of a head of the mixture, or of its gradient by the inputs if TRANSPOSED.

    That gradient is the same product with the transposed weights, over the positions from each one on. It also writes
    (H, tiles_c, L) sums of the gradient over the columns of a tile, for the bias.

    Programs that run together share their inputs: they cover GROUP tiles of columns for all positions, longest sums
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

    # The gradient of a float32 residual stream is multiplied in the dtype of the inputs.
    operand = y_ptr.dtype.element_ty if TRANSPOSED else x_ptr.dtype.element_ty
    acc = tl.zeros((M, C), dtype=tl.float32)
    begin = first_m + M if TRANSPOSED else first_m * 0
    end = length if TRANSPOSED else first_m
    x_at = x_ptr + begin.to(tl.int64) * x_token
    if TOEPLITZ:
        # Columns of a band count from the tile of the first position, or, if TRANSPOSED, from the tile of the row.
        weight_ptr -= first_m if TRANSPOSED else first_m - (tiles_m - 1) * M
    else:
        weight_ptr += first_m.to(tl.int64) * w_m
    w_at = weight_ptr + begin.to(tl.int64) * w_k
    for at in range(begin, end, K):
        w = _weights(w_at, first_m, at, length, w_m, w_k, EVEN, TRANSPOSED, TOEPLITZ, False, M, K)
        mask = (at + k < length)[:, None] & in_c[None, :]
        x = _load(x_at + k[:, None] * x_token + offsets[None, :], mask, EVEN)
        acc = dot(_as(w, operand, EMULATE), _as(x, operand, EMULATE), acc, EMULATE)
        x_at += K * x_token
        w_at += K * w_k
    x_at = x_ptr + first_m.to(tl.int64) * x_token
    w_at = weight_ptr + first_m.to(tl.int64) * w_k
    for at in range(first_m, tl.minimum(first_m + M, length), K):
        w = _weights(w_at, first_m, at, length, w_m, w_k, EVEN, TRANSPOSED, TOEPLITZ, True, M, K)
        mask = (at + k < length)[:, None] & in_c[None, :]
        x = _load(x_at + k[:, None] * x_token + offsets[None, :], mask, EVEN)
        acc = dot(_as(w, operand, EMULATE), _as(x, operand, EMULATE), acc, EMULATE)
        if sums_ptr is not None:
            sums = tl.sum(x.to(tl.float32), 1)
            tl.store(sums_ptr + (head * tiles_c + tile_c) * length + at + k, sums, mask=at + k < length)
        x_at += K * x_token
        w_at += K * w_k

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


@triton.jit
def _tile_row(tile):
    """Return the largest i with i (i + 1) / 2 <= tile; the steps correct the rounding of the root."""
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    return tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)


@triton.jit(do_not_specialize=["tiles", "tiles_c"])
def weight_products_kernel(
    x_ptr, dy_ptr, partial_ptr,
    length, columns, tiles, tiles_c,
    x_row, x_token, x_head, dy_row, dy_token, dy_head,
    WIDTH: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, TOEPLITZ: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Compute the (shares, H, tiles, T, T) tiles of dy x^T on and below the diagonal, each over a share of columns.

    A program computes one tile in the order (0, 0), (1, 0), (1, 1), (2, 0), ..., or, if TOEPLITZ, the sum of a diagonal
    of tiles.
    """
    tile, share = tl.program_id(0), tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    t = tl.arange(0, T)
    if TOEPLITZ:
        below = tile
        tile_j = tile * 0
        steps = (tiles - below) * tiles_c
    else:
        tile_i = _tile_row(tile)
        tile_j = tile - tile_i * (tile_i + 1) // 2
        below = tile_i - tile_j
        steps = tiles_c
    operand = x_ptr.dtype.element_ty
    x_ptr += head * x_head
    dy_ptr += head * dy_head
    each = tl.cdiv(steps, tl.num_programs(1))
    acc = tl.zeros((T, T), dtype=tl.float32)
    column = share * each
    j = tile_j * T
    if TOEPLITZ:
        j += column // tiles_c * T
        column %= tiles_c
    for _ in range(share * each, tl.minimum((share + 1) * each, steps)):
        i = j + below * T
        base, offsets, in_c = _columns(column, columns, dy_row, WIDTH, PACKED, C)
        dy_at = dy_ptr + (base + i.to(tl.int64) * dy_token)
        dy = _load(dy_at + t[:, None] * dy_token + offsets[None, :], (i + t < length)[:, None] & in_c[None, :], EVEN)
        base, offsets, in_c = _columns(column, columns, x_row, WIDTH, PACKED, C)
        x_at = x_ptr + (base + j.to(tl.int64) * x_token)
        x = _load(x_at + t[:, None] * x_token + offsets[None, :], (j + t < length)[:, None] & in_c[None, :], EVEN)
        acc = dot(_as(dy, operand, EMULATE), tl.trans(_as(x, operand, EMULATE)), acc, EMULATE)
        column += 1
        if TOEPLITZ:
            j = tl.where(column == tiles_c, j + T, j)
            column = tl.where(column == tiles_c, 0, column)
    place = (share * tl.num_programs(2) + head) * tl.num_programs(0) + tile
    tl.store(partial_ptr + place * (T * T) + t[:, None] * T + t[None, :], acc)


@triton.jit(do_not_specialize=["length", "shares"])
def dense_gradient_kernel(
    partial_ptr, dweight_ptr,
    length, shares,
    w_head, w_row,
    T: tl.constexpr, R: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Sum the shares of R rows of a tile. Nothing is written above the diagonal."""
    tile = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    tile_i = _tile_row(tile)
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


@triton.jit(do_not_specialize=["shares"])
def share_sums_kernel(partial_ptr, elements, shares, BLOCK: tl.constexpr):
    """Add all shares to the first, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for share in range(shares):
        acc += tl.load(partial_ptr + tl.cast(share, tl.int64) * elements + at, mask=at < elements, other=0.0)
    tl.store(partial_ptr + at, acc, mask=at < elements)


@triton.jit(do_not_specialize=["length"])
def toeplitz_gradient_kernel(
    partial_ptr, dweight_ptr,
    length,
    w_head,
    T: tl.constexpr, R: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Sum T diagonals of the first share, R rows at a time.

    Entry (a, b) of a tile has the distance T tile + a - b. A diagonal therefore spans two tiles: distance T tile + s
    has the columns (a - s) mod T, of the next tile if a < s.
    """
    tiles = tl.num_programs(0)
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, T)
    acc = tl.zeros((T,), dtype=tl.float32)
    partial_ptr += (head * tiles + tile) * (T * T)
    for first in range(0, T, R):
        a = first + tl.arange(0, R)[:, None]
        behind = a < s[None, :]
        b = tl.where(behind, a - s[None, :] + T, a - s[None, :])
        mask = tl.where(behind, tile + 1, tile) < tiles
        acc += tl.sum(tl.load(partial_ptr + tl.where(behind, T * T, 0) + a * T + b, mask=mask, other=0.0), 0)
    distance = tile * T + s
    values = narrow(acc, dweight_ptr.dtype.element_ty, EMULATE)
    tl.store(dweight_ptr + head * w_head + distance, values, mask=distance < length)


# (S, places per iteration, C). A thread loads 16 bytes of bfloat16, in 8 rows of 16 threads. Reading a share takes
# about as long as launching a program. Not timed on a device.
_TILES = (256, 32, 128)


@launch(
    "Tensor history, Tensor weight, Tensor? bias, Tensor positions, Tensor? residual",
    lambda history, *others: (history if others[-1] is None else others[-1]).new_empty(
        history.shape[0], *history.shape[2:]
    ),
)
def mix_step_triton(
    history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, residual: Tensor | None
) -> Tensor:
    """Mix one token on checked arguments of any strides, without a copy or a gradient.

    Args:
        history: (B, K, H, P) inputs by place, not float64.
        weight: (H, N, N) weights, or (H, N) by distance.
        bias: (H, N) bias or None.
        positions: (B) place of the newest token; negative for rows without tokens.
        residual: (B, H, P) tensor to which the result is added, or None.

    Returns:
        (B, H, P) in the dtype of `residual`, or of `history` if there is none.
    """
    B, K, H, P = history.shape
    limit = min(K, weight.shape[-1])
    y = torch.empty((B, H, P), dtype=history.dtype if residual is None else residual.dtype, device=history.device)
    share, rows, wide = _TILES
    C = min(wide, triton.next_power_of_2(P))
    shares = triton.cdiv(limit, share)
    partial = torch.empty((B, H, shares, P), dtype=torch.float32, device=history.device) if shares > 1 else None
    toeplitz = weight.dim() == 2
    epilogue = (bias, residual, y, *strides(2, bias), *strides(3, residual))
    if not B:
        return y
    with torch.cuda.device_of(history):
        _step_kernel[B * H, triton.cdiv(P, C), shares](
            *(history, weight, positions, partial),
            *epilogue,
            *(limit, H, *history.stride()),
            *(weight.stride() if not toeplitz else (weight.stride(0), 0, weight.stride(1))),
            positions.stride(0),
            WIDTH=P,
            TOEPLITZ=toeplitz,
            S=share,
            R=rows,
            C=C,
            EMULATE=INTERPRETED,
            num_warps=4,
        )
        if partial is not None:
            _sum_kernel[B * H, triton.cdiv(P, C)](
                *(positions, partial, *epilogue, limit, H, shares, positions.stride(0)),
                WIDTH=P,
                S=share,
                C=C,
                EMULATE=INTERPRETED,
                num_warps=4,
            )
    return y


@triton.jit
def _finish(
    y, position,
    bias_ptr, residual_ptr, y_ptr,
    bias_head, bias_place, residual_row, residual_head, residual_feature,
    limit, row, head, heads, feature,
    WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add bias and residual and store the result; NaN for positions without weights or inputs."""
    inside = feature < WIDTH
    if bias_ptr is not None:
        known = (position >= 0) & (position < limit)
        y += tl.load(bias_ptr + head * bias_head + position * bias_place, mask=known, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += row * residual_row + head * residual_head
        y += tl.load(residual_ptr + feature * residual_feature, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(position < limit, y, float("nan"))
    place = (row * heads + head) * WIDTH + feature
    tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty, EMULATE), mask=inside)


@triton.jit(do_not_specialize=["limit"])
def _step_kernel(
    history_ptr, weight_ptr, positions_ptr,
    partial_ptr,  # or None, like bias_ptr and residual_ptr
    bias_ptr, residual_ptr, y_ptr,
    bias_head, bias_place, residual_row, residual_head, residual_feature,
    limit, heads,
    history_row, history_place, history_head, history_feature, w_head, w_row, w_place, positions_row,
    WIDTH: tl.constexpr, TOEPLITZ: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Compute the sum over a share of the places, or the result if there is a single share."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    first = tl.program_id(2) * S
    position = tl.load(positions_ptr + row * positions_row).to(tl.int64)
    feature = tl.program_id(1) * C + tl.arange(0, C)
    last = tl.minimum(position, limit - 1).to(tl.int32)  # place
    r = tl.arange(0, R)
    history_ptr += row * history_row + head * history_head + first.to(tl.int64) * history_place
    offsets = r[:, None] * history_place + feature[None, :] * history_feature
    weight_ptr += head * w_head + last.to(tl.int64) * (w_place if TOEPLITZ else w_row)
    acc = tl.zeros((R, C), dtype=tl.float32)
    for at in range(first, tl.minimum(first + S, last + 1), R):
        place = at + r
        known = place <= last
        w = tl.load(weight_ptr + (-place if TOEPLITZ else place) * w_place, mask=known, other=0.0).to(tl.float32)
        x = tl.load(history_ptr + offsets, mask=known[:, None] & (feature < WIDTH)[None, :], other=0.0)
        acc += w[:, None] * x.to(tl.float32)
        history_ptr += R * history_place
    y = tl.sum(acc, 0)
    if partial_ptr is None:
        _finish(
            y, position, bias_ptr, residual_ptr, y_ptr,
            bias_head, bias_place, residual_row, residual_head, residual_feature,
            limit, row, head, heads, feature, WIDTH, EMULATE,
        )  # fmt: skip
    else:
        place = ((row * heads + head) * tl.num_programs(2) + tl.program_id(2)) * WIDTH + feature
        tl.store(partial_ptr + place, y, mask=feature < tl.where(first <= last, WIDTH, 0))


@triton.jit(do_not_specialize=["limit", "shares"])
def _sum_kernel(
    positions_ptr, partial_ptr,
    bias_ptr,  # or None, like residual_ptr
    residual_ptr, y_ptr,
    bias_head, bias_place, residual_row, residual_head, residual_feature,
    limit, heads, shares,
    positions_row,
    WIDTH: tl.constexpr, S: tl.constexpr, C: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the shares up to that of the position, and store the result."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    position = tl.load(positions_ptr + row * positions_row).to(tl.int64)
    feature = tl.program_id(1) * C + tl.arange(0, C)
    last = tl.minimum(position, limit - 1).to(tl.int32)
    partial_ptr += (row * heads + head) * shares * WIDTH + feature
    y = tl.zeros((C,), dtype=tl.float32)
    for share in range(tl.cdiv(last + 1, S)):
        y += tl.load(partial_ptr + share * WIDTH, mask=feature < WIDTH, other=0.0)
    _finish(
        y, position, bias_ptr, residual_ptr, y_ptr,
        bias_head, bias_place, residual_row, residual_head, residual_feature,
        limit, row, head, heads, feature, WIDTH, EMULATE,
    )  # fmt: skip
