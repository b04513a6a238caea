"""Short causal depthwise convolution along the sequence, and its one-token update.

Symbols: B batch, L length, D channels, K convolution width.

    y_t = activation(bias + sum_{k=0}^{K-1} weight[:, k] * x_{t-K+1+k})

The last column of `weight` multiplies the current token. The K-1 inputs before the row are the `initial_state`, zero if
not given. Layout of states and order of taps are those of the causal-conv1d package (`causal_conv1d_fn`,
`causal_conv1d_update`), so states and weights are interchangeable with it. Sequences are (B, L, D), as in all ops of
this package.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .causal_conv1d_triton import WIDTHS, causal_conv1d_step_triton, causal_conv1d_triton
from .checks import (
    accumulator,
    check_devices,
    check_optional,
    check_seq_idx,
    check_tensor,
    choose_implementation,
    empty_batch,
    recorded,
)
from .tracing import tracing

# Elements per panel of the torch path, so that its inputs, outputs and gradients in float32 fit the L2 cache of a core.
_PANEL_ELEMENTS = 128 * 1024


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own K taps over the current and earlier tokens.

    Args:
        x: (B, L, D) inputs, floating point, L >= 1.
        weight: (D, K) taps, oldest first, K >= 2.
        bias: (D) bias, added before the activation.
        activation: None or "silu".
        initial_state: (B, D, K-1) inputs before the row, oldest first. They belong to the document of the row's first
            real token.
        seq_idx: (B, L) integer document of each token, non-decreasing along a row. Only tokens of the same document are
            combined. A negative entry marks padding, which is skipped and has the output 0.
        return_final_state: also return the last K-1 inputs.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support K > 4.

    Returns:
        (B, L, D) outputs in the dtype of `x`, accumulated in float32 (float64 for float64 inputs). With
        `return_final_state` also the (B, D, K-1) last real inputs of the row's last document, oldest first, in the
        dtype of `x`: zero before the start of that document, and the initial state for a row without real tokens.

    Raises:
        ValueError: if a shape, dtype, device, `activation` or `implementation` is invalid, or `seq_idx` decreases.
    """
    _check_sequence(x, weight, bias, activation, initial_state, seq_idx)
    B, L, D = x.shape
    width = weight.shape[1]
    implementation = choose_implementation(implementation, "causal_conv1d", x, width in WIDTHS, traceable=True)
    if B == 0:
        inputs = (x, weight, bias, initial_state)
        y = empty_batch((B, L, D), x.dtype, *inputs)
        return (y, empty_batch((B, D, width - 1), x.dtype, *inputs)) if return_final_state else y
    if implementation == "triton":
        y, state = causal_conv1d_triton(x, weight, bias, activation, initial_state, seq_idx, return_final_state)
        return y if state is None else (y, state)
    if tracing():
        y, state = convolve_traced(x, weight, bias, activation, initial_state, seq_idx)
        return (y, state) if return_final_state else y
    dtype = accumulator(x)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    history = None if initial_state is None else initial_state.transpose(1, 2)  # (B, K-1, D)

    if seq_idx is None:
        past = None if history is None else history.to(dtype)
        y = _depthwise(x, weight, bias, past, activation)
        if not return_final_state:
            return y
        past = x.new_zeros(B, width - 1, D) if history is None else history.to(x.dtype)
        return y, _as_state(torch.cat([past, x[:, -(width - 1) :]], dim=1)[:, -(width - 1) :])

    tokens, slots, first_slots, last_slots, length = _lay_out_documents(seq_idx, width)
    inputs = x.reshape(-1, D)
    padded = tokens.numel() < B * L
    if padded:
        inputs = inputs.index_select(0, tokens)
    line = x.new_zeros(length, D).index_copy_(0, slots, inputs)
    if history is not None:
        line.index_copy_(0, first_slots.flatten(), history.reshape(-1, D).to(x.dtype))
    y = _depthwise(line[None], weight, bias, None, activation)[0].index_select(0, slots)
    if padded:
        y = x.new_zeros(B * L, D).index_copy_(0, tokens, y)
    y = y.view(B, L, D)
    return (y, _as_state(line[last_slots])) if return_final_state else y


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Convolve one token and shift it into the state.

    Args:
        x: (B, D) inputs of the token.
        state: (B, D, K-1) inputs before it, oldest first; **updated in place**.
        weight: (D, K) taps, oldest first, K >= 2.
        bias: (D) bias, added before the activation.
        activation: None or "silu".
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support K > 4 or calls that
            autograd records.

    Returns:
        (B, D) outputs in the dtype of `x`.

    Raises:
        ValueError: if a shape, dtype, device, `activation` or `implementation` is invalid.
    """
    _check_parameters(weight, bias, activation)
    check_tensor("x", x, (None, weight.shape[0]), "(B, D)")
    check_tensor("state", state, (x.shape[0], *weight[:, 1:].shape), "(B, D, K-1)")
    check_devices(x=x, state=state, weight=weight, bias=bias)
    served = weight.shape[1] in WIDTHS and not recorded(x, state, weight, bias)  # the kernel has no backward
    if choose_implementation(implementation, "causal_conv1d_step", x, served, traceable=True) == "triton":
        return causal_conv1d_step_triton(x, state, weight, bias, activation)
    dtype = accumulator(x)
    window = torch.cat([state.to(dtype), x.to(dtype).unsqueeze(-1)], dim=-1)  # (B, D, K)
    y = (window * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    state.copy_(window[..., 1:])
    return _activate(y, activation).to(x.dtype)


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `causal_conv1d` by its definition, row by row, token by token and tap by tap, with the same arguments."""
    _check_sequence(x, weight, bias, activation, initial_state, seq_idx)
    B, L, D = x.shape
    width = weight.shape[1]
    dtype = accumulator(x)
    inputs, taps = x.to(dtype), weight.to(dtype)
    zero = inputs.new_zeros(D)
    offset = zero if bias is None else bias.to(dtype)
    past = inputs.new_zeros(B, D, width - 1) if initial_state is None else initial_state.to(dtype)
    rows, states = [], []
    for b in range(B):
        window = list(past[b].unbind(-1))  # the last K-1 inputs
        outputs, document = [], None
        for t in range(L):
            token_document = 0 if seq_idx is None else int(seq_idx[b, t])
            if token_document < 0:
                outputs.append(zero)
                continue
            if document is not None and token_document != document:
                window = [zero] * (width - 1)
            document = token_document
            window = [*window, inputs[b, t]]
            y = offset
            for k in range(width):
                y = y + taps[:, k] * window[k]
            outputs.append(_activate(y, activation))
            window = window[1:]
        rows.append(torch.stack(outputs))
        states.append(torch.stack(window, dim=-1))
    if B == 0:  # nothing to stack
        y, final = x.new_empty(x.shape), x.new_empty(past.shape)
    else:
        y, final = torch.stack(rows).to(x.dtype), torch.stack(states).to(x.dtype)
    return (y, final) if return_final_state else y


class _DepthwiseConv(torch.autograd.Function):
    """The torch convolution: y_t = silu(p_t) or p_t with p_t = bias + sum_j w_j x_{t-j}.

    x_{-1}, x_{-2}, ... are the rows of `history` in reverse order.

    Backward, with dp_t = dy_t silu'(p_t):  dx_t = sum_j w_j dp_{t+j},  dw_j = sum_{b,t} dp_t x_{t-j},
    dbias = sum_{b,t} dp_t.  Only the inputs are saved; the backward recomputes p.

    `F.conv1d(groups=D)` is not used because it needs the layout (B, D, L) and has a slow backward. Here K multiply-adds
    accumulate in place, without padded or transposed copies, on panels of tokens that fit the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, activation: str | None
    ) -> Tensor:
        taps = weight.flip(1).t().contiguous()  # (K, D), taps[j] multiplies the input j tokens back
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for start, stop in _panels(x, taps):
            part = y[:, start:stop]
            if y.dtype == taps.dtype:
                _convolve(x, taps, bias, history, start, stop, part)
                if activation is not None:
                    F.silu(part, inplace=True)
            else:
                part.copy_(_activate(_convolve(x, taps, bias, history, start, stop), activation))
        ctx.save_for_backward(x, taps, bias, history)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, taps, bias, history = ctx.saved_tensors
        width, L = taps.shape[0], x.shape[1]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dtaps = torch.zeros_like(taps)
        dbias = torch.zeros_like(taps[0])
        dhistory = None if history is None else torch.zeros_like(history)
        after = dy.new_zeros(x.shape[0], 0, x.shape[2], dtype=taps.dtype)  # dp of up to K - 1 following tokens
        for start, stop in reversed(_panels(x, taps)):
            dp = dy[:, start:stop].to(taps.dtype)
            if ctx.activation is not None:
                dp = torch.ops.aten.silu_backward(dp, _convolve(x, taps, bias, history, start, stop))
            inputs = x[:, max(start - width + 1, 0) : stop].to(taps.dtype)
            behind = inputs.shape[1] - (stop - start)  # number of inputs before the panel
            dx_part = dp * taps[0]
            for j in range(1, width):
                dx_part[:, : max(stop - start - j, 0)].addcmul_(dp[:, j:], taps[j])
                reach = min(j, after.shape[1])
                first = stop - start - j  # first token that contributes beyond the panel
                dx_part[:, max(first, 0) : max(first, 0) + reach].addcmul_(after[:, :reach], taps[j])
            dx[:, start:stop] = dx_part
            product = torch.empty_like(dp)
            for j in range(min(width, stop)):
                low = max(j - behind, 0)  # first token of the panel whose input j tokens back is in the row
                torch.mul(dp[:, low:], inputs[:, low + behind - j : inputs.shape[1] - j], out=product[:, low:])
                dtaps[j] += product[:, low:].sum((0, 1))
            dbias += dp.sum((0, 1))
            if history is not None and dhistory is not None and start == 0:
                for j in range(1, width):
                    reach, at = min(j, L), width - 1 - j
                    dtaps[j] += (dp[:, :reach] * history[:, at : at + reach]).sum((0, 1))
                    dhistory[:, at : at + reach].addcmul_(dp[:, :reach], taps[j])
            after = dp[:, : width - 1]
        return dx, dtaps.t().flip(1), None if bias is None else dbias, dhistory, None


def _panels(x: Tensor, taps: Tensor) -> list[tuple[int, int]]:
    """Return ranges of tokens that fit the L2 cache of a core and hold at least K - 1 tokens."""
    batch, length, channels = x.shape
    tokens = max(_PANEL_ELEMENTS // max(batch * channels, 1), taps.shape[0] - 1)
    return [(start, min(start + tokens, length)) for start in range(0, length, tokens)]


def _convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    start: int,
    stop: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return the (B, stop - start, D) convolution of the tokens from `start` to `stop - 1`, without activation."""
    behind = min(start, taps.shape[0] - 1)
    inputs = x[:, start - behind : stop].to(taps.dtype)
    now = inputs[:, behind:]
    y = torch.mul(now, taps[0], out=out) if bias is None else torch.addcmul(bias, now, taps[0], out=out)
    for j in range(1, taps.shape[0]):
        low = max(j - behind, 0)  # first token whose input j tokens back is in the row
        y[:, low:].addcmul_(inputs[:, low + behind - j : max(inputs.shape[1] - j, 0)], taps[j])
        if history is not None and start == 0:
            reach, at = min(j, stop), taps.shape[0] - 1 - j  # tokens that read from before the row
            y[:, :reach].addcmul_(history[:, at : at + reach], taps[j])
    return y


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, activation: str | None
) -> Tensor:
    """Return the (B, L, D) convolution in the dtype of x, computed in the dtype of the other tensors."""
    y = _DepthwiseConv.apply(x, weight, bias, history, activation)
    assert isinstance(y, Tensor)  # `apply` is untyped
    return y


def _lay_out_documents(seq_idx: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Lay out all real tokens on one line, each document after K-1 slots for the inputs before it.

    On that line no window of K tokens covers two documents or padding, so that packed and padded rows need no masks: a
    single plain convolution suffices. The cost is one gather, one scatter and K-1 slots per document.

    Returns:
        tokens: (T) positions of the T real tokens in the flattened (B L) rows.
        slots: (T) slots of these tokens on the line.
        first_slots: (B, K-1) slots before the row's first document, for the initial state. A row without real tokens
            has only these.
        last_slots: (B, K-1) last K-1 slots of the row, which hold its final state.
        length: number of slots.
    """
    B, L = seq_idx.shape
    rows, positions = (seq_idx >= 0).nonzero(as_tuple=True)
    documents = seq_idx[rows, positions]
    opens = torch.zeros_like(rows)  # 1 at the first token of a row's second, third, ... document
    opens[1:] = (rows[1:] == rows[:-1]) & (documents[1:] != documents[:-1])
    gap = width - 1
    slots = torch.arange(rows.numel(), device=rows.device) + gap * (rows + 1 + opens.cumsum(0))
    # A row takes one slot per token, a first gap, and a gap for every further document.
    sizes = torch.full((B,), gap, device=rows.device).index_add_(0, rows, 1 + gap * opens)
    ends = sizes.cumsum(0)[:, None]
    offsets = torch.arange(gap, device=rows.device)
    length = rows.numel() + gap * (B + int(opens.sum()))
    return rows * L + positions, slots, ends - sizes[:, None] + offsets, ends - gap + offsets, length


def _as_state(inputs: Tensor) -> Tensor:
    """Return (B, K-1, D) inputs as a (B, D, K-1) state that shares no memory with them."""
    return inputs.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def _check_parameters(weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensor("weight", weight, (None, None), "(D, K)")
    if weight.shape[1] < 2:
        raise ValueError(f"weight must be (D, K) with K >= 2 taps, got shape {tuple(weight.shape)}")
    check_optional("bias", bias, (weight.shape[0],), "(D)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")


def _check_sequence(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    _check_parameters(weight, bias, activation)
    check_tensor("x", x, (None, None, weight.shape[0]), "(B, L, D)")
    B, L, _ = x.shape
    if L == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    check_optional("initial_state", initial_state, (B, *weight[:, 1:].shape), "(B, D, K-1)")
    check_devices(x=x, weight=weight, bias=bias, initial_state=initial_state, seq_idx=seq_idx)
    check_seq_idx(seq_idx, B, L)


def convolve_traced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return outputs and final state in a traced graph, with the arguments of `causal_conv1d`.

    The real tokens of a row are moved to its left, so that the window of each is the K places up to it. Tokens of other
    documents count as zero.
    """
    batch, length, channels = x.shape
    reach = weight.shape[1] - 1
    past = x.new_zeros(batch, reach, channels) if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    if seq_idx is None:
        line = torch.cat([past, x], dim=1)
        return _convolve_line(line, None, length, weight, bias, activation), _as_state(line[:, length:])
    real = seq_idx >= 0
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)  # columns of real tokens, then of padding
    inputs = x.masked_fill(~real[..., None], 0).gather(1, order[..., None].expand(-1, -1, channels))
    document = seq_idx.long().gather(1, order)
    document = torch.cat([document[:, :1].expand(-1, reach), document], dim=1)
    line = torch.cat([past, inputs], dim=1)  # (B, K-1+L, D)
    y = _convolve_line(line, document, length, weight, bias, activation)
    rank = (real.cumsum(1) - 1).clamp(min=0)
    y = y.gather(1, rank[..., None].expand(-1, -1, channels)).masked_fill(~real[..., None], 0)
    place = real.sum(1, keepdim=True) + torch.arange(reach, device=x.device)  # places of the last real tokens
    kept = document.gather(1, place)
    state = line.gather(1, place[..., None].expand(-1, -1, channels))
    return y, _as_state(state.where((kept == kept[:, -1:])[..., None], 0))


def _convolve_line(
    line: Tensor,
    document: Tensor | None,
    length: int,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Convolve a (B, K-1+L, D) line whose places belong to the (B, K-1+L) documents; returns (B, L, D)."""
    reach, sums = weight.shape[1] - 1, accumulator(line)
    taps = weight.to(sums)
    y = line[:, reach : reach + length].to(sums) * taps[:, reach]
    for k in range(reach):
        part = line[:, k : k + length].to(sums)
        if document is not None:
            own = document[:, k : k + length] == document[:, reach : reach + length]
            part = part.where(own[..., None], 0)
        y = y + part * taps[:, k]
    if bias is not None:
        y = y + bias.to(sums)
    return _activate(y, activation).to(line.dtype)
