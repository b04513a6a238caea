"""One token of the mixing of positions by Triton.

Symbols: B batch, K places of a history, H heads, P head width, N positions that there are weights for; S places of a
share, C features of a tile.

A step reads the inputs so far once and does two operations on each: it lasts as long as they take to arrive. A program
has a share of the places and a tile of features; where the places make more than one share, a second launch adds the
shares up. Which place is in which share depends on nothing else, so a result does not depend on the batch or on the
room of the cache. Shares behind a row's position leave at once, and positions are read by the device only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import INTERPRETED, tl, triton
from .triton_math import narrow

# (S, places at a time, C). 16 bytes a thread of bfloat16, in 8 rows of 16 threads; a share is what a program reads in
# the time that its launch takes, or so. Not timed on a device.
_TILES = (256, 32, 128)


def mix_step_triton(
    history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, residual: Tensor | None
) -> Tensor:
    """One token on checked arguments, without a gradient; none is copied, whatever its strides.

    Args:
        history: (B, K, H, P) inputs by place, not float64.
        weight: (H, N, N), or (H, N) by distance.
        bias: (H, N).
        positions: (B) place of the newest token; a negative one has none.
        residual: (B, H, P) that the result is added to.

    Returns:
        (B, H, P) in the dtype of `residual`, or of `history` if there is none.
    """
    B, K, H, P = history.shape
    limit = min(K, weight.shape[-1])
    y = torch.empty((B, H, P), dtype=history.dtype if residual is None else residual.dtype, device=history.device)
    share, rows, wide = _TILES
    C = min(wide, triton.next_power_of_2(P))
    shares = triton.cdiv(limit, share)
    partial = torch.empty((B, H, shares, P), dtype=torch.float32, device=history.device) if shares > 1 else None
    toeplitz = weight.dim() == 2
    epilogue = (
        *(bias, residual, y),
        *((0, 0) if bias is None else bias.stride()),
        *((0, 0, 0) if residual is None else residual.stride()),
    )
    if not B:
        return y
    with torch.cuda.device_of(history):
        _step_kernel[triton.cdiv(P, C), shares, B * H](
            history,
            weight,
            positions,
            partial,
            *epilogue,
            limit,
            H,
            *history.stride(),
            *(weight.stride() if not toeplitz else (weight.stride(0), 0, weight.stride(1))),
            positions.stride(0),
            WIDTH=P,
            TOEPLITZ=toeplitz,
            S=share,
            R=rows,
            C=C,
            EMULATE=INTERPRETED,
            num_warps=4,
        )
        if partial is not None:
            _sum_kernel[triton.cdiv(P, C), B * H](
                positions,
                partial,
                *epilogue,
                limit,
                H,
                shares,
                positions.stride(0),
                WIDTH=P,
                S=share,
                C=C,
                EMULATE=INTERPRETED,
                num_warps=4,
            )
    return y


@triton.jit
def _finish(
    y,
    position,
    bias_ptr,
    residual_ptr,
    y_ptr,
    bias_head,
    bias_place,
    residual_row,
    residual_head,
    residual_feature,
    limit,
    row,
    head,
    heads,
    feature,
    WIDTH: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add bias and residual and write; NaN for a position that there are no weights or no inputs for."""
    inside = feature < WIDTH
    if bias_ptr is not None:
        known = (position >= 0) & (position < limit)
        y += tl.load(bias_ptr + head * bias_head + position * bias_place, mask=known, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += row * residual_row + head * residual_head
        y += tl.load(residual_ptr + feature * residual_feature, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(position < limit, y, float("nan"))
    place = (row * heads + head) * WIDTH + feature
    tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty, EMULATE), mask=inside)


@triton.jit(do_not_specialize=["limit"])
def _step_kernel(
    history_ptr,
    weight_ptr,
    positions_ptr,
    partial_ptr,  # or None, as the next two
    bias_ptr,
    residual_ptr,
    y_ptr,
    bias_head,
    bias_place,
    residual_row,
    residual_head,
    residual_feature,
    limit,
    heads,
    history_row,
    history_place,
    history_head,
    history_feature,
    w_head,
    w_row,
    w_place,
    positions_row,
    WIDTH: tl.constexpr,
    TOEPLITZ: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """The sum of a share of the places; if there is only one, the result."""
    row = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    first = tl.program_id(1) * S
    position = tl.load(positions_ptr + row * positions_row).to(tl.int64)
    feature = tl.program_id(0) * C + tl.arange(0, C)
    last = tl.minimum(position, limit - 1).to(tl.int32)  # place
    r = tl.arange(0, R)
    history_ptr += row * history_row + head * history_head + first.to(tl.int64) * history_place
    offsets = r[:, None] * history_place + feature[None, :] * history_feature
    weight_ptr += head * w_head + last.to(tl.int64) * (w_place if TOEPLITZ else w_row)
    acc = tl.zeros((R, C), dtype=tl.float32)
    for at in range(first, tl.minimum(first + S, last + 1), R):
        place = at + r
        known = place <= last
        w = tl.load(weight_ptr + (-place if TOEPLITZ else place) * w_place, mask=known, other=0.0).to(tl.float32)
        x = tl.load(history_ptr + offsets, mask=known[:, None] & (feature < WIDTH)[None, :], other=0.0)
        acc += w[:, None] * x.to(tl.float32)
        history_ptr += R * history_place
    y = tl.sum(acc, 0)
    if partial_ptr is None:
        _finish(
            y,
            position,
            bias_ptr,
            residual_ptr,
            y_ptr,
            bias_head,
            bias_place,
            residual_row,
            residual_head,
            residual_feature,
            limit,
            row,
            head,
            heads,
            feature,
            WIDTH,
            EMULATE,
        )
    else:
        place = ((row * heads + head) * tl.num_programs(1) + tl.program_id(1)) * WIDTH + feature
        tl.store(partial_ptr + place, y, mask=feature < tl.where(first <= last, WIDTH, 0))


@triton.jit(do_not_specialize=["limit", "shares"])
def _sum_kernel(
    positions_ptr,
    partial_ptr,
    bias_ptr,  # or None, as the next one
    residual_ptr,
    y_ptr,
    bias_head,
    bias_place,
    residual_row,
    residual_head,
    residual_feature,
    limit,
    heads,
    shares,
    positions_row,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """The result, of the shares up to the position's."""
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    position = tl.load(positions_ptr + row * positions_row).to(tl.int64)
    feature = tl.program_id(0) * C + tl.arange(0, C)
    last = tl.minimum(position, limit - 1).to(tl.int32)
    partial_ptr += (row * heads + head) * shares * WIDTH + feature
    y = tl.zeros((C,), dtype=tl.float32)
    for share in range(tl.cdiv(last + 1, S)):
        y += tl.load(partial_ptr + share * WIDTH, mask=feature < WIDTH, other=0.0)
    _finish(
        y,
        position,
        bias_ptr,
        residual_ptr,
        y_ptr,
        bias_head,
        bias_place,
        residual_row,
        residual_head,
        residual_feature,
        limit,
        row,
        head,
        heads,
        feature,
        WIDTH,
        EMULATE,
    )
