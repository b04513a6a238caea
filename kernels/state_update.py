"""One token of a linear recurrence on a state that stays where it is: what the recurrences' steps share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def update_state(state: Tensor, decay: Tensor, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`state = decay state + u (x) B` in place, `y = state C`.

    All rows of a group meet its maps in one matrix product, and maps of one group are not repeated for its rows.
    Products are written in place because autocast, which would round their operands, leaves such operations alone.

    Args:
        state: (B, ..., N) rows of states, of any strides: (B, H, P, N) heads of some width, or (B, D, N) channels.
        decay: factors of the state, broadcastable to it.
        u: (B, ...) inputs, in the dtype of the state.
        B: (B, G, N) input maps; G divides the first size between, and the rows of a group follow each other.
        C: (B, G, N) output maps.

    Returns:
        (B, ...) outputs in the dtype of the state.
    """
    size, batches = state.shape[-1], B.shape[0] * B.shape[1]
    held = state.contiguous()
    held.mul_(decay)
    rows = math.prod(state.shape[1:-1]) // B.shape[1]  # of a group; an empty batch leaves no -1 to infer
    matrix = held.view(batches, rows, size)
    inputs = u.reshape(batches, rows, 1)
    matrix.baddbmm_(inputs, B.to(state.dtype).reshape(batches, 1, size))
    y = inputs.new_empty(inputs.shape).baddbmm_(matrix, C.to(state.dtype).reshape(batches, size, 1), beta=0)
    if held is not state:
        state.copy_(held)
    return y.view(u.shape)


def write_rows(states: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Write each of the (B, ...) `rows` to its place in (R, ...) `states`, those of a negative index nowhere.

    Nothing waits for the device: a row of padding repeats the write of another row, and where all are padding, the
    first place is written with what it holds.
    """
    if len(indices) == 0:
        return
    real, places = indices >= 0, indices.long().clamp(min=0)
    rows = torch.where(real.view(-1, *[1] * (rows.dim() - 1)), rows, states[places])
    writer = torch.where(real, torch.arange(len(indices), device=indices.device), real.int().argmax())
    states[places[writer]] = rows[writer]
