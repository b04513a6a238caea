"""One token of a linear recurrence on a state that stays where it is: what the recurrences' steps share."""

from __future__ import annotations

import math

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
