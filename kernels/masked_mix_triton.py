"""The mixing of positions by Triton: launches, and the gradient.

Symbols: B batch, L length, H heads, P head width, N positions that there are weights for; M rows, K places and C
columns of a tile, T rows and columns of a tile of weights.

A matrix product that visits the tiles of weights on and below the diagonal. Bias and residual are added before the one
rounding. The gradient of the inputs is the product with the transpose. The gradient of the weights has few tiles and a
long sum, over the features of all rows: shares of that sum are programs of their own, and a second launch adds them up
in order. No atomics: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, triton
from .masked_mix_triton_kernels import (
    dense_gradient_kernel,
    mix_kernel,
    toeplitz_gradient_kernel,
    weight_products_kernel,
)

# (M, C, K, warps, stages) of the mixtures and (T, C, warps, stages) of the weights' gradient, by bytes of an element.
# Compiled by Triton 3.9 they spill no registers on sm_80 and sm_90; shared memory is at most 144 KiB. No tile has been
# timed on a device. float32 has no tensor cores at full precision, and its products take registers.
_MIX_TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 16, 8, 2)}
_WEIGHT_TILES = {2: (128, 64, 8, 3), 4: (64, 32, 8, 2)}
# Tiles of columns that run together, those of all positions one after the other: so many programs at once read the same
# weights, and the inputs of so few columns stay in the L2 cache until the last position has read them.
_GROUP = 8
# Programs of the weights' gradient, at least, where the columns can be shared among as many: a few times the processors
# of a device.
_PROGRAMS = 512
# Rows of a tile that a program of the second launch takes.
_ROWS = 8


def mix_triton(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The mixture of every token, differentiable.

    Args:
        x: (B, L, H, P) inputs, not float64.
        weight: (H, N, N), or (H, N) by distance; N >= L.
        bias: (H, N).
        residual: (B, L, H, P) that the mixture is added to.

    Returns:
        (B, L, H, P) in the dtype of `residual`, or of `x` if there is none.
    """
    y = _Mix.apply(x, weight, bias, residual)
    assert isinstance(y, Tensor)  # `apply` is untyped
    return y


class _Mix(torch.autograd.Function):
    """Keeps its inputs only.

    Backward: dx_j = sum_{i >= j} W_ij dy_i,  dW_ij = sum over rows and features of dy_i x_j for j <= i,
    db_i = sum of dy_i; of weights by distance the sum of dW_ij over i - j.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        x, weight = _unit_stride(x), _unit_stride(weight)
        bias = None if bias is None else _unit_stride(bias)
        stream = None if residual is None else _unit_stride(residual)
        ctx.save_for_backward(x, weight, bias)
        y = torch.empty(x.shape, dtype=x.dtype if stream is None else stream.dtype, device=x.device)
        _mix(x, weight, bias, stream, y, None, transposed=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad
        dy = _unit_stride(gradients[0])
        dx = dweight = dbias = sums = None
        if needs_x:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            tiles_c = triton.cdiv(x.shape[0] * x.shape[3], _mix_tile(x)[1])
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


def _unit_stride(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is dense; views of a wider projection stay as they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _cut(size: int, length: int) -> int:
    """A tile's size, less where there is less to fill it; a product takes 16 at least."""
    return min(size, max(16, triton.next_power_of_2(length)))


def _mix_tile(x: Tensor) -> tuple[int, int, int, int, int]:
    """(M, C, K, warps, stages) for inputs, or their gradient, of this shape and dtype."""
    M, C, K, warps, stages = _MIX_TILES[x.dtype.itemsize]
    M = _cut(M, x.shape[1])
    return M, _cut(C, x.shape[0] * x.shape[3]), min(M, K), warps, stages


def _mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    sums: Tensor | None,
    transposed: bool,
) -> None:
    """Write the mixtures of x, or those by the transpose, to y; and the sums over each tile's columns of x."""
    B, L, H, P = x.shape
    M, C, K, warps, stages = _mix_tile(y if transposed else x)
    tiles_m, tiles_c = triton.cdiv(L, M), triton.cdiv(B * P, C)
    toeplitz = weight.dim() == 2
    by_row, by_column = (1, 1) if toeplitz else weight.stride()[1:]
    with torch.cuda.device_of(x):
        mix_kernel[tiles_m * tiles_c, H](
            x,
            weight,
            bias,
            residual,
            y,
            sums,
            L,
            B * P,
            tiles_m,
            tiles_c,
            *x.stride()[:3],
            *((0, 0, 0) if residual is None else residual.stride()[:3]),
            *y.stride()[:3],
            weight.stride(0),
            *((by_column, by_row) if transposed else (by_row, by_column)),
            0 if bias is None else bias.stride(0),
            WIDTH=P,
            PACKED=P % C != 0,
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
            x,
            dy,
            partial,
            L,
            B * P,
            tiles,
            tiles_c,
            *x.stride()[:3],
            *dy.stride()[:3],
            WIDTH=P,
            PACKED=P % C != 0,
            TOEPLITZ=toeplitz,
            T=T,
            C=C,
            EMULATE=INTERPRETED,
            num_warps=warps,
            num_stages=stages,
        )
        if toeplitz:
            toeplitz_gradient_kernel[tiles, H](
                partial, dweight, L, shares, dweight.stride(0), T=T, R=rows, EMULATE=INTERPRETED, num_warps=4
            )
        else:
            dense_gradient_kernel[programs, triton.cdiv(T, rows), H](
                partial,
                dweight,
                L,
                shares,
                *dweight.stride()[:2],
                T=T,
                R=rows,
                EMULATE=INTERPRETED,
                num_warps=4,
            )
    return dweight
