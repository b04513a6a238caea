"""Masked mixing: every token becomes a weighted sum of the tokens up to it, with weights that no input changes.

Symbols: B batch, L length, H heads, P head width, N positions that there are weights for; K places of a history.

    y_i = sum_{j <= i} W_ij x_j + b_i,  per head

Source: the masked mixer (arXiv 2409.01482), whose convolution with a kernel of one over the features is this product;
its code is blbadger/maskedmixers@8f9515d. Positions are absolute, so there are N of them and no more. Only the lower
triangle of W is used, and only it has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import choose_implementation, recorded
from .masked_mix_step_triton import mix_step_triton
from .masked_mix_triton import mix_triton
from .mix_panels import DenseWeights, mix_panels
from .position_mixing import (
    add_residual,
    check_mix,
    check_mix_step,
    mix_by_document,
    mix_reference,
    mix_step,
    mix_traced,
)
from .tracing import tracing

_WEIGHTS = "(H, N, N)"


def masked_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    seq_idx: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Mix each token with those before it: `y[b,i,h] = sum_{j<=i} weight[h,i,j] x[b,j,h] + bias[h,i] (+ residual)`.

    Args:
        x: (B, L, H, P) inputs.
        weight: (H, N, N) weights of a position (row) for the positions up to it, N >= L. What stands above the
            diagonal or beyond row L does not matter, whatever it is, and its gradient is exactly zero.
        bias: (H, N) added at each position.
        residual: (B, L, H, P) the stream that the result is added to; float32, say, while `x` is bfloat16.
        seq_idx: (B, L) integer document of each token, non-decreasing over a row's real tokens and negative at
            padding. A document is mixed alone, with positions counted from its first token, and padding is left out:
            packed documents give what separate ones do. L may then be more than N, a document's length may not.
        implementation: "auto" (Triton for CUDA tensors, torch otherwise and where Triton does not serve: float64),
            "triton" or "torch".

    Returns:
        (B, L, H, P) in the dtype of `residual`, or of `x` if there is none; at padding `residual`, or zero. Sums are
        float32 (float64 for a float64 `x`) and rounded once. Triton multiplies in the dtype of `x`, to which it rounds
        wider weights, and in the backward a wider gradient.

    Raises:
        ValueError: if a shape, dtype, device, `implementation` or the number of positions does not fit, or `seq_idx`
            decreases along a row.
    """
    check_mix(x, weight, _WEIGHTS, bias, residual, seq_idx)
    implementation = choose_implementation(implementation, "masked_mix", x)
    if tracing() and implementation == "torch":

        def entries(target: Tensor, source: Tensor) -> Tensor:
            if seq_idx is None:
                return weight[:, None, : x.shape[1], : x.shape[1]]
            return weight[:, target[:, :, None], source[:, None, :]]

        return mix_traced(entries, x, bias, residual, seq_idx)

    def mix(x: Tensor, residual: Tensor | None) -> Tensor:
        if implementation == "triton":
            return mix_triton(x, weight, bias, residual)
        return add_residual(mix_panels(x, weight, bias, DenseWeights), x.dtype, residual)

    return mix_by_document(mix, x, residual, seq_idx, weight.shape[-1])


def masked_mix_step(
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    residual: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """One token of :func:`masked_mix`, from the inputs so far: `y[b,h] = sum_{j<=p} weight[h,p,j] history[b,j,h]`.

    Shapes depend on no value and nothing waits for a device, so that a CUDA graph can hold the step.

    Args:
        history: (B, K, H, P) inputs of each row in the order of their places. What stands behind a row's newest one is
            not used, whatever it is.
        weight: (H, N, N) as in :func:`masked_mix`.
        bias: (H, N) or None.
        positions: (B) integer place p of each row's newest token, below K and N; its input is at `history[b, p]`.
            Negative: the row has no token yet.
        residual: (B, H, P) the stream that the result is added to.
        implementation: "auto" (Triton for CUDA tensors, torch otherwise and where Triton does not serve: float64, or a
            gradient to be recorded), "triton" or "torch".

    Returns:
        (B, H, P) in the dtype of `residual`, or of `history` if there is none; zero, or the residual, for a row
        without a token. On a device, where positions are not looked at, NaN for a position that is too large.

    Raises:
        ValueError: if a shape, dtype, device or `implementation` does not fit, or a position on the CPU is too large.
    """
    check_mix_step(history, weight, _WEIGHTS, bias, positions, residual)
    served = not recorded(history, weight, bias, residual)  # the kernel has no backward
    if choose_implementation(implementation, "masked_mix_step", history, served) == "triton":
        return mix_step_triton(history, weight, bias, positions, residual)
    heads = torch.arange(history.shape[2], device=history.device)[:, None]

    def row_of(position: Tensor, place: Tensor) -> Tensor:
        return weight[heads, position[..., None], place]

    return mix_step(row_of, history, bias, positions, residual, weight.shape[-1])


def masked_mix_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The definition of :func:`masked_mix`: token by token, differentiated by autograd. Arguments as there."""
    check_mix(x, weight, _WEIGHTS, bias, residual, seq_idx)
    return mix_reference(lambda weight, i: weight[:, i, : i + 1], x, weight, bias, residual, seq_idx)
