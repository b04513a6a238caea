"""Softplus for the Triton kernels of the recurrences: their step sizes."""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def softplus(v):
    """log(1 + e^v) to full relative precision: what rounding 1 + e^v loses is divided out again."""
    power = tl.exp(tl.minimum(v, 20.0))
    above = 1.0 + power
    small = above == 1.0
    result = tl.where(small, power, tl.log(above) * (power / tl.where(small, 1.0, above - 1.0)))
    return tl.where(v > 20.0, v, result)
