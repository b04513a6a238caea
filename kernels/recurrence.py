"""Parts that the linear recurrences share: documents and padding, step sizes, state update, skip and gate."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import host_reads


def documents(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, L) masks of the real tokens, and of the first tokens of each document but the first of a row."""
    document = seq_idx.cummax(dim=1).values
    before = F.pad(document[:, :-1], (1, 0), value=-1)
    return seq_idx >= 0, (document != before) & (before >= 0)


def blank_padding(seq_idx: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
    """Set padding tokens to zero, so that their values (e.g. NaN) affect neither states nor gradients.

    Outputs are zero there already; for them, it keeps gradients that arrive at padding from those of all else. Where
    reading would wait for a device, all is copied, whether there is padding or not.
    """
    if seq_idx is None:
        return tensors
    padding = seq_idx < 0
    if host_reads(padding) and not bool(padding.any()):
        return tensors
    return tuple(
        None if tensor is None else tensor.masked_fill(padding.view(*padding.shape, *[1] * (tensor.dim() - 2)), 0)
        for tensor in tensors
    )


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float] | None = None
) -> Tensor:
    """Apply bias, softplus and limits to raw step sizes, in the dtype of `dt`."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit is not None and (tuple(dt_limit) != (0.0, math.inf) or not dt_softplus):
        dt = dt.clamp(*dt_limit)
    return dt


def update_state(state: Tensor, decay: Tensor, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Update `state = decay state + u (x) B` in place and return `y = state C`.

    All rows of a group are multiplied by its maps in one matrix product, without repeating the maps. The products are
    in-place operations because autocast does not apply to those and so does not round their operands.

    Args:
        state: (B, H, P, N) or (B, D, N) states, of any strides.
        decay: factors of the state, broadcastable to it.
        u: (B, H, P) or (B, D) inputs, in the dtype of the state.
        B: (B, G, N) input maps; G divides H or D, and the heads or channels of a group are neighbours.
        C: (B, G, N) output maps.

    Returns:
        (B, H, P) or (B, D) outputs in the dtype of the state.
    """
    size, batches = state.shape[-1], B.shape[0] * B.shape[1]
    held = state.contiguous()
    held.mul_(decay)
    rows = math.prod(state.shape[1:-1]) // B.shape[1]  # of a group; -1 could not be inferred for an empty batch
    matrix = held.view(batches, rows, size)
    inputs = u.reshape(batches, rows, 1)
    matrix.baddbmm_(inputs, B.to(state.dtype).reshape(batches, 1, size))
    y = inputs.new_empty(inputs.shape).baddbmm_(matrix, C.to(state.dtype).reshape(batches, size, 1), beta=0)
    if held is not state:
        state.copy_(held)
    return y.view(u.shape)


def write_rows(states: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Write the (B, ...) `rows` to the given places of the (R, ...) `states`, skipping negative indices.

    This does not wait for the device: a padding row repeats the write of another row, and if all rows are padding, the
    first place is overwritten with its own content.
    """
    if len(indices) == 0:
        return
    real, places = indices >= 0, indices.long().clamp(min=0)
    rows = torch.where(real.view(-1, *[1] * (rows.dim() - 1)), rows, states[places])
    writer = torch.where(real, torch.arange(len(indices), device=indices.device), real.int().argmax())
    states[places[writer]] = rows[writer]


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return `(y + D x) silu(z)` in the dtype of x; D broadcasts to x."""
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)
