"""Selective scan (S6): the token mixer of Mamba-1, a linear recurrence with a decay per channel and state.

Symbols: B batch, L length, D channels, N state size, G groups, Q chunk length; x inputs, dt step sizes, A decay rates
(negative), B and C input and output maps, h state (B, D, N), D skip, z gate.

The recurrence is, for every batch row, channel d and state n (channel d reads B and C of group d // (D / G)),

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,        y_t = sum_n C_t h_t + D x_t,

with the exact exponential for the decay and Euler's rule for the input, as in all published checkpoints.

Source: Gu and Dao, "Mamba" (arXiv 2312.00752), section 3 and appendix D (states are not stored for the whole length but
recomputed by the backward).

`seq_idx`: (B, L) integer document index of each token of a packed row, non-decreasing over the real tokens. A negative
value marks padding, which does not change the state and has the output 0. The initial state belongs to the document of
the row's first real token; the final state is the one after the row's last real token.
"""

from __future__ import annotations

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
    without_autocast,
)
from .recurrence import blank_padding, documents, skip_and_gate, step_sizes, update_state
from .selective_scan_triton import selective_scan_step_triton, selective_scan_triton
from .tracing import opaque, tracing

# Numbers of states (rows x D x N) and of tokens that the torch path processes at a time. The operations of a token are
# then large enough to outweigh their calls (a microsecond or two each), a chunk's buffers fit the caches of a CPU, and
# memory does not grow with the length except for saved states: 4 N / _CHUNK bytes per token and channel.
_STATES = 32768
_CHUNK = 32


def selective_scan(
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
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-1's scan: `h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`, `y_t = sum_n C_t h_t + D x_t`.

    Args:
        x: (B, L, D) inputs, L >= 1.
        dt: (B, L, D) step sizes; positive, or any real with `dt_softplus`.
        A: (D, N) decay rates, negative (`-exp(A_log)`).
        B: (B, L, G, N) input maps; G divides D.
        C: (B, L, G, N) output maps.
        D: (D) skip, added as `D x`.
        z: (B, L, D) gate: the output, skip included, is multiplied by `silu(z)`.
        dt_bias: (D) added to `dt` first.
        dt_softplus: apply softplus to `dt + dt_bias`.
        initial_state: (B, D, N) state before the first token; zero if not given. Gradients flow to it.
        seq_idx: (B, L) document index of each token, negative for padding (module docstring).
        return_final_state: also return the state after the last real token.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`).

    Returns:
        (B, L, D) outputs in the dtype of `x`; with `return_final_state` also the (B, D, N) final state in float32
        (float64 for float64 inputs), in which sums are accumulated.

    Raises:
        ValueError: if a shape, dtype, device, group count, `seq_idx` or `implementation` is invalid.
    """
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    real, first = (None, None) if seq_idx is None else documents(seq_idx)
    implementation = choose_implementation(implementation, "selective_scan", x, traceable=True)
    if x.shape[0] == 0:
        inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        y = empty_batch(tuple(x.shape), x.dtype, *inputs)
        return (y, empty_batch((0, *A.shape), accumulator(x), *inputs)) if return_final_state else y
    if implementation == "triton":
        operands = x, dt, A, B, C, D, z, dt_bias, initial_state
        y, state = selective_scan_triton(*operands, dt_softplus=dt_softplus, real=real, first=first)
        return (y, state) if return_final_state else y
    x, dt, B, C, z = blank_padding(seq_idx, x, dt, B, C, z)
    sums = accumulator(x)
    state = x.new_zeros(x.shape[0], *A.shape, dtype=sums) if initial_state is None else initial_state.to(sums)
    scan = _traced_scan if tracing() else _SelectiveScan.apply
    y, state = scan(  # type: ignore[misc]
        x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, real, first, torch.is_grad_enabled()
    )
    (y,) = blank_padding(seq_idx, y)
    return (y, state) if return_final_state else y


def selective_scan_step(
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
    implementation: str = "auto",
) -> Tensor:
    """Run one token of :func:`selective_scan` and update `state` in place. Not differentiable.

    Args:
        state: (B, D, N) state, float32 (or float64).
        x: (B, D) input.
        dt: (B, D) step sizes.
        A: (D, N) decay rates, negative.
        B: (B, G, N) input map; G divides D.
        C: (B, G, N) output map.
        D: (D) skip.
        z: (B, D) gate.
        dt_bias: (D) added to `dt` first.
        dt_softplus: apply softplus to `dt + dt_bias`.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). The Triton step is a single launch that
            does not wait for the device, so that a CUDA graph can capture it.

    Returns:
        (B, D) output in the dtype of `x`.

    Raises:
        ValueError: if a shape, dtype, device, group count or `implementation` is invalid.
    """
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, state, None, one_token=True)
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state must be float32 or float64, got {state.dtype}")
    with torch.no_grad():
        if choose_implementation(implementation, "selective_scan_step", state, traceable=True) == "triton":
            return selective_scan_step_triton(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        sums = state.dtype
        dt = step_sizes(dt.to(sums), dt_bias, dt_softplus)
        y = update_state(state, _decay(dt[..., None], A.to(sums)), dt * x.to(sums), B, C)
        return skip_and_gate(y, x, D, z)


def selective_scan_reference(
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
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`selective_scan` by its definition, a loop over time, with the same arguments."""
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    real, first = (None, None) if seq_idx is None else documents(seq_idx)
    x, dt, B, C, z = blank_padding(seq_idx, x, dt, B, C, z)
    dt = step_sizes(dt.to(accumulator(x)), dt_bias, dt_softplus)
    if real is not None:
        dt = dt * real[:, :, None]
    per_group = x.shape[2] // B.shape[2]
    maps_in = B.to(dt.dtype).repeat_interleave(per_group, dim=2)  # (B, L, D, N)
    maps_out = C.to(dt.dtype).repeat_interleave(per_group, dim=2)
    state = dt.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dt.dtype)
    outputs = []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A.to(dt.dtype)) * state
        if first is not None:
            state = state.masked_fill(first[:, t, None, None], 0)
        state = state + (dt[:, t] * x[:, t].to(dt.dtype))[..., None] * maps_in[:, t]
        outputs.append((state * maps_out[:, t]).sum(-1))
    (y,) = blank_padding(seq_idx, skip_and_gate(torch.stack(outputs, dim=1), x, D, z))
    return (y, state) if return_final_state else y


def _decay(dt: Tensor, A: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the factors on the state from step sizes and rates that broadcast.

    Another discretisation would change this function only, as long as the gradient of the factor's logarithm is A for
    dt and dt for A.
    """
    return torch.mul(dt, A, out=out).exp_()


class _SelectiveScan(torch.autograd.Function):
    """The torch scan, a loop over chunks and their tokens.

    h_t = a_t h_{t-1} + B_t u_t, y_t = C_t h_t, with a_t = exp(dt_t A) and u_t = dt_t x_t.

    Backward, with g_t the gradient at h_t:  g_t = C_t dy_t + a_{t+1} g_{t+1};  du_t = sum_n B_t g_t;
    dB_t = sum_d u_t g_t;  dC_t = sum_d dy_t h_t;  e_t = g_t a_t h_{t-1} is the gradient at dt_t A, hence
    ddt_t = sum_n A e_t + x_t du_t and dA = sum_t dt_t e_t. The forward saves the inputs and the state entering each
    chunk, and the backward recomputes the rest chunk by chunk, so that the largest temporary tensor is (Q, D, N). Step
    sizes, skip and gate are also computed per chunk, while it is in the cache.

    Within a chunk the recurrence is an in-place multiply-add per token; everything else is one operation on all tokens.
    States are stored as (N, D), so that the inner loop runs over D neighbours, for which x and dt are vectors and B and
    C scalars. Forms with cumulative decays would divide by products of decays and overflow.
    Measured on one core of an AMD EPYC with 1 MiB of L2, fp32, torch 2.13, November 2026, B 1, L 1024, D 1536, N 16,
    forward, best of 9: a loop over tokens 33 ms with states as (D, N) and 30 as (N, D); a scan over pairs (a, h) in
    log Q rounds, Q = 16, 56 ms; this 25 ms. Forward and backward of this: 83 ms.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, state, ctx.dt_softplus, real, first, grad_enabled = arguments
        x = operands[0]
        with without_autocast(x):
            ctx.set_materialize_grads(False)
            keep = grad_enabled and any(ctx.needs_input_grad)
            tokens = _Tokens(*operands, ctx.dt_softplus, real, first, state.dtype)
            y, final = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)
            y_tokens, (entering, leaving) = tokens.view(y), (tokens.view_state(state), tokens.view_state(final))
            saved = state.new_empty(len(tokens.chunks) if keep else 0, *entering.shape)
            for rows in tokens.blocks:
                decay, states = tokens.buffer(rows, 0), tokens.buffer(rows, 1)
                states[0].copy_(entering[rows])
                for index, part in enumerate(tokens.chunks):
                    if keep:
                        saved[index, rows].copy_(states[0])
                    now = tokens.inputs(part, rows)
                    length = tokens.run(decay, states, part, rows, now)
                    out = tokens.outputs(states, part, rows, now)
                    if tokens.z is not None:
                        out *= F.silu(tokens.z[part, rows].to(out.dtype))
                    y_tokens[part, rows] = out
                    states[0].copy_(states[length])
                leaving[rows] = states[0]
            ctx.save_for_backward(*operands, saved, real, first)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, saved, real, first = ctx.saved_tensors
        with without_autocast(x):
            dy, dfinal = gradients
            sums = saved.dtype
            tokens = _Tokens(x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, real, first, sums)
            dy_tokens = tokens.view(torch.zeros_like(x) if dy is None else dy)
            dx, ddt, dB, dC = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
            dz = None if z is None else torch.empty_like(z)
            dx_tokens, ddt_tokens = tokens.view(dx), tokens.view(ddt)
            dB_tokens, dC_tokens = tokens.view_map(dB), tokens.view_map(dC)
            dA = torch.zeros_like(tokens.A)
            dbias, dskip = torch.zeros_like(tokens.A[:, :1]), torch.zeros_like(tokens.A[:, :1])
            dstate = saved.new_zeros(x.shape[0], *A.shape) if dfinal is None else dfinal.clone()
            dstates = tokens.view_state(dstate)
            for rows in tokens.blocks:
                decay, states, slopes = (tokens.buffer(rows, extra) for extra in (0, 1, 0))
                carry = dstates[rows].contiguous()  # a_{t+1} g_{t+1} of the next chunk
                for index in range(len(tokens.chunks) - 1, -1, -1):
                    part = tokens.chunks[index]
                    states[0].copy_(saved[index, rows])
                    now = tokens.inputs(part, rows)
                    length = tokens.run(decay, states, part, rows, now)
                    a, h, g = decay[:length], states[: length + 1], slopes[:length]
                    dy_now = dy_tokens[part, rows].to(sums)
                    if tokens.z is not None and dz is not None:
                        gate = tokens.z[part, rows].to(sums)
                        smooth = gate.sigmoid()
                        out = tokens.outputs(states, part, rows, now)
                        tokens.view(dz)[part, rows] = out.mul_(dy_now).mul_(smooth * (1 + gate * (1 - smooth)))
                        dy_now = dy_now * (gate * smooth)
                    torch.mul(tokens.C[part, rows], dy_now, out=g)
                    g[-1].add_(carry)
                    a_each, g_each = a.unbind(), g.unbind()
                    for t in range(length - 2, -1, -1):
                        g_each[t].addcmul_(a_each[t + 1], g_each[t + 1])
                    torch.mul(a[0], g[0], out=carry)
                    dC_tokens[part, rows] = h[1:] @ dy_now.transpose(-1, -2)
                    dB_tokens[part, rows] = g @ now.u.transpose(-1, -2)
                    du = tokens.B[part, rows].transpose(-1, -2) @ g
                    e = a.mul_(h[:-1]).mul_(g)
                    if ctx.needs_input_grad[2]:
                        dA += torch.mul(e, now.steps, out=g).sum((0, 1))
                    dsteps = e.mul_(tokens.A).sum(-2, keepdim=True).addcmul_(du, now.x)
                    if tokens.real is not None:
                        dsteps *= tokens.real[part, rows]
                    if ctx.dt_softplus:
                        dsteps *= now.raw.sigmoid()
                    ddt_tokens[part, rows] = dsteps
                    dbias += dsteps.sum((0, 1))
                    du *= now.steps
                    if tokens.D is not None:
                        dskip += (dy_now * now.x).sum((0, 1))
                        du.addcmul_(tokens.D, dy_now)
                    dx_tokens[part, rows] = du
                dstates[rows] = carry
            return (
                dx,
                ddt,
                dA.transpose(1, 2).reshape(A.shape).to(A.dtype),
                dB,
                dC,
                None if D is None else dskip.flatten().to(D.dtype),
                dz,
                None if dt_bias is None else dbias.flatten().to(dt_bias.dtype),
                dstate,
                *[None] * 4,
            )


def _empty_results(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    state = others[7]
    return x.new_empty(x.shape), state.new_empty(state.shape)


_traced_scan = opaque(
    _SelectiveScan,
    "scan",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor state, "
    "bool dt_softplus, Tensor? real, Tensor? first, bool grad_enabled",
    _empty_results,
)


class _Inputs(NamedTuple):
    """Inputs of the recurrence for the tokens of a chunk, (Q, rows, G, 1, D / G) in the dtype of the sums."""

    x: Tensor
    raw: Tensor
    """`dt + dt_bias`"""
    steps: Tensor
    """step sizes, 0 at padding"""
    u: Tensor
    """`steps x`"""


class _Tokens:
    """Operands of the scan as (L, B, G, 1, D / G), and maps as (L, B, G, N, 1); mostly views."""

    def __init__(self, *arguments: Any) -> None:
        x, dt, A, B, C, D, z, dt_bias, self.dt_softplus, real, first, sums = arguments
        batch, length, self.channels = x.shape
        self.groups, self.size = B.shape[2:]
        self.x, self.dt = self.view(x), self.view(dt)
        self.z = None if z is None else self.view(z)
        self.B, self.C = self.view_map(B.to(sums)), self.view_map(C.to(sums))
        self.A = self.view_state(A.to(sums)[None])[0].contiguous()  # (G, N, D / G)
        self.D, self.dt_bias = (
            None if vector is None else vector.to(sums).view(self.groups, 1, -1) for vector in (D, dt_bias)
        )
        self.real = None if real is None else real.t()[:, :, None, None, None]
        self.first = None if first is None else first.t()[:, :, None, None, None]
        self.starts = None if first is None else first.any(0).tolist()  # tokens at which a document starts in any row
        self.chunk = min(_CHUNK, length)
        self.chunks = [slice(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]
        rows = max(min(_STATES // (self.channels * self.size), batch), 1)
        self.blocks = [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]

    def view(self, tensor: Tensor) -> Tensor:
        """Return a (B, L, D) tensor as (L, B, G, 1, D / G)."""
        return tensor.transpose(0, 1).unflatten(-1, (self.groups, 1, -1))

    def view_map(self, tensor: Tensor) -> Tensor:
        """Return a (B, L, G, N) tensor as (L, B, G, N, 1)."""
        return tensor.transpose(0, 1)[..., None]

    def view_state(self, tensor: Tensor) -> Tensor:
        """Return a (B, D, N) tensor as (B, G, N, D / G)."""
        return tensor.unflatten(1, (self.groups, -1)).transpose(2, 3)

    def buffer(self, rows: slice, extra: int) -> Tensor:
        """Return an uninitialised (Q + extra, rows, G, N, D / G) tensor."""
        return self.A.new_empty(self.chunk + extra, rows.stop - rows.start, *self.A.shape)

    def inputs(self, part: slice, rows: slice) -> _Inputs:
        x, raw = self.x[part, rows].to(self.A.dtype), self.dt[part, rows].to(self.A.dtype)
        if self.dt_bias is not None:
            raw = raw + self.dt_bias
        steps = F.softplus(raw) if self.dt_softplus else raw
        if self.real is not None:
            steps = steps * self.real[part, rows]
        return _Inputs(x, raw, steps, steps * x)

    def run(self, decay: Tensor, states: Tensor, part: slice, rows: slice, now: _Inputs) -> int:
        """Fill the decays of a chunk and its states after `states[0]`; return the number of its tokens."""
        length = part.stop - part.start
        a, h = decay[:length], states[: length + 1]
        _decay(now.steps, self.A, out=a)
        if self.first is not None and self.starts is not None and any(self.starts[part]):
            a.masked_fill_(self.first[part, rows], 0)
        torch.mul(self.B[part, rows], now.u, out=h[1:])
        h_each = h.unbind()
        for a_t, before, after in zip(a.unbind(), h_each, h_each[1:], strict=False):
            after.addcmul_(a_t, before)
        return length

    def outputs(self, states: Tensor, part: slice, rows: slice, now: _Inputs) -> Tensor:
        """Return the (Q, rows, G, 1, D / G) outputs of a chunk before the gate."""
        y = self.C[part, rows].transpose(-1, -2) @ states[1 : part.stop - part.start + 1]
        return y if self.D is None else y.addcmul_(self.D, now.x)


def _check_inputs(*arguments: Any, one_token: bool = False) -> None:
    """Check the arguments of a scan, or of a step, which have no L axis and call the state `state`."""
    x, dt, A, B, C, D, z, dt_bias, state, seq_idx = arguments
    lead, state_name = ("B", "state") if one_token else ("B, L", "initial_state")
    check_tensor("x", x, (None,) * (3 - one_token), f"({lead}, D)")
    *rows, channels = x.shape
    if not one_token and rows[1] == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    check_tensor("dt", dt, tuple(x.shape), f"({lead}, D)")
    check_tensor("A", A, (channels, None), "(D, N)")
    check_tensor("B", B, (*rows, None, A.shape[1]), f"({lead}, G, N)")
    check_groups("B", B.shape[-2], channels, "channels")
    check_tensor("C", C, tuple(B.shape), f"({lead}, G, N)")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        check_optional(name, vector, (channels,), "(D)")
    check_optional("z", z, tuple(x.shape), f"({lead}, D)")
    check_optional(state_name, state, (rows[0], *A.shape), "(B, D, N)")
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, state_name: state}
    check_devices(**named, seq_idx=seq_idx)
    check_seq_idx(seq_idx, rows[0], rows[-1])
