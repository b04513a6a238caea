"""Toeplitz mixing: masked mixing whose weights depend on the distance alone, a causal convolution as long as the row.

Symbols: B batch, L length, H heads, P head width, N distances that there are weights for; K places of a history.

    y_i = sum_{j <= i} w_{i-j} x_j + b_i,  per head

Source: Toeplitz MLP mixers (arXiv 2605.06683). The bias is of a position, as in :mod:`masked_mix`.
"""

from __future__ import annotations

from torch import Tensor

from .checks import choose_implementation, recorded
from .masked_mix_step_triton import mix_step_triton
from .masked_mix_triton import mix_triton
from .mix_panels import ToeplitzWeights, mix_panels
from .position_mixing import (
    add_residual,
    check_mix,
    check_mix_step,
    mix_by_document,
    mix_reference,
    mix_step,
    mix_traced,
)
from .toeplitz_fft import mix_fourier
from .tracing import tracing

_WEIGHTS = "(H, N)"
# Tokens from which on the torch path transforms. Measured on 1 CPU core, fp32, torch 2.13, B = H = 1, P = 1024,
# milliseconds of processor time, forward / forward + backward, fastest of 3:
#     L                 768          1024         1536         2048         4096
#     panels            16 / 48      26 / 74      48 / 138     80 / 253     300 / 930
#     transforms        17 / 38      18 / 47      32 / 83      49 / 129     82 / 250
# Short rows keep to panels, whose outputs do not feel a later token at all.
_TRANSFORM_FROM = 1024


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
    if tracing() and implementation == "torch":

        def entries(target: Tensor, source: Tensor) -> Tensor:
            return weight[:, (target[:, :, None] - source[:, None, :]).clamp(min=0)]

        return mix_traced(entries, x, bias, residual, seq_idx)

    def mix(x: Tensor, residual: Tensor | None) -> Tensor:
        if implementation == "triton":
            return mix_triton(x, weight, bias, residual)
        if x.shape[1] < _TRANSFORM_FROM:
            y = mix_panels(x, weight, bias, ToeplitzWeights)
        else:
            y = mix_fourier(x, weight, bias)
        return add_residual(y, x.dtype, residual)

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
    served = not recorded(history, weight, bias, residual)  # the kernel has no backward
    if choose_implementation(implementation, "toeplitz_mix_step", history, served) == "triton":
        return mix_step_triton(history, weight, bias, positions, residual)

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
    return mix_reference(lambda weight, i: weight[:, : i + 1].flip(1), x, weight, bias, residual, seq_idx)
