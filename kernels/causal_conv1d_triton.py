"""`causal_conv1d` and `causal_conv1d_step` by Triton: launches, tables of documents, and the gradient.

Symbols: B batch, L length, D channels, K convolution width; s_t the sum before the activation, ds its gradient.

A tap's source is an integer: a token's position in the row, or -1 ... -(K-1) for an entry of the initial state, -1
being its newest, or -K for nothing (a zero). Without documents tap j of token t has the source t - j. Packed and
padded rows look theirs up in a table of (B, L+1, K) int32, which is small beside x, so that one kernel serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import triton
from .causal_conv1d_triton_kernels import backward_kernel, final_state_kernel, forward_kernel, step_kernel

# The backward kernel evaluates K sums of K taps for a token, unrolled: 16 tiles for K = 4, 49 for K = 7.
WIDTHS = (2, 3, 4)

# (tokens, channels, warps) of a program. The K taps of a tile overlap and come from the L1 cache. Backward holds some
# ten float32 tiles at once: 8 elements of each per thread is what compiles without spilled registers for K = 4 with
# documents and an initial state (16 elements did not, Triton 3.9, sm_80 and sm_90). Its 64 tokens keep the partial
# sums of dweight at a sixth of the traffic of a bfloat16 x.
_FORWARD_TILE = (32, 64, 4)
_BACKWARD_TILE = (64, 32, 8)
# (channels, warps) where a program holds one K-wide window per channel.
_WINDOW_TILE = (128, 4)


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The outputs of `causal_conv1d` and its final state, None if not asked for. Arguments are checked there."""
    y, state = _CausalConv1d.apply(  # pyright: ignore[reportGeneralTypeIssues]
        x, weight, bias, initial_state, seq_idx, activation == "silu", return_final_state
    )
    return y, state


def causal_conv1d_step_triton(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """`causal_conv1d_step` in one launch, without a gradient. Waits for nothing, so a CUDA graph can hold it."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, channels = x.shape
    block, warps = _WINDOW_TILE
    with torch.cuda.device_of(x):
        step_kernel[(batch, triton.cdiv(channels, block))](
            x,
            state,
            weight,
            bias,
            y,
            channels,
            *x.stride(),
            *state.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            WIDTH=weight.shape[1],
            WINDOW=triton.next_power_of_2(weight.shape[1]),
            SILU=activation == "silu",
            BLOCK_D=block,
            num_warps=warps,
        )
    return y


class _CausalConv1d(torch.autograd.Function):
    """y_t = act(s_t),  s_t = bias + sum_j w_j x_{t-j}; x_{-1}, x_{-2}, ... are the initial state from its end.

    Backward, with ds_t = dy_t act'(s_t):  dx_t = sum_j w_j ds_{t+j} + what the final state passes on,
    dw_j = sum_{b,t} ds_t x_{t-j},  dbias = sum_{b,t} ds_t. An entry of the initial state is a token before the row.

    s is computed again, at each of the K tokens that a token reaches: only the arguments are kept, and memory is
    read and written once, against two passes more with ds in a buffer of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        silu: bool,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, channels = x.shape
        width = weight.shape[1]
        sources = None if seq_idx is None else _tap_sources(seq_idx, width)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = None
        with torch.cuda.device_of(x):
            tokens, block, warps = _FORWARD_TILE
            forward_kernel[(triton.cdiv(length, tokens), triton.cdiv(channels, block), batch)](
                x,
                weight,
                bias,
                initial_state,
                sources,
                y,
                length,
                channels,
                *x.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                *_strides(initial_state, 3),
                WIDTH=width,
                SILU=silu,
                BLOCK_L=tokens,
                BLOCK_D=block,
                num_warps=warps,
            )
            if return_final_state:
                state = x.new_empty(batch, channels, width - 1)
                block, warps = _WINDOW_TILE
                final_state_kernel[(batch, triton.cdiv(channels, block))](
                    x,
                    initial_state,
                    sources,
                    state,
                    length,
                    channels,
                    *x.stride(),
                    *_strides(initial_state, 3),
                    WIDTH=width,
                    WINDOW=triton.next_power_of_2(width),
                    BLOCK_D=block,
                    num_warps=warps,
                )
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx, sources)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dstate = gradients
        x, weight, bias, initial_state, seq_idx, sources = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_initial = ctx.needs_input_grad[:4]
        batch, length, channels = x.shape
        width = weight.shape[1]
        if dy is None:  # only the final state was used
            dy = x.new_zeros(()).expand(x.shape)
        targets = None if seq_idx is None else _tap_targets(seq_idx, width)
        tokens, block, warps = _BACKWARD_TILE
        halo = width - 1 if needs_initial else 0  # entries of the initial state go before the tokens
        blocks = triton.cdiv(length + halo, tokens)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dinitial = torch.empty_like(initial_state, memory_format=torch.contiguous_format) if needs_initial else None
        partial = None
        if needs_weight or needs_bias:
            partial = x.new_empty(batch * blocks, width + 1, channels, dtype=torch.float32)
        with torch.cuda.device_of(x):
            backward_kernel[(blocks, triton.cdiv(channels, block), batch)](
                x,
                weight,
                bias,
                initial_state,
                sources,
                targets,
                dy,
                dstate,
                dx,
                dinitial,
                partial,
                length,
                channels,
                *x.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                *_strides(initial_state, 3),
                *dy.stride(),
                *_strides(dstate, 3),
                WIDTH=width,
                HALO=halo,
                SILU=ctx.silu,
                BLOCK_L=tokens,
                BLOCK_D=block,
                num_warps=warps,
            )
        dweight = dbias = None
        if partial is not None:
            total = partial.sum(0)  # one order, whatever the order in which programs end
            if needs_weight:
                dweight = total[:width].t().to(weight.dtype)
            if needs_bias and bias is not None:
                dbias = total[width].to(bias.dtype)
        return dx, dweight, dbias, dinitial, None, None, None


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()


def _real_tokens_first(seq_idx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number the real tokens of each row, without waiting for the device.

    Returns:
        rank: (B, L) number of real tokens before each real token.
        count: (B, 1) number of real tokens.
        order: (B, L) positions of the real tokens, in order, then those of the padding.
        documents: (B, L) documents in that order.
    """
    real = seq_idx >= 0
    rank = real.cumsum(1) - 1
    count = rank[:, -1:] + 1
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(rank)
    place = torch.where(real, rank, count + position - rank - 1)  # a permutation of the row
    order = torch.empty_like(rank).scatter_(1, place, position)
    return rank, count, order, seq_idx.gather(1, order)


def _tap_sources(seq_idx: Tensor, width: int) -> Tensor:
    """(B, L+1, K) int32 source of tap j of every token (module docstring), -K throughout for padding.

    The last row is a token after the row, in the document of the row's last real token: its taps 1 ... K-1 are the
    final state from its end.
    """
    seq_idx = seq_idx.long()
    rank, count, order, documents = _real_tokens_first(seq_idx)
    last = documents.gather(1, (count - 1).clamp(min=0))
    own = torch.cat([seq_idx, last], dim=1)[..., None]
    real = torch.cat([seq_idx >= 0, torch.ones_like(last, dtype=torch.bool)], dim=1)[..., None]
    taps = torch.arange(width, device=seq_idx.device)
    source = torch.cat([rank, count], dim=1)[..., None] - taps  # as a rank
    # Before the first real token there is the initial state, which is of that token's document.
    nearest = source.clamp(0, seq_idx.shape[1] - 1).flatten(1)
    same = documents.gather(1, nearest).view_as(source) == own
    position = torch.where(source < 0, source, order.gather(1, nearest).view_as(source))
    return torch.where(real & same & (source < count[..., None]), position, -width).int()


def _tap_targets(seq_idx: Tensor, width: int) -> Tensor:
    """(B, K-1+L, K+1) int32 table of where each entry of the initial state, then each token, is read.

    Column j < K: the position of the token whose tap j it is, or -1. Column K: its place in the final state, or -1.
    """
    seq_idx = seq_idx.long()
    batch, length = seq_idx.shape
    gap = width - 1
    rank, count, order, documents = _real_tokens_first(seq_idx)
    before = torch.arange(-gap, 0, device=seq_idx.device).expand(batch, gap)
    ranks = torch.cat([before, rank], dim=1)
    own = torch.cat([documents[:, :1].expand(batch, gap), seq_idx], dim=1)
    real = torch.cat([torch.ones_like(before, dtype=torch.bool), seq_idx >= 0], dim=1)
    target = ranks[..., None] + torch.arange(width, device=seq_idx.device)  # as a rank
    nearest = target.clamp(0, length - 1).flatten(1)
    same = documents.gather(1, nearest).view_as(target) == own[..., None]
    inside = (target >= 0) & (target < count[..., None])
    tokens = torch.where(real[..., None] & same & inside, order.gather(1, nearest).view_as(target), -1)
    place = ranks - count + gap
    last = documents.gather(1, (count - 1).clamp(min=0))
    place = torch.where(real & (own == last) & (place >= 0), place, -1)
    return torch.cat([tokens, place[..., None]], dim=2).int()
