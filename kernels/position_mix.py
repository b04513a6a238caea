"""Mixing of positions: every token becomes a weighted sum of the tokens up to it, with input-independent weights.

Symbols: B batch, L length, H heads, P head width, N positions (or distances) with weights, K places of a history. A row
of weights holds the weights of one position for each position up to it.

    masked mixing     y_i = sum_{j <= i} W_ij x_j + b_i,     per head; W is (H, N, N)
    Toeplitz mixing   y_i = sum_{j <= i} w_{i-j} x_j + b_i,  per head; w is (H, N)

Positions are absolute, so that a document has at most N tokens. Only the lower triangle of W is used and has a
gradient. Toeplitz mixing is a causal convolution as long as the row. In both cases the bias belongs to a position.

Sources: the masked mixer (arXiv 2409.01482; code blbadger/maskedmixers@8f9515d), whose convolution of kernel size 1
over the features is this product; Toeplitz MLP mixers (arXiv 2605.06683).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    accumulator,
    check_devices,
    check_integers,
    check_optional,
    check_seq_idx,
    check_tensor,
    choose_implementation,
    recorded,
    without_autocast,
)
from .position_mix_torch import DenseWeights, DocumentLines, ToeplitzWeights, mix_fourier, mix_panels
from .position_mix_triton import mix_step_triton, mix_triton
from .recurrence import documents
from .tracing import host_reads, tracing

# Fewest tokens for which the torch path uses Fourier transforms. Measured on 1 CPU core, fp32, torch 2.13, B = H = 1,
# P = 1024, milliseconds of processor time, forward / forward + backward, fastest of 3:
#     L                 768          1024         1536         2048         4096
#     panels            16 / 48      26 / 74      48 / 138     80 / 253     300 / 930
#     transforms        17 / 38      18 / 47      32 / 83      49 / 129     82 / 250
# Short rows use panels, whose outputs do not depend on later tokens at all.
_TRANSFORM_FROM = 1024


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
        weight: (H, N, N) weights of each position (row) for the positions up to it, N >= L. Values above the diagonal
            or beyond row L are ignored (even NaN), and their gradient is exactly zero.
        bias: (H, N) bias of each position.
        residual: (B, L, H, P) residual stream, to which the result is added; may have a wider dtype than `x`.
        seq_idx: (B, L) integer document of each token, non-decreasing over a row's real tokens and negative at
            padding. Documents are mixed separately, with positions counted from their first token, and padding is
            skipped. L may then exceed N, but the length of a document may not.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). While a graph is traced, Triton does not
            support `seq_idx`.

    Returns:
        (B, L, H, P) in the dtype of `residual`, or of `x` if there is none; at padding `residual`, or zero. Sums are
        float32 (float64 for a float64 `x`) and rounded once. Triton multiplies in the dtype of `x`: it rounds wider
        weights to it, and in the backward wider gradients.

    Raises:
        ValueError: if a shape, dtype, device, `implementation` or the number of positions is invalid, or `seq_idx`
            decreases along a row.
    """
    return _mix(_DENSE, "masked_mix", x, weight, bias, residual, seq_idx, implementation)


def masked_mix_step(
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    residual: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Run one token of :func:`masked_mix`: `y[b,h] = sum_{j<=p} weight[h,p,j] history[b,j,h] + bias[h,p] (+ residual)`.

    Shapes do not depend on values, and nothing waits for the device, so that a CUDA graph can capture the step.

    Args:
        history: (B, K, H, P) inputs of each row so far, by place. Places after a row's newest one are ignored (even
            NaN).
        weight: (H, N, N) weights as in :func:`masked_mix`.
        bias: (H, N) bias or None.
        positions: (B) integer place p of each row's newest token, below K and N, whose input is `history[b, p]`;
            negative for rows without tokens.
        residual: (B, H, P) residual stream, to which the result is added.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support calls that autograd
            records.

    Returns:
        (B, H, P) in the dtype of `residual`, or of `history` if there is none; zero, or the residual, for a row
        without tokens. Positions on a device are not checked, and give NaN if they are too large.

    Raises:
        ValueError: if a shape, dtype, device or `implementation` is invalid, or a position on the CPU is too large.
    """
    return _step(_DENSE, "masked_mix_step", history, weight, bias, positions, residual, implementation)


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
        weight: (H, N) weights by distance, N >= L; the gradient for distances from L on is exactly zero.
        bias: (H, N) bias of each position.
        residual: (B, L, H, P) residual stream, to which the result is added; may have a wider dtype than `x`.
        seq_idx: (B, L) integer document of each token, as in :func:`masked_mix`.
        implementation: "auto", "triton" or "torch", as in :func:`masked_mix`.

    Returns:
        (B, L, H, P) as in :func:`masked_mix`.

    Raises:
        ValueError: as in :func:`masked_mix`.
    """
    return _mix(_TOEPLITZ, "toeplitz_mix", x, weight, bias, residual, seq_idx, implementation)


def toeplitz_mix_step(
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    residual: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Run one token of :func:`toeplitz_mix`.

    Other arguments, result and errors are those of :func:`masked_mix_step`.

    Args:
        weight: (H, N) weights by distance.
    """
    return _step(_TOEPLITZ, "toeplitz_mix_step", history, weight, bias, positions, residual, implementation)


class _Kind(NamedTuple):
    """Layout of the weights of a mixture, and the functions that read them."""

    shape: str
    """Shape of the weights in symbols."""
    row: Callable[[Tensor, int], Tensor]
    """Return the (H, i + 1) weights of position i."""
    step: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Return (B, H, K) weights for (B, 1) positions and (K) places; those of later places are unused."""
    matrix: Callable[[Tensor, Tensor, bool], Tensor]
    """Return (H, B or 1, L target, L source) weights for the (B or 1, L) positions of tokens, given whether rows are
    packed; those of later sources are unused."""
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """Run the torch path on (B, L, H, P) inputs, weights and bias; returns the dtype of the sums."""


def _dense_step(weight: Tensor, position: Tensor, place: Tensor) -> Tensor:
    heads = torch.arange(weight.shape[0], device=weight.device)[:, None]
    return weight[heads, position[..., None], place]


def _dense_matrix(weight: Tensor, places: Tensor, packed: bool) -> Tensor:
    if packed:
        return weight[:, places[:, :, None], places[:, None, :]]
    return weight[:, None, : places.shape[1], : places.shape[1]]


def _toeplitz_step(weight: Tensor, position: Tensor, place: Tensor) -> Tensor:
    return weight.T[(position - place).clamp(min=0)].transpose(1, 2)


def _toeplitz_matrix(weight: Tensor, places: Tensor, packed: bool) -> Tensor:
    return weight[:, (places[:, :, None] - places[:, None, :]).clamp(min=0)]


def _toeplitz_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[1] < _TRANSFORM_FROM:
        return mix_panels(x, weight, bias, ToeplitzWeights)
    return mix_fourier(x, weight, bias)


_DENSE = _Kind(
    "(H, N, N)",
    lambda weight, i: weight[:, i, : i + 1],
    _dense_step,
    _dense_matrix,
    lambda x, weight, bias: mix_panels(x, weight, bias, DenseWeights),
)
_TOEPLITZ = _Kind(
    "(H, N)", lambda weight, i: weight[:, : i + 1].flip(1), _toeplitz_step, _toeplitz_matrix, _toeplitz_product
)


def _mix(kind: _Kind, name: str, *arguments: Any) -> Tensor:
    """Run the op called `name`."""
    x, weight, bias, residual, seq_idx, implementation = arguments
    _check_mix(x, weight, kind.shape, bias, residual, seq_idx)
    served = seq_idx is None or not tracing()  # documents are laid out by their lengths, which a graph cannot read
    implementation = choose_implementation(implementation, name, x, served, traceable=True)
    if tracing() and implementation == "torch":
        return _traced(kind, x, weight, bias, residual, seq_idx)

    def mix(x: Tensor, residual: Tensor | None) -> Tensor:
        if implementation == "triton":
            return mix_triton(x, weight, bias, residual)
        return _add_residual(kind.product(x, weight, bias), x.dtype, residual)

    return _by_document(mix, x, residual, seq_idx, weight.shape[-1])


def _check_mix(
    x: Tensor, weight: Tensor, shape: str, bias: Tensor | None, residual: Tensor | None, seq_idx: Tensor | None
) -> None:
    """Raise ValueError unless the arguments are valid; `shape` is the shape of `weight` in symbols."""
    check_tensor("x", x, (None,) * 4, "(B, L, H, P)")
    B, L, H, P = x.shape
    if not (L and H and P):
        raise ValueError(f"x must hold at least one token, one head and one feature, got shape {tuple(x.shape)}")
    N = _check_weights(weight, shape, bias, H)
    check_optional("residual", residual, (B, L, H, P), "(B, L, H, P)")
    check_devices(x=x, weight=weight, bias=bias, residual=residual, seq_idx=seq_idx)
    check_seq_idx(seq_idx, B, L)
    if seq_idx is None and L > N:
        raise ValueError(f"weight must be {shape} with N >= L = {L} positions, got shape {tuple(weight.shape)}")


def _check_step(
    history: Tensor, weight: Tensor, shape: str, bias: Tensor | None, positions: Tensor, residual: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of a step are valid; positions on a device are not checked."""
    check_tensor("history", history, (None,) * 4, "(B, K, H, P)")
    B, K, H, P = history.shape
    if not (K and H and P):
        raise ValueError(
            f"history must hold at least one place, one head and one feature, got shape {tuple(history.shape)}"
        )
    N = _check_weights(weight, shape, bias, H)
    check_integers("positions", positions, (B,), "(B)")
    check_optional("residual", residual, (B, H, P), "(B, H, P)")
    check_devices(history=history, weight=weight, bias=bias, positions=positions, residual=residual)
    if host_reads(positions) and B and int(positions.max()) >= min(K, N):
        raise ValueError(
            f"positions must be below the sizes of history, K = {K}, and weight, N = {N}, got {positions.tolist()}"
        )


def _check_weights(weight: Tensor, shape: str, bias: Tensor | None, heads: int) -> int:
    """Check weights and bias, and return N."""
    rank = shape.count(",") + 1
    N = weight.shape[-1] if weight.dim() == rank else None
    check_tensor("weight", weight, (heads, *[N] * (rank - 1)), shape)
    assert N is not None
    check_optional("bias", bias, (heads, N), "(H, N)")
    return N


def _by_document(
    mix: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    residual: Tensor | None,
    seq_idx: Tensor | None,
    positions: int,
) -> Tensor:
    """Apply `mix(x, residual)` to each document; raises ValueError if one is longer than `positions`."""
    if seq_idx is None:
        return mix(x, residual)
    lines = _lines(seq_idx, positions)
    if lines.whole:
        return mix(x, residual)
    if not lines.sizes:  # only padding
        return x.masked_fill(~lines.real[..., None, None], 0) if residual is None else residual.clone()
    tables = lines.lay_out(x)
    if residual is None:
        return lines.gather_back([mix(table, None) for table in tables])
    streams = lines.lay_out(residual)
    y = lines.gather_back([mix(table, stream) for table, stream in zip(tables, streams, strict=True)])
    return y.where(lines.real[..., None, None], residual)


def _traced(
    kind: _Kind, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """Mix in a traced graph by a product with one (L, L) matrix per head, or per head and row if packed."""
    length, sums = x.shape[1], accumulator(x)
    column = torch.arange(length, device=x.device)
    seen = (column <= column[:, None])[None]
    if seq_idx is None:
        places = column[None]
    else:
        real, first = documents(seq_idx)
        rank = real.cumsum(1) - 1
        start = rank.masked_fill(~first, 0).cummax(1).values
        places = (rank - start).masked_fill(~real, 0)
        seen = seen & real[:, None] & (seq_idx[:, :, None] == seq_idx[:, None, :])
    matrix = kind.matrix(weight, places, seq_idx is not None).to(sums).masked_fill(~seen, 0)
    u = x.to(sums)
    if seq_idx is not None:
        u = u.masked_fill(~real[..., None, None], 0)
    with without_autocast(x):
        y = (matrix.transpose(0, 1) @ u.transpose(1, 2)).transpose(1, 2)
    if bias is not None:
        y = y + bias.to(sums).T[places][..., None]
    if seq_idx is not None:
        y = y.masked_fill(~real[..., None, None], 0)
    return _add_residual(y, x.dtype, residual)


def _lines(seq_idx: Tensor, positions: int) -> DocumentLines:
    lines = DocumentLines(seq_idx)
    if lines.longest > positions:
        raise ValueError(
            f"seq_idx must hold no document of more than N = {positions} tokens, got one of {lines.longest}"
        )
    return lines


def _reference(
    kind: _Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Mix token by token, as in the definition."""
    _check_mix(x, weight, kind.shape, bias, residual, seq_idx)
    if seq_idx is not None:
        _lines(seq_idx, weight.shape[-1])
    sums = accumulator(x)
    B, L = x.shape[:2]
    u, weight = x.to(sums), weight.to(sums)
    bias = None if bias is None else bias.to(sums)
    rows = []
    for b in range(B):
        document = torch.zeros(L, dtype=torch.long) if seq_idx is None else seq_idx[b].cpu()
        tokens = []
        for t in range(L):
            if document[t] < 0:
                tokens.append(torch.zeros_like(u[b, t]))
                continue
            seen = (document[: t + 1] == document[t]).nonzero().squeeze(1)
            i = len(seen) - 1
            y = torch.einsum("hj,jhp->hp", kind.row(weight, i), u[b, seen.to(x.device)])
            tokens.append(y if bias is None else y + bias[:, i, None])
        rows.append(torch.stack(tokens))
    return _add_residual(torch.stack(rows) if rows else u, x.dtype, residual)


masked_mix_reference = partial(_reference, _DENSE)
"""Compute :func:`masked_mix` by its definition, differentiated by autograd, with the same arguments."""
toeplitz_mix_reference = partial(_reference, _TOEPLITZ)
"""Compute :func:`toeplitz_mix` by its definition, differentiated by autograd, with the same arguments."""


def _step(kind: _Kind, name: str, *arguments: Any) -> Tensor:
    """Run the step called `name`."""
    history, weight, bias, positions, residual, implementation = arguments
    _check_step(history, weight, kind.shape, bias, positions, residual)
    served = not recorded(history, weight, bias, residual)  # the kernel has no backward
    if choose_implementation(implementation, name, history, served, traceable=True) == "triton":
        return mix_step_triton(history, weight, bias, positions, residual)
    limit = weight.shape[-1]
    sums, dtype = accumulator(history), history.dtype
    B, K, H, _ = history.shape
    positions = positions.long()
    longest = min(K, limit)
    if host_reads(positions):
        # The places filled so far, which are few for most of a generation.
        longest = max(int(positions.max()) + 1, 1) if B else 1
    history = history[:, :longest].to(sums)
    place = torch.arange(longest, device=history.device)
    here = positions[:, None]
    hidden = place > here
    if not host_reads(positions) or bool(hidden.any()):
        # Empty slots may hold NaN, which zero weights would not remove.
        history = history.masked_fill(hidden[..., None, None], 0)
    weights = kind.step(weight, here.clamp(0, longest - 1), place).to(sums).masked_fill(hidden[:, None], 0)
    # By head, because a single product would copy the history to change its strides.
    with without_autocast(history):
        y = torch.stack([torch.bmm(weights[:, h, None], history[:, :, h])[:, 0] for h in range(H)], dim=1)
    if bias is not None:
        y = y + bias.to(sums).T[positions.clamp(0, limit - 1), :, None]
    y = y.masked_fill((positions < 0)[:, None, None], 0)
    y = y.masked_fill((positions >= min(K, limit))[:, None, None], torch.nan)
    return _add_residual(y, dtype, residual)


def _add_residual(y: Tensor, dtype: torch.dtype, residual: Tensor | None) -> Tensor:
    """Return `residual + y` in the dtype of `residual`, or `y` in `dtype` if there is no residual."""
    return y.to(dtype) if residual is None else (residual + y).to(residual.dtype)
