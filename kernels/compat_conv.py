"""causal-conv1d 1.7's functions in its channel-first layout (B, D, L), built on :mod:`causal_conv1d`.

Symbols: B batch, L length, D channels, K convolution width, S places of a convolution state, T tokens of all sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .checks import check_cu_seqlens, check_devices, check_integers, check_optional, check_tensor
from .recurrence import write_rows
from .tracing import host_reads


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`~ssm_zoo.kernels.causal_conv1d.causal_conv1d` under causal-conv1d's name and channel-first layout.

    Args:
        x: (B, D, L) inputs, of any strides.
        weight: (D, K) taps.
        bias: (D) bias.
        seq_idx: (B, L) document index of each token, which must not decrease along a row; negative for padding, where
            the output is 0. Unlike in causal-conv1d, it may be combined with final states.
        initial_states: (B, D, K-1) inputs before the first token.
        return_final_states: also return the (B, D, K-1) last inputs.
        final_states_out: (B, D, K-1) output tensor for the final states, with `return_final_states`.
        activation: None, "silu" or "swish" (the same).

    Returns:
        (B, D, L) outputs, and the final states if requested, in the memory of `final_states_out` if it is given.

    Raises:
        ValueError: if an argument is invalid.
    """
    _check_tokens(x, 3, "(B, D, L)")
    check_tensor("weight", weight, (x.shape[1], None), "(D, K)")
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out must be None unless return_final_states=True, got a tensor")
    for name, states in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        check_optional(name, states, (x.shape[0], *weight[:, 1:].shape), "(B, D, K-1)")
    check_devices(x=x, initial_states=initial_states, final_states_out=final_states_out)
    result = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=convolution_activation(activation),
        initial_state=initial_states,
        seq_idx=seq_idx,
        return_final_state=return_final_states,
    )
    if isinstance(result, Tensor):
        return result.transpose(1, 2)
    y, final = result
    if final_states_out is not None:
        # A detached tensor takes the record of the gradient, so that a later call may write to the same memory.
        written = final_states_out.detach().copy_(final)
        final = written if written.requires_grad else final_states_out
    return y.transpose(1, 2), final


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve a few tokens and update `conv_state` in place, without a gradient.

    Args:
        x: (B, D) or (B, D, L) inputs.
        conv_state: (B, D, S) last inputs, S >= K - 1, newest last; a ring buffer with `cache_seqlens`; may have more
            rows than B with `conv_state_indices`.
        weight: (D, K) taps.
        bias: (D) bias.
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: (B) number of tokens seen before; the place in the ring buffer is this number modulo S.
        conv_state_indices: (B) row of `conv_state` for each row of the batch, negative for padding.

    Returns:
        (B, D) or (B, D, L) outputs, zero for padding.

    Raises:
        ValueError: if an argument is invalid.
    """
    _check_tokens(x, 2 if x.dim() == 2 else 3, "(B, D) or (B, D, L)")
    batch, channels = x.shape[:2]
    check_tensor("weight", weight, (channels, None), "(D, K)")
    rows = batch if conv_state_indices is None else None
    check_tensor("conv_state", conv_state, (rows, channels, None), "(B, D, S)")
    for name, indices in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if indices is not None:
            check_integers(name, indices, (batch,), "(B)")
    check_devices(x=x, conv_state=conv_state, weight=weight, bias=bias)
    check_devices(x=x, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    tokens = x[..., None] if x.dim() == 2 else x
    K, S = weight.shape[1], conv_state.shape[-1]
    if S < K - 1:
        raise ValueError(f"conv_state must hold at least K - 1 = {K - 1} inputs, got shape {tuple(conv_state.shape)}")
    rows = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long().clamp(min=0)]
    if cache_seqlens is None:
        before = rows[..., S - (K - 1) :]
        kept = torch.cat([rows, tokens.to(rows.dtype)], dim=-1)[..., -S:]
    else:
        seen = cache_seqlens.long()[:, None]
        last = (seen + torch.arange(1 - K, 0, device=x.device)) % S  # (B, K-1) places of the previous inputs
        before = rows.gather(2, last[:, None].expand(-1, rows.shape[1], -1))
        places = (seen + torch.arange(tokens.shape[-1], device=x.device)) % S
        new = tokens.to(rows.dtype)[..., -S:]  # if there are more tokens than places, keep the newest
        kept = rows.scatter(2, places[:, None, -S:].expand(-1, rows.shape[1], -1), new)
    activation = convolution_activation(activation)
    y = causal_conv1d(tokens.transpose(1, 2), weight, bias, activation=activation, initial_state=before.to(x.dtype))
    assert isinstance(y, Tensor)
    if conv_state_indices is None:
        conv_state.copy_(kept)
    else:
        write_rows(conv_state, conv_state_indices, kept)
        y = y.masked_fill((conv_state_indices < 0)[:, None, None], 0)
    y = y.transpose(1, 2)
    return y[..., 0] if x.dim() == 2 else y


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Return the convolution states (last inputs) of consecutive sequences.

    Unlike in causal-conv1d, gradients flow to `x`.

    Args:
        x: (T, D) inputs of all sequences.
        cu_seqlens: (B + 1) integer bounds of the B sequences, starting at 0, not decreasing; tokens after the last
            bound belong to no sequence. Their values are checked on the CPU only.
        state_len: S inputs per state.

    Returns:
        (B, D, S) states, newest last, zero before the start of a sequence.

    Raises:
        ValueError: if an argument is invalid.
    """
    check_tensor("x", x, (None, None), "(T, D)")
    check_devices(x=x, cu_seqlens=cu_seqlens)
    if host_reads(cu_seqlens):
        check_cu_seqlens(cu_seqlens, len(x))
    check_integers("cu_seqlens", cu_seqlens, (max(cu_seqlens.numel(), 1),), "(number of sequences + 1)")
    if state_len < 1:
        raise ValueError(f"state_len must be at least 1, got {state_len}")
    if len(x) == 0:
        return x.new_zeros(len(cu_seqlens) - 1, x.shape[1], state_len)
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    places = ends + torch.arange(-state_len, 0, device=x.device)  # (B, S)
    return x[places.clamp(min=0)].masked_fill((places < starts)[..., None], 0).transpose(1, 2)


def _check_tokens(x: Tensor, axes: int, symbols: str) -> None:
    """Check inputs with or without a third axis of tokens."""
    check_tensor("x", x, (None,) * axes, symbols)
    if axes == 3 and x.shape[2] == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")


def convolution_activation(activation: str | None) -> str | None:
    """Translate causal-conv1d's name of an activation into that of :func:`causal_conv1d`."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return None if activation is None else "silu"
