"""The torch path of `toeplitz_mix` for long rows: a convolution by Fourier transforms.

Symbols: B batch, L length, H heads, P head width, N distances that there are weights for; n points of a transform,
n >= 2 L - 1, so that nothing wraps around to where it is looked at.

Rounding errors of a transform are those of its largest term: an output may feel, in its last bits, tokens that come
after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import accumulator

# Features that are transformed at once, whose spectra stay in the cache. As measured in `toeplitz_mix`, at L = 1024: 47
# milliseconds forward + backward, with 256 features 53, with all 1024 of them 96.
_FEATURES = 64


def mix_fourier(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mixture of every token, differentiable.

    Args:
        x: (B, L, H, P) inputs.
        weight: (H, N) by distance, N >= L.
        bias: (H, N), None for none.

    Returns:
        (B, L, H, P) in float32, or float64 for float64 inputs.
    """
    y = _Fourier.apply(x, weight)
    assert isinstance(y, Tensor)  # `apply` is untyped
    return y if bias is None else y + bias[:, : x.shape[1]].T[..., None].to(y.dtype)


class _Fourier(torch.autograd.Function):
    """y = F^-1(F(w) F(x)), features and rows by themselves. Keeps its inputs only.

    Backward: dx = F^-1(F(w)* F(dy)),  dw = F^-1(sum of F(x)* F(dy) over features and rows).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        points, spectrum = _spectrum(weight, x)
        y = torch.empty(x.shape, dtype=accumulator(x), device=x.device)
        for b, h, part in _parts(x):
            product = _transform(x[b, :, h, part], points).mul_(spectrum[:, h, None])
            y[b, :, h, part] = _back(product, x.shape[1], points)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dy = gradients[0]
        L = x.shape[1]
        points, spectrum = _spectrum(weight, x)
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if needs_x else None
        sums = torch.zeros_like(spectrum)
        for b, h, part in _parts(x):
            cotangent = _transform(dy[b, :, h, part], points)
            if needs_weight:
                sums[:, h] += _transform(x[b, :, h, part], points).conj().mul(cotangent).sum(1)
            if dx is not None:
                dx[b, :, h, part] = _back(cotangent.mul_(spectrum[:, h, None].conj()), L, points)
        dweight = None
        if needs_weight:
            dweight = torch.zeros_like(weight)
            dweight[:, :L] = _back(sums, L, points).T
        return None if dx is None else dx.to(x.dtype), dweight


def _parts(x: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Row, head and features of what is transformed at once."""
    B, _, H, P = x.shape
    for b in range(B):
        for h in range(H):
            for first in range(0, P, _FEATURES):
                yield b, h, slice(first, first + _FEATURES)


def _spectrum(weight: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """n, the least of those with 4, 5, 6 or 7 times a power of two points, and (n / 2 + 1, H) of the weights."""
    L = x.shape[1]
    step = 1 << max((2 * L - 1).bit_length() - 3, 1)
    points = -(-(2 * L - 1) // step) * step
    return points, _transform(weight[:, :L].T.to(accumulator(x)), points)


def _transform(x: Tensor, points: int) -> Tensor:
    """(n / 2 + 1, C) of (L, C); never in half precision."""
    return torch.fft.rfft(x.to(accumulator(x)), points, dim=0)


def _back(spectrum: Tensor, length: int, points: int) -> Tensor:
    return torch.fft.irfft(spectrum, points, dim=0)[:length]
