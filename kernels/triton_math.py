"""Helpers that several Triton files share: strides of operands, and device functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._triton import tl, triton


def unit_stride(tensor: Any) -> Any:
    """Return the tensor, copied only if its last dimension has a stride other than 1; None for None."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def strides(dimensions: int, *tensors: Tensor | None) -> list[int]:
    """Return the strides of each tensor's leading dimensions in turn; zeros for missing dimensions and tensors."""
    found = []
    for tensor in tensors:
        given = () if tensor is None else tensor.stride()[:dimensions]
        found += [*given, *[0] * (dimensions - len(given))]
    return found


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(v * -1.4426950408889634))  # log2(e)


@triton.jit
def softplus(v):
    """Return log(1 + e^v) to full relative precision, for small results too.

    It is max(v, 0) + log(1 + t) with t = e^-|v|, and log(1 + t) = 2 artanh(s) with s = t / (2 + t) <= 1/3, whose series
    converges fast.
    """
    t = tl.exp(-tl.abs(v))
    s = t / (2.0 + t)
    square = s * s
    series = 2.0 / 15.0 * square + 2.0 / 13.0
    series = series * square + 2.0 / 11.0
    series = series * square + 2.0 / 9.0
    series = series * square + 2.0 / 7.0
    series = series * square + 2.0 / 5.0
    series = series * square + 2.0 / 3.0
    return tl.maximum(v, 0.0) + s * (series * square + 2.0)


@triton.jit
def load_gate(z_ptr, offsets, mask):
    """Load z and return sigmoid(z) and silu(z)."""
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    smooth = tl.sigmoid(z)
    return smooth, z * smooth


# Triton's interpreter stores bfloat16 as bit patterns: a dot product multiplies the patterns as integers, and a
# conversion from float32 truncates instead of rounding to nearest. EMULATE makes the next two functions behave like
# compiled code under the interpreter.
@triton.jit
def dot(a, b, acc, EMULATE: tl.constexpr):
    """Return acc + a b, accumulated in float32; float32 operands are not rounded to TF32."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def narrow(values, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Round float32 values to `dtype`: to nearest, ties to even."""
    if EMULATE and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)
