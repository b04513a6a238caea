"""Triton kernels of `rms_norm` and `add_rms_norm`.

Symbols: R rows (all dimensions but the last), D normalised width, S group size.

A program holds whole groups, so that it reads x and z once and shares no statistics with other programs. Results are
rounded like in the torch path: float32 up to the division, one rounding to the dtype of x, then the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import tl, triton
from .tracing import opaque, tracing
from .triton_math import sigmoid, strides

# A group is one tile. Compiled by Triton 3.9 for sm_80 and sm_90, the backward spills up to 220 bytes of registers per
# thread at 8192 elements and up to 420 at 16384; torch handles wider groups.
WIDEST_GROUP = 16384

# Rows over which a program of the backward kernel sums dweight: enough that the partial sums cause a sixteenth of the
# traffic of a bfloat16 x, few enough that some thousand rows fill a GPU.
_SUMMED_ROWS = 32


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, z: Tensor | None, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Run `rms_norm` on checked arguments; `group_size` is at most `WIDEST_GROUP`."""
    norm = _traced_norm if tracing() else _RmsNormTriton.apply
    y: Any = norm(x, weight, z, eps, group_size, norm_before_gate)
    return y


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Run `add_rms_norm` on checked arguments, with the norm in `dtype`; D is at most `WIDEST_GROUP`."""
    norm = _traced_add if tracing() else _AddRmsNormTriton.apply
    normed, total = norm(x, residual, weight, eps, dtype)  # type: ignore[misc]
    return normed, total


class _RmsNormTriton(torch.autograd.Function):
    """y = weight * n with n = r u, r = (mean(u^2) + eps)^(-1/2) and u = x silu(z); or u = x and y = weight n silu(z).

    Backward, with dn = weight dy (dy silu(z) if the norm comes first):  dweight = sum over rows of dn n / weight,
    du = r (dn - n mean(dn n)), and the gate by the product rule. Only x, z and r are saved.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, z, eps, group_size, ctx.norm_before_gate = arguments
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        r = _forward(x, weight, y, eps, group_size, z=z, norm_before_gate=ctx.norm_before_gate)
        ctx.save_for_backward(x, weight, z, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, z, r = ctx.saved_tensors
        needs_x, needs_weight, needs_z = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dz = None if z is None or not needs_z else torch.empty_like(z, memory_format=torch.contiguous_format)
        dweight = _backward(x, weight, r, dy, dx, needs_weight, z=z, dz=dz, norm_before_gate=ctx.norm_before_gate)
        return dx, dweight, dz, None, None, None


class _AddRmsNormTriton(torch.autograd.Function):
    """total = residual + x; normed = weight n as above with u = total.

    Backward: the gradient of x and of the residual is du plus the gradient of `total`, one tensor if their dtypes are
    equal. Only total and r are saved.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        normed = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        total = torch.empty_like(residual, memory_format=torch.contiguous_format)
        r = _forward(x, weight, normed, eps, x.shape[-1], residual=residual, total=total)
        ctx.save_for_backward(total, weight, r)
        ctx.dtypes = x.dtype, residual.dtype
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dnormed, dtotal = gradients
        total, weight, r = ctx.saved_tensors
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        x_dtype, dtype = ctx.dtypes
        if dnormed is None:  # the norm is unused
            return None if dtotal is None else dtotal.to(x_dtype), dtotal, None, None, None
        same = x_dtype == dtype
        dx = dresidual = None
        if needs_x or (needs_residual and same):
            dx = torch.empty_like(total, dtype=x_dtype)
        if needs_residual:
            dresidual = dx if same else torch.empty_like(total)
        second = None if same else dresidual
        dweight = _backward(total, weight, r, dnormed, dx, needs_weight, dtotal=dtotal, dresidual=second)
        return dx, dresidual, dweight, None, None


_traced_norm = opaque(
    _RmsNormTriton,
    "rms_norm",
    "Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate",
    lambda x, *_: x.new_empty(x.shape),
    results=1,
)
_traced_add = opaque(
    _AddRmsNormTriton,
    "add_rms_norm",
    "Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype",
    lambda x, residual, weight, eps, dtype: (x.new_empty(x.shape, dtype=dtype), residual.new_empty(x.shape)),
)


def _forward(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    eps: float,
    group_size: int,
    *,
    z: Tensor | None = None,
    norm_before_gate: bool = False,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Fill the contiguous `y`, and `total` if a residual is given; return the (R, D / S) reciprocal roots r."""
    width = x.shape[-1]
    x_rows = x.reshape(-1, width)
    z_rows, residual_rows = (None if tensor is None else tensor.reshape(-1, width) for tensor in (z, residual))
    rows, groups = x_rows.shape[0], width // group_size
    r = x.new_empty(rows, groups, dtype=torch.float32)
    block_rows, block, warps = _tile(group_size)
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(rows, block_rows), groups)](
            *(x_rows, weight, z_rows, residual_rows, y, total, r, rows, group_size, eps),
            *(*strides(2, x_rows), *weight.stride(), *strides(2, z_rows, residual_rows)),
            NORM_FIRST=norm_before_gate,
            BLOCK_R=block_rows,
            BLOCK_S=block,
            num_warps=warps,
        )
    return r


def _backward(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    dy: Tensor,
    dx: Tensor | None,
    needs_weight: bool,
    *,
    z: Tensor | None = None,
    dz: Tensor | None = None,
    norm_before_gate: bool = False,
    dtotal: Tensor | None = None,
    dresidual: Tensor | None = None,
) -> Tensor | None:
    """Fill those of the contiguous `dx`, `dz` and `dresidual` that are given; return dweight if it is needed."""
    width = x.shape[-1]
    x_rows, dy_rows = x.reshape(-1, width), dy.reshape(-1, width)
    z_rows, dtotal_rows = (None if tensor is None else tensor.reshape(-1, width) for tensor in (z, dtotal))
    rows, groups = r.shape
    group_size = width // groups
    block_rows, block, warps = _tile(group_size)
    programs = triton.cdiv(rows, _SUMMED_ROWS)
    partial = x.new_empty(programs, width, dtype=torch.float32) if needs_weight else None
    with torch.cuda.device_of(x):
        _backward_kernel[(programs, groups)](
            *(x_rows, weight, z_rows, r, dy_rows, dtotal_rows, dx, dz, dresidual, partial, rows, group_size),
            *(*strides(2, x_rows), *weight.stride(), *strides(2, z_rows, dy_rows, dtotal_rows)),
            NORM_FIRST=norm_before_gate,
            ROWS=_SUMMED_ROWS,
            BLOCK_R=block_rows,
            BLOCK_S=block,
            num_warps=warps,
        )
    # The order of this sum is fixed.
    return None if partial is None else partial.sum(0).to(weight.dtype)


def _tile(group_size: int) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a tile: 2048 elements for 4 warps, 16 per thread, and at most 32 rows.

    Wider groups take one row and more warps, at most 32, to keep 16 elements per thread.
    """
    block = triton.next_power_of_2(group_size)
    rows = min(max(2048 // block, 1), _SUMMED_ROWS)
    return rows, block, min(max(rows * block // 512, 1), 32)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, weight_ptr, z_ptr, residual_ptr, y_ptr, total_ptr, r_ptr,
    rows, group_size, eps,
    x_row, x_column, weight_column, z_row, z_column, residual_row, residual_column,
    NORM_FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)
    column = group * group_size + s
    inside_s = s < group_size
    inside = (row < rows)[:, None] & inside_s[None, :]
    u = tl.load(x_ptr + row[:, None] * x_row + column[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
    offset = row[:, None] * groups * group_size + column[None, :]
    if residual_ptr is not None:
        residual_offset = row[:, None] * residual_row + column[None, :] * residual_column
        u += tl.load(residual_ptr + residual_offset, mask=inside, other=0.0).to(tl.float32)
        total = u.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, total, mask=inside)
        u = total.to(tl.float32)
    gate = tl.zeros((BLOCK_R, BLOCK_S), dtype=tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + row[:, None] * z_row + column[None, :] * z_column, mask=inside, other=0.0).to(tl.float32)
        gate = z * sigmoid(z)
        if not NORM_FIRST:
            u *= gate
    r = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / group_size + eps)  # (BLOCK_R)
    r = tl.where(r > 0.0, r, float("nan"))  # 0 if the mean square overflowed
    w = tl.load(weight_ptr + column * weight_column, mask=inside_s, other=0.0).to(tl.float32)
    n = u * r[:, None]
    # Rounded to the dtype of the normalised tensor; y may be narrower.
    n = n.to(y_ptr.dtype.element_ty) if residual_ptr is None else n.to(total_ptr.dtype.element_ty)
    y = (n.to(tl.float32) * w[None, :]).to(y_ptr.dtype.element_ty)
    if z_ptr is not None and NORM_FIRST:
        y = (y.to(tl.float32) * gate).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, y, mask=inside)
    tl.store(r_ptr + row * groups + group, r, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    x_ptr, weight_ptr, z_ptr, r_ptr, dy_ptr, dtotal_ptr, dx_ptr, dz_ptr, dresidual_ptr, partial_ptr,
    rows, group_size,
    x_row, x_column, weight_column, z_row, z_column, dy_row, dy_column, dtotal_row, dtotal_column,
    NORM_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    group = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1)
    width = groups * group_size
    s = tl.arange(0, BLOCK_S)
    column = group * group_size + s
    inside_s = s < group_size
    w = tl.load(weight_ptr + column * weight_column, mask=inside_s, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)  # dweight of the program's rows
    for start in range(0, ROWS, BLOCK_R):
        row = first + start + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & inside_s[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + column[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
        dy_offset = row[:, None] * dy_row + column[None, :] * dy_column
        dy = tl.load(dy_ptr + dy_offset, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row * groups + group, mask=row < rows, other=0.0)[:, None]
        offset = row[:, None] * width + column[None, :]
        if z_ptr is None:
            n = x * r
            dw = dy * n
            dn = dy * w[None, :]
            dx = r * (dn - n * (tl.sum(dn * n, axis=1) / group_size)[:, None])
        else:
            z_offset = row[:, None] * z_row + column[None, :] * z_column
            z = tl.load(z_ptr + z_offset, mask=inside, other=0.0).to(tl.float32)
            smooth = sigmoid(z)
            gate = z * smooth
            slope = smooth * (1.0 + z * (1.0 - smooth))  # derivative of silu
            if NORM_FIRST:
                n = x * r
                dw = dy * gate * n
                dn = dy * gate * w[None, :]
                dz = dy * n * w[None, :] * slope
                dx = r * (dn - n * (tl.sum(dn * n, axis=1) / group_size)[:, None])
            else:
                n = x * gate * r
                dw = dy * n
                dn = dy * w[None, :]
                du = r * (dn - n * (tl.sum(dn * n, axis=1) / group_size)[:, None])
                dz = du * x * slope
                dx = du * gate
            if dz_ptr is not None:
                tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        if dtotal_ptr is not None:
            dtotal_offset = row[:, None] * dtotal_row + column[None, :] * dtotal_column
            dx += tl.load(dtotal_ptr + dtotal_offset, mask=inside, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offset, dx.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            total += tl.sum(dw, axis=0)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + column, total, mask=inside_s)
