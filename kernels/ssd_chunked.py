"""The torch path of SSD: what :mod:`.ssd` runs on CPU tensors. Symbols as there; Q chunk length, c chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of a chunk. The intra-chunk work grows with Q and the state work with P N / Q, so that Q near P and N is the
# balance; 64 also keeps the (Q, Q) tiles of a head in a CPU core's L1/L2 cache.
_CHUNK = 64
# Tokens worked on at a time: bounds the (H, Q, Q) tiles alive at once to `_PANEL / Q` chunks whatever the length.
_PANEL = 512


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

    By chunks, panel after panel. Documents and padding are already in the arguments: log-decays of -inf and of 0,
    zeros in x, B, C and z.

    Args:
        x: (B, L, H, P) inputs, L >= 1.
        scale: (B, L, H) factors of the inputs, or None for one.
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
    batch, length, heads, width = x.shape
    u = x.to(log_decay.dtype) if scale is None else x.to(log_decay.dtype) * scale[..., None]
    B, C = B.to(u.dtype), C.to(u.dtype)
    state = u.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state.to(u.dtype)
    chunk = min(chunk_size or _CHUNK, length)
    panel = max(_PANEL // chunk, 1) * chunk
    outputs = []
    for start in range(0, length, panel):
        part = slice(start, start + panel)
        y, state = _chunked(u[:, part], log_decay[:, part], B[:, part], C[:, part], state, chunk)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return skip_and_gate(y, x, D, z), state


def _chunked(u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Block decomposition of the semiseparable matrix (arXiv 2405.21060, section 6): all chunks at once, then a short
    loop that carries the state over the chunks."""
    batch, length, heads, width = u.shape
    groups, size = B.shape[2:]
    per_group = heads // groups
    padding = -length % chunk
    if padding:  # zero input and zero log-decay leave the state alone
        u = F.pad(u, (0, 0, 0, 0, 0, padding))
        log_decay = F.pad(log_decay, (0, 0, 0, padding))
        B = F.pad(B, (0, 0, 0, 0, 0, padding))
        C = F.pad(C, (0, 0, 0, 0, 0, padding))
    chunks = (length + padding) // chunk
    u = u.reshape(batch, chunks, chunk, heads, width).transpose(2, 3)  # (B, c, H, Q, P)
    log_decay = log_decay.reshape(batch, chunks, chunk, heads).transpose(2, 3)  # (B, c, H, Q)
    B = B.reshape(batch, chunks, chunk, groups, size).transpose(2, 3)  # (B, c, G, Q, N)
    C = C.reshape(batch, chunks, chunk, groups, size).transpose(2, 3)

    decay = decay_matrix(log_decay)  # (B, c, H, Q source, Q target)
    scores = (B @ C.transpose(-1, -2))[:, :, :, None]  # (B, c, G, 1, Q source, Q target)
    mix = (decay.unflatten(2, (groups, per_group)) * scores).flatten(2, 3)
    y = mix.transpose(-1, -2) @ u  # (B, c, H, Q, P), from inside the chunk

    to_end = decay[..., -1]  # (B, c, H, Q): decay from each token to the end of its chunk
    weighted = (u * to_end[..., None]).unflatten(2, (groups, per_group))  # (B, c, G, H/G, Q, P)
    inflow = (weighted.transpose(-1, -2) @ B[:, :, :, None]).flatten(2, 3)  # (B, c, H, P, N)

    from_start = log_decay.cumsum(-1).exp()  # (B, c, H, Q): decay from the chunk's start through each token
    whole = from_start[..., -1, None, None]  # (B, c, H, 1, 1)
    carried = []
    for index in range(chunks):
        carried.append(state)
        state = whole[:, index] * state + inflow[:, index]
    entering = torch.stack(carried, dim=1).unflatten(2, (groups, per_group))  # (B, c, G, H/G, P, N)
    read = (C[:, :, :, None] @ entering.transpose(-1, -2)).flatten(2, 3)  # (B, c, H, Q, P)
    y = y + read * from_start[..., None]
    y = y.transpose(2, 3).reshape(batch, chunks * chunk, heads, width)
    return (y[:, :length] if padding else y), state


def decay_matrix(log_decay: Tensor) -> Tensor:
    """(..., Q) to (..., Q source j, Q target i): exp of the sum of `log_decay` over k = j+1..i, 0 for i < j.

    Only the terms that count are added: a difference of two cumulative sums cancels when the decays are strong, and
    is NaN for a decay of -inf.
    """
    length = log_decay.shape[-1]
    return log_decay[..., None, :].expand(*log_decay.shape, length).triu(1).cumsum(-1).exp().triu()


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """`(y + D x) silu(z)` in the dtype of x."""
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D).to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)
