"""What the mixing of positions (:mod:`masked_mix`, :mod:`toeplitz_mix`) shares: checks, documents, definition, step.

Symbols: B batch, L length, H heads, P head width, N positions that there are weights for; K places of a history. The
weights are (H, N, N) or, where they depend on the distance alone, (H, N); a "row" of them is what one position gives to
each position up to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import accumulator, check_devices, check_integers, check_seq_idx, check_tensor, documents
from .document_line import DocumentLines
from .tracing import host_reads


def check_mix(
    x: Tensor, weight: Tensor, shape: str, bias: Tensor | None, residual: Tensor | None, seq_idx: Tensor | None
) -> None:
    """Raise ValueError unless the arguments fit; `shape` is the one of `weight` in symbols."""
    check_tensor("x", x, (None,) * 4, "(B, L, H, P)")
    B, L, H, P = x.shape
    if not (L and H and P):
        raise ValueError(f"x must hold at least one token, one head and one feature, got shape {tuple(x.shape)}")
    N = _check_weights(weight, shape, bias, H)
    if residual is not None:
        check_tensor("residual", residual, (B, L, H, P), "(B, L, H, P)")
    check_devices(x=x, weight=weight, bias=bias, residual=residual, seq_idx=seq_idx)
    if seq_idx is not None:
        check_seq_idx(seq_idx, B, L)
    elif L > N:
        raise ValueError(f"weight must be {shape} with N >= L = {L} positions, got shape {tuple(weight.shape)}")


def check_mix_step(
    history: Tensor, weight: Tensor, shape: str, bias: Tensor | None, positions: Tensor, residual: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of a step fit; positions on a device are not looked at."""
    check_tensor("history", history, (None,) * 4, "(B, K, H, P)")
    B, K, H, P = history.shape
    if not (K and H and P):
        raise ValueError(
            f"history must hold at least one place, one head and one feature, got shape {tuple(history.shape)}"
        )
    N = _check_weights(weight, shape, bias, H)
    check_integers("positions", positions, (B,), "(B)")
    if residual is not None:
        check_tensor("residual", residual, (B, H, P), "(B, H, P)")
    check_devices(history=history, weight=weight, bias=bias, positions=positions, residual=residual)
    if host_reads(positions) and B and int(positions.max()) >= min(K, N):
        raise ValueError(
            f"positions must be below K = {K}, the places of history, and N = {N}, those of weight, "
            f"got {positions.tolist()}"
        )


def _check_weights(weight: Tensor, shape: str, bias: Tensor | None, heads: int) -> int:
    """Check weights and bias, and return N."""
    rank = shape.count(",") + 1
    N = weight.shape[-1] if weight.dim() == rank else None
    check_tensor("weight", weight, (heads, *[N] * (rank - 1)), shape)
    assert N is not None
    if bias is not None:
        check_tensor("bias", bias, (heads, N), "(H, N)")
    return N


def mix_by_document(
    mix: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    residual: Tensor | None,
    seq_idx: Tensor | None,
    positions: int,
) -> Tensor:
    """`mix(x, residual)` of every document by itself; ValueError if one is longer than `positions`."""
    if seq_idx is None:
        return mix(x, residual)
    lines = _lines(seq_idx, positions)
    if lines.whole:
        return mix(x, residual)
    if not lines.sizes:  # nothing but padding
        return x.masked_fill(~lines.real[..., None, None], 0) if residual is None else residual.clone()
    tables = lines.lay_out(x)
    if residual is None:
        return lines.gather_back([mix(table, None) for table in tables])
    streams = lines.lay_out(residual)
    y = lines.gather_back([mix(table, stream) for table, stream in zip(tables, streams, strict=True)])
    return y.where(lines.real[..., None, None], residual)


def mix_traced(
    entries: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """The mixture of every token in a traced graph (:mod:`tracing`): one product with an (L, L) matrix for each head,
    and with `seq_idx` for each row too.

    Args:
        entries: given (B or 1, L) targets and sources, returns the (H, B or 1, L, L) weights of their positions;
            what it returns for a source behind its target is not used.
    """
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
    matrix = entries(places, places).to(sums).masked_fill(~seen, 0)
    u = x.to(sums)
    if seq_idx is not None:
        u = u.masked_fill(~real[..., None, None], 0)
    with torch.autocast(x.device.type, enabled=False):
        y = (matrix.transpose(0, 1) @ u.transpose(1, 2)).transpose(1, 2)
    if bias is not None:
        y = y + bias.to(sums).T[places][..., None]
    if seq_idx is not None:
        y = y.masked_fill(~real[..., None, None], 0)
    return add_residual(y, x.dtype, residual)


def _lines(seq_idx: Tensor, positions: int) -> DocumentLines:
    lines = DocumentLines(seq_idx)
    if lines.longest > positions:
        raise ValueError(
            f"seq_idx must hold no document of more than N = {positions} tokens, got one of {lines.longest}"
        )
    return lines


def mix_reference(
    row_of: Callable[[Tensor, int], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """The definition: token by token. `row_of(weight, i)` are the (H, i + 1) weights of position i."""
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
            y = torch.einsum("hj,jhp->hp", row_of(weight, i), u[b, seen.to(x.device)])
            tokens.append(y if bias is None else y + bias[:, i, None])
        rows.append(torch.stack(tokens))
    return add_residual(torch.stack(rows) if rows else u, x.dtype, residual)


def mix_step(
    row_of: Callable[[Tensor, Tensor], Tensor],
    history: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    residual: Tensor | None,
    limit: int,
) -> Tensor:
    """The torch path of a step.

    Args:
        row_of: given (B, 1) positions and (K) places up to them, returns (B, H, K) weights; what it returns for a
            place behind the position is not used.
        limit: N.
    """
    sums, dtype = accumulator(history), history.dtype
    B, K, H, _ = history.shape
    positions = positions.long()
    longest = min(K, limit)
    if host_reads(positions):
        # What has been filled so far, which is short for most of a generation.
        longest = max(int(positions.max()) + 1, 1) if B else 1
    history = history[:, :longest].to(sums)
    place = torch.arange(longest, device=history.device)
    here = positions[:, None]
    hidden = place > here
    if not host_reads(positions) or bool(hidden.any()):
        # A slot that is still empty may hold anything, and zero times NaN is NaN.
        history = history.masked_fill(hidden[..., None, None], 0)
    weights = row_of(here.clamp(0, longest - 1), place).to(sums).masked_fill(hidden[:, None], 0)
    # By head: as one product the heads' strides would make it copy the history.
    with torch.autocast(history.device.type, enabled=False):
        y = torch.stack([torch.bmm(weights[:, h, None], history[:, :, h])[:, 0] for h in range(H)], dim=1)
    if bias is not None:
        y = y + bias.to(sums).T[positions.clamp(0, limit - 1), :, None]
    y = y.masked_fill((positions < 0)[:, None, None], 0)
    y = y.masked_fill((positions >= min(K, limit))[:, None, None], torch.nan)
    return add_residual(y, dtype, residual)


def add_residual(y: Tensor, dtype: torch.dtype, residual: Tensor | None) -> Tensor:
    """The sum in the dtype of `residual`, or y in `dtype` if there is none."""
    return y.to(dtype) if residual is None else (residual + y).to(residual.dtype)
