"""State-space duality (SSD): the token mixer of Mamba-2, and every linear recurrence with one decay per head.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, Q chunk length; x inputs, dt step sizes,
A decay rates (negative), B and C input and output maps, h state (B, H, P, N), D skip, z gate.

The recurrence is, for every batch row and head (head h reads B and C of group h // (H / G)),

    h_t = exp(a_t) h_{t-1} + u_t (x) B_t,        y_t = h_t C_t + D x_t,

with a_t = dt_t A and u_t = dt_t x_t in Mamba-2 (:func:`ssd`), and a_t given directly with u_t = x_t in discrete
Mamba-2, retention and gated linear attention (:func:`ssd_log_decay`).

`seq_idx`: (B, L) integer document index of each token of a packed row, non-decreasing over the real tokens. A negative
value marks padding, which has no effect. The initial state belongs to the document of the row's first real token; the
final state is the one after the row's last real token.

The torch path (:func:`ssd_scan_torch`) loops over chunks and carries the state, forward and backward. With S_i the
sum of a chunk's log-decays up to token i, T their total, h the state entering the chunk and
M_ji = (B_j . C_i) exp(S_i - S_j) for j <= i (source by target),

    y_i = sum_j M_ji u_j + exp(S_i) h C_i,          h' = exp(T) h + sum_j exp(T - S_j) u_j (x) B_j.

On a CPU such code is limited by memory traffic. Therefore the intermediate tensors of a chunk are small enough for the
cache, all heads of a group multiply the state in one matrix product (the state is stored as (N, H/G P)), and no tensor
is padded, transposed in memory or written twice. The backward saves the inputs and the state entering each chunk, and
recomputes the rest.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 (block decomposition of the semiseparable
matrix) and listing 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import (
    accumulator,
    check_devices,
    check_groups,
    check_optional,
    check_seq_idx,
    check_tensor,
    choose_implementation,
    empty_batch,
    recorded,
    without_autocast,
)
from .recurrence import blank_padding, documents, skip_and_gate, step_sizes, update_state
from .ssd_triton import ssd_scan_triton, ssd_step_triton
from .tracing import opaque, tracing


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
    """Run Mamba-2's scan: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t`, `y_t = h_t C_t + D x_t`.

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
        dt_limit: range to which the step sizes are clamped, after softplus.
        initial_state: (B, H, P, N) state before the first token; zero if not given. Gradients flow to it.
        seq_idx: (B, L) document index of each token, negative for padding (module docstring).
        return_final_state: also return the state after the last real token.
        chunk_size: tokens per chunk; affects rounding and speed only.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`).

    Returns:
        (B, L, H, P) outputs in the dtype of `x`; with `return_final_state` also the (B, H, P, N) final state in
        float32 (float64 for float64 inputs), in which sums are accumulated.

    Raises:
        ValueError: if a shape, dtype, device, group count, `seq_idx` or `implementation` is invalid.
    """
    _check_inputs(x, "dt", dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    implementation = choose_implementation(implementation, "ssd", x, traceable=True)
    if implementation == "torch":
        x, dt, B, C, z = blank_padding(seq_idx, x, dt, B, C, z)
    operands = x, dt, A, B, C, D, z, initial_state, dt_bias
    y, state, _ = _scan(operands, (dt_softplus, dt_limit), seq_idx, return_final_state, chunk_size, implementation)
    if implementation == "torch":
        (y,) = blank_padding(seq_idx, y)
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
    row_sums: bool = False,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Run SSD with given decays: `h_t = exp(log_decay_t) h_{t-1} + x_t (x) B_t`, `y_t = h_t C_t + D x_t`.

    Discrete Mamba-2 (MOHAWK, arXiv 2408.10189), retention (a constant log-decay per head) and linear attention (zero
    log-decay) have this form.

    Args:
        x: (B, L, H, P) inputs, L >= 1.
        log_decay: (B, L, H) logarithm of the decay, in [-inf, 0]; -inf forgets everything before the token.
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        D: (H) or (H, P) skip, added as `D x`.
        z: (B, L, H, P) gate: the output, skip included, is multiplied by `silu(z)`.
        initial_state: (B, H, P, N) state before the first token, (B, H, P + 1, N) with `row_sums`; zero if not given.
            Gradients flow to it.
        seq_idx: (B, L) document index of each token, negative for padding (module docstring).
        return_final_state: also return the state after the last real token.
        row_sums: also return the row sums of the mixing matrix (:func:`ssd_matrix`). They are the output for an input
            that is always 1, without skip and gate; the state of that input is an additional last row of the states.
        chunk_size: tokens per chunk; affects rounding and speed only.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`).

    Returns:
        (B, L, H, P) outputs in the dtype of `x`; with `row_sums` also the (B, L, H) row sums, and with
        `return_final_state` the (B, H, P, N) or (B, H, P + 1, N) final state, both in float32 (float64 for float64
        inputs). Several results are a tuple in this order.

    Raises:
        ValueError: if a shape, dtype, device, group count, `seq_idx` or `implementation` is invalid.
    """
    _check_inputs(x, "log_decay", log_decay, None, B, C, D, z, None, initial_state, seq_idx, row_sums=row_sums)
    implementation = choose_implementation(implementation, "ssd_log_decay", x, traceable=True)
    if implementation == "torch":
        x, log_decay, B, C, z = blank_padding(seq_idx, x, log_decay, B, C, z)
    operands = x, log_decay, None, B, C, D, z, initial_state, None
    steps = False, (0.0, math.inf)
    y, state, sums = _scan(operands, steps, seq_idx, return_final_state, chunk_size, implementation, row_sums)
    if implementation == "torch":
        y, sums = blank_padding(seq_idx, y, sums if row_sums else None)
    return _results(y, sums if row_sums else None, state if return_final_state else None)


def _results(*results: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """Return the results that are not None: a tensor, or a tuple of several."""
    first, *others = (result for result in results if result is not None)
    return (first, *others) if others else first


def ssd_matrix(log_decay: Tensor, B: Tensor, C: Tensor, *, seq_idx: Tensor | None = None) -> Tensor:
    """Return the mixing matrix of :func:`ssd_log_decay`: the hidden attention of a state-space layer.

    `M[i, j] = (C_i . B_j) exp(sum_{k=j+1..i} log_decay_k)` for j <= i of the same document, else 0, so that
    `y_i = sum_j M[i, j] x_j`. For :func:`ssd`, `log_decay` is `dt A` and `x` is `dt x`. The cost is quadratic in L: use
    it for inspection and for matrix orientation (MOHAWK stage 1), not for inference.

    Args:
        log_decay: (B, L, H) logarithm of the decay.
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        seq_idx: (B, L) document index of each token, negative for padding.

    Returns:
        (B, H, L, L) matrix in float32 (float64 for float64 inputs).

    Raises:
        ValueError: if a shape, dtype, device, group count or `seq_idx` is invalid.
    """
    check_tensor("log_decay", log_decay, (None, None, None), "(B, L, H)")
    batch, length, heads = log_decay.shape
    _check_maps([batch, length], heads, B, C, "B, L")
    check_devices(log_decay=log_decay, B=B, C=C, seq_idx=seq_idx)
    sums = accumulator(log_decay)
    log_decay = log_decay.to(sums)
    real = None
    check_seq_idx(seq_idx, batch, length)
    log_decay, B, C = blank_padding(seq_idx, log_decay, B, C)
    if seq_idx is not None:
        log_decay, real = _with_documents(log_decay, seq_idx)
    decay = decay_matrix(log_decay.transpose(1, 2)).transpose(-1, -2)  # (B, H, L, L), target by source
    with without_autocast(log_decay):
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
    """Compute :func:`ssd` by its definition, a loop over time in float32 or float64, with the same arguments."""
    _check_inputs(x, "dt", dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    x, dt, B, C, z = blank_padding(seq_idx, x, dt, B, C, z)
    dt = step_sizes(dt.to(accumulator(x)), dt_bias, dt_softplus, dt_limit)
    u = x.to(dt.dtype) * dt[..., None]
    y, state = _loop(u, dt * A.to(dt.dtype), B, C, initial_state, seq_idx)
    (y,) = blank_padding(seq_idx, skip_and_gate(y, x, _spread(D), z))
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
    row_sums: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute :func:`ssd_log_decay` by its definition, a loop over time, with the same arguments."""
    _check_inputs(x, "log_decay", log_decay, None, B, C, D, z, None, initial_state, seq_idx, row_sums=row_sums)
    x, log_decay, B, C, z = blank_padding(seq_idx, x, log_decay, B, C, z)
    u, sums = x.to(accumulator(x)), None
    y, state = _loop(_with_ones(u) if row_sums else u, log_decay.to(u.dtype), B, C, initial_state, seq_idx)
    if row_sums:
        y, sums = y[..., :-1], y[..., -1]
    y, sums = blank_padding(seq_idx, skip_and_gate(y, x, _spread(D), z), sums)
    return _results(y, sums, state if return_final_state else None)


def _loop(
    u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token. Returns (B, L, H, P) outputs and the (B, H, P, N) final state."""
    batch, length, heads, width = u.shape
    repeats = heads // B.shape[2]
    B = B.to(u.dtype).repeat_interleave(repeats, dim=2)  # (B, L, H, N)
    C = C.to(u.dtype).repeat_interleave(repeats, dim=2)
    state = u.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state.to(u.dtype)
    real, first = (None, None) if seq_idx is None else documents(seq_idx)
    outputs = []
    for t in range(length):
        after = log_decay[:, t, :, None, None].exp() * state
        if first is not None:
            after = after.masked_fill(first[:, t, None, None, None], 0)
        after = after + u[:, t, :, :, None] * B[:, t, :, None, :]
        state = after if real is None else after.where(real[:, t, None, None, None], state)
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def _scan(
    operands: tuple[Any, ...],
    steps: tuple[bool, tuple[float, float]],
    seq_idx: Tensor | None,
    final: bool,
    chunk_size: int | None,
    implementation: str,
    row_sums: bool = False,
) -> tuple[Tensor, ...]:
    """Run the chosen implementation.

    Args:
        operands: x, step sizes or log-decays, A or None, B, C, D, z, initial state and bias of the step sizes.
        steps: whether to apply softplus to the step sizes, and the range to which they are clamped.

    Returns:
        Outputs, final state, and row sums; an empty tensor if `row_sums` is false.
    """
    x, decay, A, B, C, D, z, initial_state, dt_bias = operands
    sums = accumulator(x)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if x.shape[0] == 0:
        _, length, heads, width = x.shape
        shapes = (0, heads, width + row_sums, B.shape[-1]), (0, length, heads)
        y = empty_batch(tuple(x.shape), x.dtype, *operands)
        return y, *(empty_batch(shape, sums, *operands) for shape in shapes)
    if implementation == "triton":
        marks = None
        if seq_idx is not None:
            real, first = documents(seq_idx)
            marks = first.to(torch.int8).masked_fill(~real, 2)
        dt_softplus, dt_limit = steps
        arguments = x, decay, A, B, C, D, z, initial_state, dt_bias, dt_softplus, dt_limit, marks, final, chunk_size
        return ssd_scan_triton(*arguments, row_sums)
    scale, log_decay = None, decay.to(sums)
    if A is not None:
        scale = step_sizes(log_decay, dt_bias, *steps)
        log_decay = scale * A.to(sums)
    if seq_idx is not None:
        log_decay, _ = _with_documents(log_decay, seq_idx)
    return ssd_scan_torch(x, scale, log_decay, B, C, D, z, initial_state, chunk_size, row_sums)


def _with_documents(log_decay: Tensor, seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Encode documents and padding in the decays: -inf at a document's first token, 0 at padding.

    Returns:
        (B, L, H) decays, and the (B, L) mask of real tokens.
    """
    real, first = documents(seq_idx)
    return log_decay.masked_fill(~real[:, :, None], 0).masked_fill(first[:, :, None], -math.inf), real


def _with_ones(x: Tensor) -> Tensor:
    """Return (..., P) inputs with an additional one that is always 1, whose outputs are the row sums."""
    return F.pad(x, (0, 1), value=1.0)


def _spread(D: Tensor | None) -> Tensor | None:
    """Return the (H) or (H, P) skip in a shape that broadcasts to (..., H, P)."""
    return D[:, None] if D is not None and D.dim() == 1 else D


def _check_maps(rows: list[int], heads: int, B: Tensor, C: Tensor, lead: str) -> None:
    check_tensor("B", B, (*rows, None, None), f"({lead}, G, N)")
    check_groups("B", B.shape[-2], heads)
    check_tensor("C", C, tuple(B.shape), f"({lead}, G, N)")


def _check_inputs(*arguments: Any, one_token: bool = False, row_sums: bool = False) -> None:
    """Check the arguments of a scan, or of a step, which have no L axis and call the state `state`.

    With `row_sums` a state has P + 1 rows.
    """
    x, decay_name, decay, A, B, C, D, z, dt_bias, state, seq_idx = arguments
    lead, state_name = ("B", "state") if one_token else ("B, L", "initial_state")
    check_tensor("x", x, (None,) * (4 - one_token), f"({lead}, H, P)")
    *rows, heads, width = x.shape
    if not one_token and rows[1] == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    check_tensor(decay_name, decay, (*rows, heads), f"({lead}, H)")
    _check_maps(rows, heads, B, C, lead)
    for name, vector in (("A", A), ("dt_bias", dt_bias)):
        check_optional(name, vector, (heads,), "(H)")
    if D is not None:
        check_tensor("D", D, (heads,) if D.dim() == 1 else (heads, width), "(H) or (H, P)")
    check_optional("z", z, tuple(x.shape), f"({lead}, H, P)")
    symbols = "(B, H, P + 1, N)" if row_sums else "(B, H, P, N)"
    check_optional(state_name, state, (rows[0], heads, width + row_sums, B.shape[-1]), symbols)
    named = {"x": x, decay_name: decay, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, state_name: state}
    check_devices(**named, seq_idx=seq_idx)
    check_seq_idx(seq_idx, rows[0], rows[-1])


# Tokens per chunk. The work inside chunks grows with Q and the work on states with P N / Q, so that Q near P and N is a
# good balance; at 64 the (Q, Q) tiles of 24 heads and their state also fit the L2 cache of a CPU core.
_CHUNK = 64


def ssd_scan_torch(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None = None,
    row_sums: bool = False,
) -> tuple[Tensor, ...]:
    """Compute `h_t = exp(log_decay_t) h_{t-1} + scale_t x_t (x) B_t`, `y_t = (h_t C_t + D x_t) silu(z_t)`.

    Differentiable. The arguments encode documents and padding by log-decays of -inf and 0, and zeros in x, B, C and z.

    Args:
        x: (B, L, H, P) inputs, L >= 1.
        scale: (B, L, H) factors of the inputs in the dtype of `log_decay`; one if not given.
        log_decay: (B, L, H) log-decays in the dtype of the sums, in [-inf, 0].
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        D: (H) or (H, P) skip.
        z: (B, L, H, P) gate.
        initial_state: (B, H, P, N) state before the first token, (B, H, P + 1, N) with `row_sums`; zero if not given.
        chunk_size: tokens per chunk.
        row_sums: compute the outputs of an additional input that is always `scale`, without skip and gate.

    Returns:
        (B, L, H, P) outputs in the dtype of x; in the dtype of the sums, the (B, H, P or P + 1, N) final state and the
        (B, L, H) row sums, or an empty tensor.
    """
    D = _spread(D)
    if row_sums and D is not None:
        D = F.pad(D.expand(x.shape[2:]), (0, 1))
    operands = (x, scale, log_decay, B, C, D, z, initial_state)
    options = chunk_size or _CHUNK, row_sums
    with without_autocast(x):
        if tracing():
            return _traced_scan(*operands, *options)
        if recorded(*operands):
            return _Scan.apply(*operands, *options)
        return _forward(operands, *options, None)


class _Chunk(NamedTuple):
    """Tensors of a chunk in the dtype of the sums, for forward and backward; R = H / G, i target, j source.

    With row sums, P counts the additional input here and in the states.
    """

    x: Tensor
    """(B, Q, H, P)"""
    u: Tensor
    """(B, Q, H, P) scaled inputs"""
    B: Tensor
    """(B, G, Q, N)"""
    C: Tensor
    """(B, G, Q, N)"""
    scores: Tensor
    """(B, G, 1, Q j, Q i) products B_j . C_i, zero for i < j"""
    decay: Tensor
    """(B, H, Q j, Q i) exp(S_i - S_j), arbitrary for i < j"""
    to_end: Tensor
    """(B, Q, H, 1) exp(T - S_j)"""
    from_start: Tensor
    """(B, Q, H, 1) exp(S_i)"""

    @property
    def whole(self) -> Tensor:
        """(B, G, 1, R, 1) exp(T)"""
        return self.from_start[:, -1].unflatten(1, (self.B.shape[1], -1))[:, :, None]


def _chunk(
    part: slice, x: Tensor, scale: Tensor | None, log_decay: Tensor, B: Tensor, C: Tensor, row_sums: bool
) -> _Chunk:
    sums = log_decay.dtype
    x = x[:, part].to(sums)
    if row_sums:
        x = _with_ones(x)
    u = x if scale is None else x * scale[:, part, :, None]
    B, C = B[:, part].to(sums).transpose(1, 2), C[:, part].to(sums).transpose(1, 2)
    log_decay = log_decay[:, part]
    decay = _decays(log_decay.transpose(1, 2))
    to_end = decay[..., -1].transpose(1, 2)[..., None]
    scores = (B @ C.transpose(-1, -2)).triu_()[:, :, None]
    return _Chunk(x, u, B, C, scores, decay, to_end, _exp(log_decay.cumsum(1))[..., None])


def _mixed(matrix: Tensor, values: Tensor) -> Tensor:
    """Multiply a (B, H, Q, Q) matrix by (B, Q, H, P) values; returns (B, Q, H, P)."""
    return (matrix @ values.transpose(1, 2)).transpose(1, 2)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """Return (B, Q, H, P) values as (B, G, Q, R P); a view if G = 1."""
    return values.unflatten(2, (groups, -1)).transpose(1, 2).flatten(3)


def _by_head(values: Tensor, heads: int) -> Tensor:
    """Return (B, G, Q, R P) values as (B, Q, H, P); a view if G = 1."""
    batch, groups, length, channels = values.shape
    width = channels * groups // heads
    return values.unflatten(3, (heads // groups, -1)).transpose(1, 2).reshape(batch, length, heads, width)


def _to_loop_layout(state: Tensor, groups: int) -> Tensor:
    """Return a copy of a (B, H, P, N) state in the layout of the loops, (B, G, N, R, P)."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).clone(memory_format=torch.contiguous_format)


def _from_loop_layout(state: Tensor) -> Tensor:
    """Return a (B, G, N, R, P) state of the loops as (B, H, P, N)."""
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


class _Scan(torch.autograd.Function):
    """The torch scan; saves the inputs and the states entering the chunks.

    With g the gradient of the state leaving a chunk and dM_ji = dy_i . u_j:
    dC_i = sum_j dM_ji exp(S_i - S_j) B_j + exp(S_i) h^T dy_i, dB_j likewise with C_i and exp(T - S_j) g^T u_j, and
    du_j = sum_i M_ji dy_i + exp(T - S_j) g B_j.

    d(log_decay)_k sums every contribution that crosses token k: dM_ji M_ji for j < k <= i, the reads of h by tokens
    from k on, the contributions of tokens before k to h', and exp(T) h . g. The shorter identity d(log_decay) = reverse
    cumulative sum of (y . dy - u . du) is not used, because it adds and subtracts contributions that do not cross k,
    and their rounding errors swamp the gradient of a strong decay.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *operands, ctx.chunk_size, ctx.row_sums = arguments
        x, _, log_decay, B, *_ = operands
        batch, length, heads, width = x.shape
        chunks = -(-length // ctx.chunk_size)
        groups, size = B.shape[2:]
        states = log_decay.new_empty(chunks, batch, groups, size, heads // groups, width + ctx.row_sums)
        ctx.save_for_backward(*operands, states)
        return _forward(operands, ctx.chunk_size, ctx.row_sums, states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal_state: Tensor, drow_sums: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, log_decay, B, C, D, z, initial_state, states = ctx.saved_tensors
        chunk_size = ctx.chunk_size
        heads, width, groups = *x.shape[2:], B.shape[2]
        sums = log_decay.dtype
        dx, dlog_decay = torch.empty_like(x), torch.empty_like(log_decay)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dscale = None if scale is None else torch.empty_like(scale)
        dD = None if D is None else log_decay.new_zeros(heads, width + ctx.row_sums)
        dz = None if z is None else torch.empty_like(z)
        dstate = _to_loop_layout(dfinal_state.to(sums), groups)
        for index in reversed(range(len(states))):
            part = slice(index * chunk_size, (index + 1) * chunk_size)
            state = states[index]
            now = _chunk(part, x, scale, log_decay, B, C, ctx.row_sums)
            mix = _mixing(now)
            dy_now = dy[:, part].to(sums)
            if z is not None and dz is not None:
                gate = z[:, part].to(sums)
                smooth = gate.sigmoid()
                slope = smooth * (1 + gate * (1 - smooth))
                dz[:, part] = dy_now * _outputs(now, state, D, mix)[..., :width] * slope
                dy_now = dy_now * (gate * smooth)
            if ctx.row_sums:
                dy_now = torch.cat([dy_now, drow_sums[:, part, :, None]], -1)

            # Gradients through h: of the reads from it and of the contributions to it, (B, Q, H, P) each.
            flat_state, flat_dstate = state.flatten(3), dstate.flatten(3)
            dread = dy_now * now.from_start
            read = (_by_head(now.C @ flat_state, heads) * dread).sum(-1)  # (B, Q, H)
            left = _by_head(now.B @ flat_dstate, heads) * now.to_end  # the gradient of u
            passed = (now.whole * state * dstate).sum((2, 4)).flatten(1)  # (B, H)
            dread = _grouped(dread, groups)
            dC_now = dread @ flat_state.transpose(-1, -2)
            dB_now = _grouped(now.u * now.to_end, groups) @ flat_dstate.transpose(-1, -2)
            dstate *= now.whole
            _add_product(dstate, now.C.transpose(-1, -2), dread)
            flow = read.flip(1).cumsum(1).flip(1) + passed[:, None]
            flow[:, 1:] += (left * now.u).sum(-1).cumsum(1)[:, :-1]

            # Gradients inside the chunk.
            du = left + _mixed(mix, dy_now)
            dmix = now.u.transpose(1, 2) @ dy_now.permute(0, 2, 3, 1)  # (B, H, Q j, Q i)
            flow[:, 1:] += _crossing(dmix * mix)
            dmix *= now.decay
            dscores = dmix.unflatten(1, (groups, -1)).sum(2).triu_()
            dB_now += dscores @ now.C
            dC_now += dscores.transpose(-1, -2) @ now.B

            dlog_decay[:, part] = flow
            dB[:, part] = dB_now.transpose(1, 2)
            dC[:, part] = dC_now.transpose(1, 2)
            if scale is not None and dscale is not None:
                dscale[:, part] = (du * now.x).sum(-1)
                du *= scale[:, part, :, None]
            if D is not None and dD is not None:
                dD += (dy_now * now.x).sum((0, 1))
                du += D.to(sums) * dy_now
            dx[:, part] = du[..., :width]
        if D is not None and dD is not None:
            dD = dD.sum_to_size(D.shape).to(D.dtype)
        dinitial = None if initial_state is None else _from_loop_layout(dstate).to(initial_state.dtype)
        return dx, dscale, dlog_decay, dB, dC, dD, dz, dinitial, None, None


def _empty_results(x: Tensor, scale: Any, log_decay: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, row_sums = others
    batch, length, heads, width = x.shape
    state = log_decay.new_empty(batch, heads, width + row_sums, B.shape[3])
    return x.new_empty(x.shape), state, log_decay.new_empty((batch, length, heads) if row_sums else 0)


_traced_scan = opaque(
    _Scan,
    "scan",
    "Tensor x, Tensor? scale, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? initial_state, "
    "int chunk_size, bool row_sums",
    _empty_results,
    results=3,
)


def _forward(
    operands: Sequence[Any], chunk_size: int, row_sums: bool, states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, final state and row sums, and store the states entering the chunks in `states`, if given.

    Args:
        states: (c, B, G, N, R, P), or P + 1 with `row_sums`.
    """
    x, scale, log_decay, B, C, D, z, initial_state = operands
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    if initial_state is None:
        state = log_decay.new_zeros(batch, groups, size, heads // groups, width + row_sums)
    else:
        state = _to_loop_layout(initial_state.to(log_decay.dtype), groups)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = log_decay.new_empty((batch, length, heads) if row_sums else 0)
    for index, start in enumerate(range(0, length, chunk_size)):
        part = slice(start, start + chunk_size)
        now = _chunk(part, x, scale, log_decay, B, C, row_sums)
        if states is not None:
            states[index] = state
        out = _outputs(now, state, D, _mixing(now))
        if row_sums:
            sums[:, part] = out[..., width]
            out = out[..., :width]
        y[:, part] = out if z is None else out * F.silu(z[:, part].to(out.dtype))
        state *= now.whole
        _add_product(state, now.B.transpose(-1, -2), _grouped(now.u * now.to_end, groups))
    return y, _from_loop_layout(state), sums


def _add_product(state: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of (B, G, N, Q) and (B, G, Q, R P) tensors to a (B, G, N, R, P) state in place."""
    state.flatten(3).flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))


def _mixing(now: _Chunk) -> Tensor:
    """Return the (B, H, Q j, Q i) matrix M."""
    groups = now.B.shape[1]
    return (now.decay.unflatten(1, (groups, -1)) * now.scores).flatten(1, 2)


def _outputs(now: _Chunk, state: Tensor, D: Tensor | None, mix: Tensor) -> Tensor:
    """Return (B, Q, H, P) outputs before the gate; `state` is (B, G, N, R, P)."""
    y = _by_head(now.C @ state.flatten(3), now.x.shape[2])
    y *= now.from_start
    y += _mixed(mix.transpose(-1, -2), now.u)
    return y if D is None else y.addcmul_(now.x, D.to(y.dtype))


def _crossing(flow: Tensor) -> Tensor:
    """Return (B, Q - 1, H) sums over j < k <= i, at index k - 1, of (B, H, Q j, Q i) terms."""
    length = flow.shape[-1]
    ones = torch.ones(length, length, dtype=flow.dtype, device=flow.device).tril()
    later = flow @ ones  # [j, k] is the sum over i >= k
    return later.triu_(1).sum(-2)[..., 1:].transpose(1, 2)


def decay_matrix(log_decay: Tensor) -> Tensor:
    """Return the (..., Q source j, Q target i) products of the decays from j+1 to i, zero for i < j."""
    return _decays(log_decay).triu()


def _decays(log_decay: Tensor) -> Tensor:
    """Return :func:`decay_matrix`, but with ones for i < j.

    The exponents are differences of cumulative sums in float64, which are exact to float32 precision. Each summand is
    clamped at a value whose exponential is flushed to zero (:func:`_exp`): sums stay small, and -inf gives no NaN.
    """
    sums = log_decay.double().clamp_min(2 * _smallest(log_decay.dtype)).cumsum(-1)
    difference = (sums[..., None, :] - sums[..., None]).to(log_decay.dtype)
    return _exp(difference.triu_())


def _exp(sums: Tensor) -> Tensor:
    """Return exp(sums), with zero for results below e^-80 (e^-700 in float64).

    Much smaller results would be subnormal, and strong decays produce many of those, which slow a CPU down.
    """
    return F.threshold(sums, _smallest(sums.dtype), -math.inf).exp_()


def _smallest(dtype: torch.dtype) -> float:
    """Return the smallest log-decay sum whose exponential is not flushed to zero."""
    return -80.0 if dtype == torch.float32 else -700.0


def ssd_step(
    state: Tensor,
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
    implementation: str = "auto",
) -> Tensor:
    """Run one token of :func:`ssd` and update `state` in place.

    The step does not wait for the device, so that a CUDA graph can capture it. With Triton it is a single launch, which
    reads views of a projection without a copy.

    Args:
        state: (B, H, P, N) state, float32 (or float64), of any strides.
        x: (B, H, P) input.
        dt: (B, H) step sizes.
        A: (H) decay rates, negative.
        B: (B, G, N) input map; G divides H.
        C: (B, G, N) output map.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate.
        dt_bias: (H) added to `dt` first.
        dt_softplus: apply softplus to `dt + dt_bias`.
        dt_limit: range to which the step sizes are clamped, after softplus.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support calls that
            autograd records.

    Returns:
        (B, H, P) output in the dtype of `x`; sums are accumulated in the dtype of `state`.

    Raises:
        ValueError: if a shape, dtype, device, group count or `implementation` is invalid.
    """
    if _choose(implementation, "ssd_step", state, x, "dt", dt, A, B, C, D, z, dt_bias) == "triton":
        return ssd_step_triton(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, None)
    dt = step_sizes(dt.to(state.dtype), dt_bias, dt_softplus, dt_limit)
    decay = (dt * A.to(state.dtype)).exp()[..., None, None]
    y = update_state(state, decay, x.to(state.dtype) * dt[..., None], B, C)
    return skip_and_gate(y, x, _spread(D), z)


def ssd_log_decay_step(
    state: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    row_sums: bool = False,
    implementation: str = "auto",
) -> Any:
    """Run one token of :func:`ssd_log_decay` and update `state` in place.

    Other arguments and errors are those of :func:`ssd_step`.

    Args:
        state: (B, H, P, N) state, (B, H, P + 1, N) with `row_sums`.
        log_decay: (B, H) logarithm of the decay, in [-inf, 0].
        row_sums: also return the row sums of the mixing matrix, see :func:`ssd_log_decay`.

    Returns:
        (B, H, P) output in the dtype of `x`; with `row_sums` a tuple of it and the (B, H) row sums in the dtype of
        `state`.
    """
    arguments = x, "log_decay", log_decay, None, B, C, D, z, None
    if _choose(implementation, "ssd_log_decay_step", state, *arguments, row_sums=row_sums) == "triton":
        sums, limits = state.new_empty(state.shape[:2]) if row_sums else None, (0.0, math.inf)
        return _results(ssd_step_triton(state, x, log_decay, None, B, C, D, z, None, False, limits, sums), sums)
    decay = log_decay.to(state.dtype).exp()[..., None, None]
    u, sums = x.to(state.dtype), None
    y = update_state(state, decay, _with_ones(u) if row_sums else u, B, C)
    if row_sums:
        y, sums = y[..., :-1], y[..., -1].contiguous()
    return _results(skip_and_gate(y, x, _spread(D), z), sums)


def _choose(implementation: str, name: str, state: Tensor, *arguments: Any, row_sums: bool = False) -> str:
    """Check the arguments of a step, those of :func:`_check_inputs` before `state`, and return the implementation."""
    _check_inputs(*arguments, state, None, one_token=True, row_sums=row_sums)
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state must be float32 or float64, got {state.dtype}")
    inputs = [each for each in arguments if isinstance(each, Tensor)]
    served = not recorded(state, *inputs)  # the kernel has no backward
    return choose_implementation(implementation, name, state, served, traceable=True)
