"""The torch path of SSD: what :mod:`.ssd` runs on CPU tensors. Symbols as there; Q chunk length.

A loop over the chunks that carries the state, forward and backward. On a CPU such code is bound by memory traffic: what
a chunk makes stays in the cache until it is used, all heads of a group meet the state in one matrix product (the state
is held as (N, H/G P)), and no tensor is padded, transposed in memory or written a second time. The backward keeps the
inputs and the states entering the chunks, and recomputes the rest.

Per chunk, with S_i the sum of its log-decays up to token i, T that of all, h the state entering and M_ji = (B_j . C_i)
exp(S_i - S_j) for j <= i (source by target):

    y_i = sum_j M_ji u_j + exp(S_i) h C_i,          h' = exp(T) h + sum_j exp(T - S_j) u_j (x) B_j.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tracing import opaque, tracing

# Tokens of a chunk. The intra-chunk work grows with Q and the state work with P N / Q, so that Q near P and N is the
# balance; 64 also keeps the (Q, Q) tiles of 24 heads and their state in a CPU core's L2 cache.
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
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(log_decay_t) h_{t-1} + scale_t x_t (x) B_t`, `y_t = (h_t C_t + D x_t) silu(z_t)`, differentiable.

    Documents and padding are already in the arguments: log-decays of -inf and of 0, zeros in x, B, C and z.

    Args:
        x: (B, L, H, P) inputs, L >= 1.
        scale: (B, L, H) factors of the inputs in the dtype of `log_decay`, or None for one.
        log_decay: (B, L, H) in the dtype of the sums, in [-inf, 0].
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        D: (H) or (H, P) skip.
        z: (B, L, H, P) gate.
        initial_state: (B, H, P, N) state before the first token; zero if not given.
        chunk_size: tokens of a chunk.

    Returns:
        (B, L, H, P) outputs in the dtype of x and the (B, H, P, N) final state in the dtype of the sums.
    """
    if D is not None and D.dim() == 1:
        D = D[:, None]
    arguments = (x, scale, log_decay, B, C, D, z, initial_state)
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen; autocast would round the products
        if tracing():
            return _traced_scan(*arguments, chunk_size or _CHUNK)
        if recorded:
            return _Scan.apply(*arguments, chunk_size or _CHUNK)
        return _forward(*arguments, chunk_size or _CHUNK, None)


class _Chunk(NamedTuple):
    """What forward and backward both need of a chunk, in the dtype of the sums; R = H / G, i target, j source."""

    x: Tensor
    """(B, Q, H, P)"""
    u: Tensor
    """(B, Q, H, P) scaled inputs"""
    B: Tensor
    """(B, G, Q, N)"""
    C: Tensor
    """(B, G, Q, N)"""
    scores: Tensor
    """(B, G, 1, Q j, Q i) products B_j . C_i, 0 for i < j"""
    decay: Tensor
    """(B, H, Q j, Q i) exp(S_i - S_j), of no meaning for i < j"""
    to_end: Tensor
    """(B, Q, H, 1) exp(T - S_j)"""
    from_start: Tensor
    """(B, Q, H, 1) exp(S_i)"""

    @property
    def whole(self) -> Tensor:
        """(B, G, 1, R, 1) exp(T)"""
        return self.from_start[:, -1].unflatten(1, (self.B.shape[1], -1))[:, :, None]


def _chunk(
    part: slice, x: Tensor, scale: Tensor | None, log_decay: Tensor, B: Tensor, C: Tensor, sums: torch.dtype
) -> _Chunk:
    x = x[:, part].to(sums)
    u = x if scale is None else x * scale[:, part, :, None]
    B, C = B[:, part].to(sums).transpose(1, 2), C[:, part].to(sums).transpose(1, 2)
    log_decay = log_decay[:, part]
    decay = _decays(log_decay.transpose(1, 2))
    to_end = decay[..., -1].transpose(1, 2)[..., None]
    scores = (B @ C.transpose(-1, -2)).triu_()[:, :, None]
    return _Chunk(x, u, B, C, scores, decay, to_end, _exp(log_decay.cumsum(1))[..., None])


def _mixed(matrix: Tensor, values: Tensor) -> Tensor:
    """(B, H, Q, Q) times (B, Q, H, P), as (B, Q, H, P)."""
    return (matrix @ values.transpose(1, 2)).transpose(1, 2)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """(B, Q, H, P) as (B, G, Q, R P); a view for one group."""
    return values.unflatten(2, (groups, -1)).transpose(1, 2).flatten(3)


def _by_head(values: Tensor, heads: int) -> Tensor:
    """(B, G, Q, R P) as (B, Q, H, P); a view for one group."""
    batch, groups, length, channels = values.shape
    width = channels * groups // heads
    return values.unflatten(3, (heads // groups, -1)).transpose(1, 2).reshape(batch, length, heads, width)


def _held(state: Tensor, groups: int) -> Tensor:
    """A copy of (B, H, P, N) as the loops hold it: (B, G, N, R, P)."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).clone(memory_format=torch.contiguous_format)


def _given(state: Tensor) -> Tensor:
    """(B, G, N, R, P) as callers see it: (B, H, P, N)."""
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


class _Scan(torch.autograd.Function):
    """Saves the inputs and the states entering the chunks.

    With g the gradient of the state leaving a chunk and dM_ji = dy_i . u_j:
    dC_i = sum_j dM_ji exp(S_i - S_j) B_j + exp(S_i) h^T dy_i, dB_j likewise with C_i and exp(T - S_j) g^T u_j, and
    du_j = sum_i M_ji dy_i + exp(T - S_j) g B_j.

    d(log_decay)_k is the sum of all that passes from before k to k or later: dM_ji M_ji for j < k <= i, what the tokens
    from k on read from h, what those before k leave in h', and exp(T) h . g. The shorter identity d(log_decay) =
    reverse cumulative sum of (y . dy - u . du) is not used: there, everything that does not pass k is added and
    subtracted again, so that its rounding swamps the gradient of a strong decay.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial_state: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, width = x.shape
        chunks = -(-length // chunk_size)
        states = log_decay.new_empty(chunks, batch, B.shape[2], B.shape[3], heads // B.shape[2], width)
        result = _forward(x, scale, log_decay, B, C, D, z, initial_state, chunk_size, states)
        ctx.save_for_backward(x, scale, log_decay, B, C, D, z, initial_state, states)
        ctx.chunk_size = chunk_size
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, log_decay, B, C, D, z, initial_state, states = ctx.saved_tensors
        chunk_size = ctx.chunk_size
        heads, groups = x.shape[2], B.shape[2]
        sums = log_decay.dtype
        dx, dlog_decay = torch.empty_like(x), torch.empty_like(log_decay)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dscale = None if scale is None else torch.empty_like(scale)
        dD = None if D is None else x.new_zeros(x.shape[2:], dtype=sums)
        dz = None if z is None else torch.empty_like(z)
        dstate = _held(dfinal_state.to(sums), groups)
        for index in reversed(range(len(states))):
            part = slice(index * chunk_size, (index + 1) * chunk_size)
            state = states[index]
            now = _chunk(part, x, scale, log_decay, B, C, sums)
            mix = _mixing(now)
            dy_now = dy[:, part].to(sums)
            if z is not None and dz is not None:
                gate = z[:, part].to(sums)
                smooth = gate.sigmoid()
                slope = smooth * (1 + gate * (1 - smooth))
                dz[:, part] = dy_now * _outputs(now, state, D, mix) * slope
                dy_now = dy_now * (gate * smooth)

            # Through h, what is read from it and what is left in it; (B, Q, H, P) each.
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

            # Inside the chunk.
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
            dx[:, part] = du
        if D is not None and dD is not None:
            dD = dD.sum_to_size(D.shape).to(D.dtype)
        dinitial = None if initial_state is None else _given(dstate).to(initial_state.dtype)
        return dx, dscale, dlog_decay, dB, dC, dD, dz, dinitial, None


def _empty_results(x: Tensor, scale: Any, log_decay: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), log_decay.new_empty(batch, heads, width, B.shape[3])


_traced_scan = opaque(
    _Scan,
    "scan",
    "Tensor x, Tensor? scale, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? initial_state, "
    "int chunk_size",
    _empty_results,
)


def _forward(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state; the (c, B, G, N, R, P) states entering the chunks are written into `states`."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    sums = log_decay.dtype
    if initial_state is None:
        state = log_decay.new_zeros(batch, groups, size, heads // groups, width)
    else:
        state = _held(initial_state.to(sums), groups)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for index, start in enumerate(range(0, length, chunk_size)):
        part = slice(start, start + chunk_size)
        now = _chunk(part, x, scale, log_decay, B, C, sums)
        if states is not None:
            states[index] = state
        out = _outputs(now, state, D, _mixing(now))
        y[:, part] = out if z is None else out * F.silu(z[:, part].to(sums))
        state *= now.whole
        _add_product(state, now.B.transpose(-1, -2), _grouped(now.u * now.to_end, groups))
    return y, _given(state)


def _add_product(state: Tensor, left: Tensor, right: Tensor) -> None:
    """state += left right, for (B, G, N, R, P), (B, G, N, Q) and (B, G, Q, R P)."""
    state.flatten(3).flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))


def _mixing(now: _Chunk) -> Tensor:
    """(B, H, Q j, Q i) the matrix M."""
    groups = now.B.shape[1]
    return (now.decay.unflatten(1, (groups, -1)) * now.scores).flatten(1, 2)


def _outputs(now: _Chunk, state: Tensor, D: Tensor | None, mix: Tensor) -> Tensor:
    """(B, Q, H, P) outputs before the gate; `state` is (B, G, N, R, P)."""
    y = _by_head(now.C @ state.flatten(3), now.x.shape[2])
    y *= now.from_start
    y += _mixed(mix.transpose(-1, -2), now.u)
    return y if D is None else y.addcmul_(now.x, D.to(y.dtype))


def _crossing(flow: Tensor) -> Tensor:
    """(B, H, Q j, Q i) to (B, Q - 1, H): at k - 1 the sum over j < k <= i, of the terms that count only."""
    length = flow.shape[-1]
    ones = torch.ones(length, length, dtype=flow.dtype, device=flow.device).tril()
    later = flow @ ones  # [j, k]: the sum over i >= k
    return later.triu_(1).sum(-2)[..., 1:].transpose(1, 2)


def decay_matrix(log_decay: Tensor) -> Tensor:
    """(..., Q) to (..., Q source j, Q target i): exp of the sum of `log_decay` over k = j+1..i, 0 for i < j."""
    return _decays(log_decay).triu()


def _decays(log_decay: Tensor) -> Tensor:
    """:func:`decay_matrix`, but with ones for i < j.

    Differences of cumulative sums, which in float64 lose nothing that float32 could hold. Each summand is cut off below
    what makes a product zero by itself (:func:`_exp`), so that sums stay small, and a decay of -inf gives no NaN.
    """
    sums = log_decay.double().clamp_min(2 * _smallest(log_decay.dtype)).cumsum(-1)
    difference = (sums[..., None, :] - sums[..., None]).to(log_decay.dtype)
    return _exp(difference.triu_())


def _exp(sums: Tensor) -> Tensor:
    """exp, and zero for what is below e^-80 (e^-700 in float64).

    Much below, numbers are subnormal, with which a CPU computes many times as slowly; strong decays make many of them.
    """
    return F.threshold(sums, _smallest(sums.dtype), -math.inf).exp_()


def _smallest(dtype: torch.dtype) -> float:
    """Of the sums whose exponential counts."""
    return -80.0 if dtype == torch.float32 else -700.0
