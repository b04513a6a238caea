"""Vectors of 8-bit integers with a scale each, the form in which a bounded memory can hold keys and values.

A vector x of P numbers becomes the integers round(x / s), from -127 to 127, with s = max |x| / 127 in bfloat16: P + 2
bytes in place of 4 P, with an error of at most s / 2 a number. Everything that attends to such a vector uses
its rounded form, also before it is stored, so a result does not depend on how a text was cut into calls.

Source: absolute-maximum quantisation, with a scale for each token and head as KV caches of inference engines use it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import accumulator

_MOST = 127


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise vectors along the last axis.

    Args:
        x: (..., P), any floating dtype. Rounded vectors (:func:`round_rows`) give the same integers and scales again.

    Returns:
        (..., P) int8 and (...) bfloat16 scales. The scale of a vector with a NaN is NaN, with an infinity infinite, so
        that :func:`dequantise_rows` does not hide them.
    """
    x = x.detach().to(accumulator(x))
    # Rounded to 8 bits the scale is off by at most 2^-9, so that the largest integer is still 127.
    scales = (torch.linalg.vector_norm(x, math.inf, dim=-1) / _MOST).bfloat16()
    # Where the scale is zero, infinite or NaN, so are the quotients, whose integers have no effect: they become 0.
    integers = (x / scales.to(x.dtype)[..., None]).round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(-_MOST, _MOST)
    return integers.to(torch.int8), scales


def dequantise_rows(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., P) int8 and (...) scales to (..., P) numbers, exact in float32 and in float64."""
    return integers.to(dtype) * scales.to(dtype)[..., None]


def round_rows(x: Tensor) -> Tensor:
    """Return (..., P) vectors as :func:`quantise_rows` keeps them, in float32 (float64 for float64 inputs).

    The gradient passes through as if nothing had been rounded.
    """
    dtype = accumulator(x)
    rounded = dequantise_rows(*quantise_rows(x), dtype)
    if not x.requires_grad:
        return rounded
    wide = x.to(dtype)
    return rounded + (wide - wide.detach())  # exact: the difference is zero
