"""Toeplitz mixing: masked mixing whose weights depend on the distance alone, a causal convolution as long as the row.

Symbols: B batch, L length, H heads, P head width, N distances that there are weights for; K places of a history.

    y_i = sum_{j <= i} w_{i-j} x_j + b_i,  per head

Source: Toeplitz MLP mixers (arXiv 2605.06683). The bias is of a position, as in :mod:`masked_mix`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import choose_implementation
from .masked_mix_triton import mix_triton
from .mix_panels import ToeplitzWeights, mix_panels
from .position_mixing import add_residual, check_mix, check_mix_step, mix_by_document, mix_reference, mix_step

_WEIGHTS = "(H, N)"


def toeplitz_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    seq_idx: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Mix each token with those before it: `y[b,i,h] = sum_{j<=i} weight[h,i-j] x[b,j,h] + bias[h,i] (+ residual)`.

    Args:
        x: (B, L, H, P) inputs.
        weight: (H, N) weights by distance, N >= L; the gradient of those from L on is exactly zero.
        bias: (H, N) added at each position.
        residual: (B, L, H, P) the stream that the result is added to; float32, say, while `x` is bfloat16.
        seq_idx: (B, L) integer document of each token, as in :func:`masked_mix`.
        implementation: "auto" (Triton for CUDA tensors, torch otherwise and where Triton does not serve: float64),
            "triton" or "torch".

    Returns:
        (B, L, H, P) as :func:`masked_mix`.

    Raises:
        ValueError: as :func:`masked_mix`.
    """
    check_mix(x, weight, _WEIGHTS, bias, residual, seq_idx)
    implementation = choose_implementation(implementation, "toeplitz_mix", x)

    def mix(x: Tensor, residual: Tensor | None) -> Tensor:
        if implementation == "triton":
            return mix_triton(x, weight, bias, residual)
        return add_residual(mix_panels(x, weight, bias, ToeplitzWeights), x.dtype, residual)

    return mix_by_document(mix, x, residual, seq_idx, weight.shape[-1])


def toeplitz_mix_step(
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    residual: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """One token of :func:`toeplitz_mix`, from the inputs so far.

    Args:
        weight: (H, N) weights by distance. The others are those of :func:`masked_mix_step`, and so are the result and
            the errors.
    """
    check_mix_step(history, weight, _WEIGHTS, bias, positions, residual)
    choose_implementation(implementation, "toeplitz_mix_step", history, supports_triton=False)

    def row_of(position: Tensor, place: Tensor) -> Tensor:
        return weight.T[(position - place).clamp(min=0)].transpose(1, 2)

    return mix_step(row_of, history, bias, positions, residual, weight.shape[-1])


def toeplitz_mix_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The definition of :func:`toeplitz_mix`: token by token, differentiated by autograd. Arguments as there."""
    check_mix(x, weight, _WEIGHTS, bias, residual, seq_idx)
    return mix_reference(lambda i: weight[:, : i + 1].flip(1), x, bias, residual, seq_idx)
