"""State-space duality (SSD): the token mixer of Mamba-2, and every linear recurrence with one decay per head.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, Q chunk length; x inputs, dt step sizes,
A decay rates (negative), B and C input and output maps, h state (B, H, P, N), D skip, z gate.

The recurrence is, for every batch row and head (head h reads B and C of group h // (H / G)),

    h_t = exp(a_t) h_{t-1} + u_t (x) B_t,        y_t = h_t C_t + D x_t,

with a_t = dt_t A and u_t = dt_t x_t in Mamba-2 (:func:`ssd`), and a_t given directly with u_t = x_t in discrete
Mamba-2, retention and gated linear attention (:func:`ssd_log_decay`).

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 (block decomposition of the semiseparable
matrix) and listing 1.

`seq_idx`: (B, L) integer document index of each token of a packed row, non-decreasing over the real tokens. A negative
value marks padding, which is skipped as if it were absent. The initial state belongs to the document of the row's first
real token; the final state is the one after the row's last real token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import (
    accumulator,
    check_devices,
    check_groups,
    check_seq_idx,
    check_tensor,
    choose_implementation,
    of_no_rows,
)
from .recurrence import blank_padding, documents, skip_and_gate, step_sizes
from .ssd_chunked import decay_matrix, ssd_scan_torch
from .ssd_triton import ssd_scan_triton


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t`, `y_t = h_t C_t + D x_t`.

    Args:
        x: (B, L, H, P) inputs, L >= 1.
        dt: (B, L, H) step sizes; positive, or any real with `dt_softplus`.
        A: (H) decay rates, negative (`-exp(A_log)`).
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        D: (H) or (H, P) skip, added as `D x`.
        z: (B, L, H, P) gate: the output, skip included, is multiplied by `silu(z)`.
        dt_bias: (H) added to `dt` first.
        dt_softplus: apply softplus to `dt + dt_bias`.
        dt_limit: range that the step sizes are clamped to, after softplus.
        initial_state: (B, H, P, N) state before the first token; zero if not given. Gradients flow to it.
        seq_idx: (B, L) document index of each token, negative for padding (module docstring).
        return_final_state: also return the state after the last real token.
        chunk_size: tokens of a chunk; changes rounding and speed only.
        implementation: "auto" (Triton on CUDA tensors), "triton" or "torch".

    Returns:
        (B, L, H, P) outputs in the dtype of `x`; with `return_final_state` also the (B, H, P, N) final state in
        float32 (float64 for float64 inputs). Sums are accumulated in that precision.

    Raises:
        ValueError: if a shape, dtype, device, group count, `seq_idx` or `implementation` does not fit.
    """
    check_inputs(x, "dt", dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    implementation = choose_implementation(implementation, "ssd", x, traceable=True)
    x, dt, B, C, z = blank_padding(seq_idx, x, dt, B, C, z)
    dt = step_sizes(dt.to(accumulator(x)), dt_bias, dt_softplus, dt_limit)
    y, state = _scan(x, dt, dt * A.to(dt.dtype), B, C, D, z, initial_state, seq_idx, chunk_size, implementation)
    return (y, state) if return_final_state else y


def ssd_log_decay(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """SSD with the decay given directly: `h_t = exp(log_decay_t) h_{t-1} + x_t (x) B_t`, `y_t = h_t C_t + D x_t`.

    So are discrete Mamba-2 (MOHAWK, arXiv 2408.10189), retention (one constant per head) and linear attention (zero).

    Args:
        x: (B, L, H, P) inputs, L >= 1.
        log_decay: (B, L, H) logarithm of the decay, in [-inf, 0]; -inf forgets everything before the token.
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        D: (H) or (H, P) skip, added as `D x`.
        z: (B, L, H, P) gate: the output, skip included, is multiplied by `silu(z)`.
        initial_state: (B, H, P, N) state before the first token; zero if not given. Gradients flow to it.
        seq_idx: (B, L) document index of each token, negative for padding (module docstring).
        return_final_state: also return the state after the last real token.
        chunk_size: tokens of a chunk; changes rounding and speed only.
        implementation: "auto" (Triton on CUDA tensors), "triton" or "torch".

    Returns:
        As :func:`ssd`.

    Raises:
        ValueError: if a shape, dtype, device, group count, `seq_idx` or `implementation` does not fit.
    """
    check_inputs(x, "log_decay", log_decay, None, B, C, D, z, None, initial_state, seq_idx)
    implementation = choose_implementation(implementation, "ssd_log_decay", x, traceable=True)
    x, log_decay, B, C, z = blank_padding(seq_idx, x, log_decay, B, C, z)
    log_decay = log_decay.to(accumulator(x))
    y, state = _scan(x, None, log_decay, B, C, D, z, initial_state, seq_idx, chunk_size, implementation)
    return (y, state) if return_final_state else y


def ssd_matrix(log_decay: Tensor, B: Tensor, C: Tensor, *, seq_idx: Tensor | None = None) -> Tensor:
    """The mixing matrix of :func:`ssd_log_decay`: the hidden attention of a state-space layer.

    `M[i, j] = (C_i . B_j) exp(sum_{k=j+1..i} log_decay_k)` for j <= i of the same document, else 0, so that
    `y_i = sum_j M[i, j] x_j`. For :func:`ssd`, `log_decay = dt A` and `x` is `dt x`. Quadratic in L: for inspection and
    for matrix orientation (MOHAWK stage 1), not for inference.

    Args:
        log_decay: (B, L, H) logarithm of the decay.
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        seq_idx: (B, L) document index of each token, negative for padding.

    Returns:
        (B, H, L, L) matrix in float32 (float64 for float64 inputs).

    Raises:
        ValueError: if a shape, dtype, device, group count or `seq_idx` does not fit.
    """
    check_tensor("log_decay", log_decay, (None, None, None), "(B, L, H)")
    batch, length, heads = log_decay.shape
    _check_maps([batch, length], heads, B, C, "B, L")
    check_devices(log_decay=log_decay, B=B, C=C, seq_idx=seq_idx)
    sums = accumulator(log_decay)
    log_decay = log_decay.to(sums)
    real = None
    if seq_idx is not None:
        check_seq_idx(seq_idx, batch, length)
        log_decay, real = _with_documents(log_decay, seq_idx)
    decay = decay_matrix(log_decay.transpose(1, 2)).transpose(-1, -2)  # (B, H, L, L), target by source
    scores = torch.einsum("blgn,bsgn->bgls", C.to(sums), B.to(sums))
    matrix = scores.repeat_interleave(heads // B.shape[2], dim=1) * decay
    if real is not None:
        matrix = matrix * (real[:, None, :, None] & real[:, None, None, :])
    return matrix


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`ssd`: a loop over time in float32 (float64 kept). Arguments as there."""
    check_inputs(x, "dt", dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    x, dt, B, C, z = blank_padding(seq_idx, x, dt, B, C, z)
    dt = step_sizes(dt.to(accumulator(x)), dt_bias, dt_softplus, dt_limit)
    u = x.to(dt.dtype) * dt[..., None]
    y, state = _loop(u, dt * A.to(dt.dtype), B, C, initial_state, seq_idx)
    y = skip_and_gate(y, x, D, z)
    return (y, state) if return_final_state else y


def ssd_log_decay_reference(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`ssd_log_decay`: a loop over time in float32 (float64 kept). Arguments as there."""
    check_inputs(x, "log_decay", log_decay, None, B, C, D, z, None, initial_state, seq_idx)
    x, log_decay, B, C, z = blank_padding(seq_idx, x, log_decay, B, C, z)
    sums = accumulator(x)
    y, state = _loop(x.to(sums), log_decay.to(sums), B, C, initial_state, seq_idx)
    y = skip_and_gate(y, x, D, z)
    return (y, state) if return_final_state else y


def _loop(
    u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time. Returns (B, L, H, P) outputs and the (B, H, P, N) final state."""
    batch, length, heads, width = u.shape
    repeats = heads // B.shape[2]
    B = B.to(u.dtype).repeat_interleave(repeats, dim=2)  # (B, L, H, N)
    C = C.to(u.dtype).repeat_interleave(repeats, dim=2)
    state = u.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state.to(u.dtype)
    if seq_idx is not None:
        document = seq_idx.new_full((batch,), -1)  # of the last real token so far
    outputs = []
    for t in range(length):
        decayed = log_decay[:, t, :, None, None].exp() * state
        if seq_idx is None:
            state = decayed + u[:, t, :, :, None] * B[:, t, :, None, :]
        else:
            real = seq_idx[:, t] >= 0
            new_document = real & (document >= 0) & (seq_idx[:, t] != document)
            kept = torch.where(new_document[:, None, None, None], torch.zeros_like(state), decayed)
            stepped = kept + u[:, t, :, :, None] * B[:, t, :, None, :]
            state = torch.where(real[:, None, None, None], stepped, state)
            document = torch.where(real, seq_idx[:, t], document)
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def _scan(
    x: Tensor,
    dt: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state by the implementation asked for."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if x.shape[0] == 0:
        inputs = (x, dt, log_decay, B, C, D, z, initial_state)
        state = (0, *x.shape[2:], B.shape[-1])
        return of_no_rows(tuple(x.shape), x.dtype, *inputs), of_no_rows(state, log_decay.dtype, *inputs)
    if seq_idx is not None:
        log_decay, _ = _with_documents(log_decay, seq_idx)
    scan = ssd_scan_triton if implementation == "triton" else ssd_scan_torch
    return scan(x, dt, log_decay, B, C, D, z, initial_state, chunk_size)


def _with_documents(log_decay: Tensor, seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Turn documents and padding into decays: -inf at a document's first token, 0 at padding.

    Returns:
        (B, L, H) decays and the (B, L) mask of the real tokens.
    """
    real, first = documents(seq_idx)
    return log_decay.masked_fill(~real[:, :, None], 0).masked_fill(first[:, :, None], -math.inf), real


def _check_maps(rows: list[int], heads: int, B: Tensor, C: Tensor, lead: str) -> None:
    check_tensor("B", B, (*rows, None, None), f"({lead}, G, N)")
    check_groups("B", B.shape[-2], heads)
    check_tensor("C", C, tuple(B.shape), f"({lead}, G, N)")


def check_inputs(
    x: Tensor,
    decay_name: str,
    decay: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    one_token: bool = False,
) -> None:
    """Check the arguments of a scan, or of one token: without L, and `state` has its name."""
    lead, state_name = ("B", "state") if one_token else ("B, L", "initial_state")
    check_tensor("x", x, (None,) * (4 - one_token), f"({lead}, H, P)")
    *rows, heads, width = x.shape
    if not one_token and rows[1] == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    check_tensor(decay_name, decay, (*rows, heads), f"({lead}, H)")
    _check_maps(rows, heads, B, C, lead)
    for name, vector in (("A", A), ("dt_bias", dt_bias)):
        if vector is not None:
            check_tensor(name, vector, (heads,), "(H)")
    if D is not None:
        check_tensor("D", D, (heads,) if D.dim() == 1 else (heads, width), "(H) or (H, P)")
    if z is not None:
        check_tensor("z", z, tuple(x.shape), f"({lead}, H, P)")
    if state is not None:
        check_tensor(state_name, state, (rows[0], heads, width, B.shape[-1]), "(B, H, P, N)")
    named = {"x": x, decay_name: decay, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, state_name: state}
    check_devices(**named, seq_idx=seq_idx)
    if seq_idx is not None:
        check_seq_idx(seq_idx, rows[0], rows[1])
