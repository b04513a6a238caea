"""Masked and Toeplitz mixing as dense products of torch: what the benchmarks of them compare with.

Symbols: B batch, L length, H heads, P head width. Weights are (H, L, L) or, by distance, (H, L); the bias is (H, L).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def unmasked(weight: Tensor) -> Tensor:
    """Return the weights unmasked: a lower bound, whose gradient also fills the upper triangle."""
    return weight


def toeplitz_matrix(weight: Tensor) -> Tensor:
    """Return the (H, L, L) matrix of weights by distance: windows of the reversed weights and zeros, last row first."""
    L = weight.shape[-1]
    return F.pad(weight.flip(-1), (0, L - 1)).unfold(-1, L, 1).flip(-2)


def as_columns(x: Tensor) -> Tensor:
    """Return (B, L, H, P) inputs as (H, L, B P), with a column per feature of a row."""
    return x.permute(2, 1, 0, 3).flatten(2)


def as_rows(x: Tensor, batch: int) -> Tensor:
    """Return (H, L, B P) values as (B, L, H, P), a view."""
    return x.unflatten(2, (batch, -1)).permute(2, 1, 0, 3)


def columns_product(matrix_of: Callable[[Tensor], Tensor]) -> Mix:
    """Multiply inputs in columns by the matrix of `matrix_of`, one product per head."""
    return lambda x, weight, bias: torch.baddbmm(bias[..., None], matrix_of(weight), x)


def rows_product(matrix_of: Callable[[Tensor], Tensor]) -> Mix:
    """Multiply (B, L, 1, P) inputs without a change of layout."""
    return lambda x, weight, bias: (matrix_of(weight)[0] @ x[:, :, 0] + bias[0, :, None])[:, :, None]


def transformed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run Toeplitz mixing by Fourier transforms in float32, differentiated by autograd."""
    L = weight.shape[-1]
    spectrum = torch.fft.rfft(x.float(), 2 * L, dim=1) * torch.fft.rfft(weight.float(), 2 * L).T[..., None]
    y = torch.fft.irfft(spectrum, 2 * L, dim=1)[:, :L]
    return (y + bias.T[..., None]).to(x.dtype)
