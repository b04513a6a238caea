"""The interfaces of mamba_ssm 2.3 and causal-conv1d 1.6 over this project's ops, so that their callers run on them.

Names, argument order, layouts, defaults and results are theirs (state-spaces/mamba@e9594ce, in `ops`
`triton/ssd_combined.py`, `selective_scan_interface.py` and `triton/selective_state_update.py`;
Dao-AILab/causal-conv1d@0d2252d, `causal_conv1d_interface.py`). What the ops add works here too: any channel count and
stride, packed rows together with initial and final states, CPU tensors. What they do not offer raises a ValueError that
names the argument.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, D channels, K convolution width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import check_devices, check_groups, check_integers, check_tensor
from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan, selective_scan_step
from .ssd import ssd
from .ssd_step import ssd_step


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`~ssm_zoo.kernels.ssd.ssd` under mamba_ssm's name.

    Args:
        x: (B, L, H, P) inputs.
        dt: (B, L, H) step sizes.
        A: (H) decay rates, negative.
        B: (B, L, G, N) input maps.
        C: (B, L, G, N) output maps.
        chunk_size: tokens of a chunk; changes rounding and speed only.
        D: (H) or (H, P) skip.
        z: (B, L, H, P) gate.
        dt_bias: (H) added to `dt`.
        initial_states: (B, H, P, N) states before the first token.
        seq_idx: (B, L) document index of each token.
        cu_seqlens: read by mamba_ssm with `return_varlen_states` only, and ignored otherwise, here as there.
        dt_softplus: apply softplus to the step sizes.
        dt_limit: range that the step sizes are clamped to.
        return_final_states: also return the (B, H, P, N) final states.
        return_varlen_states: not offered.
        state_dtype: dtype of the states between chunks; None or float32, since states are carried in float32.

    Returns:
        (B, L, H, P) outputs, and the final states if asked for.

    Raises:
        ValueError: if an argument does not fit or is not offered.
    """
    if return_varlen_states:
        raise ValueError("return_varlen_states=True is not offered; accepted: False")
    if state_dtype not in (None, torch.float32):
        raise ValueError(f"state_dtype must be None or torch.float32, got {state_dtype}")
    if initial_states is not None:  # checked here because the op has another name for it
        check_tensor("x", x, (None, None, None, None), "(B, L, H, P)")
        check_tensor("B", B, (None, None, None, None), "(B, L, G, N)")
        check_tensor("initial_states", initial_states, (x.shape[0], *x.shape[2:], B.shape[3]), "(B, H, P, N)")
        check_devices(x=x, initial_states=initial_states)
    return ssd(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_states,
        seq_idx=seq_idx,
        return_final_state=return_final_states,
        chunk_size=chunk_size,
    )


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`~ssm_zoo.kernels.selective_scan.selective_scan` under mamba_ssm's name and channel-first layout.

    Unlike there, gradients also flow from the last state.

    Args:
        u: (B, D, L) inputs.
        delta: (B, D, L) step sizes.
        A: (D, N) decay rates, real and negative.
        B: (B, N, L) or (B, G, N, L) input maps; maps that do not depend on the input, (D, N), are not offered.
        C: as `B`, output maps.
        D: (D) skip.
        z: (B, D, L) gate.
        delta_bias: (D) added to `delta`.
        delta_softplus: apply softplus to the step sizes.
        return_last_state: also return the (B, D, N) last state.

    Returns:
        (B, D, L) outputs, and the last state if asked for.

    Raises:
        ValueError: if an argument does not fit or is not offered.
    """
    if A.is_complex():
        raise ValueError("A must be real, got a complex tensor; complex state spaces are not offered")
    check_tensor("u", u, (None, None, None), "(B, D, L)")
    batch, channels, length = u.shape
    if length == 0:
        raise ValueError(f"u must hold at least one token, got shape {tuple(u.shape)}")
    check_tensor("delta", delta, tuple(u.shape), "(B, D, L)")
    check_tensor("A", A, (channels, None), "(D, N)")
    maps = []
    for name, tensor in (("B", B), ("C", C)):
        groups = (None,) if tensor.dim() == 4 else ()
        check_tensor(name, tensor, (batch, *groups, A.shape[1], length), "(B, N, L) or (B, G, N, L)")
        grouped = tensor if tensor.dim() == 4 else tensor[:, None]
        maps.append(grouped.permute(0, 3, 1, 2))  # (B, L, G, N)
    if z is not None:
        check_tensor("z", z, tuple(u.shape), "(B, D, L)")
    if delta_bias is not None:
        check_tensor("delta_bias", delta_bias, (channels,), "(D)")
    check_devices(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    result = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        *maps,
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        return_final_state=True,
    )
    y, state = result
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of a selective scan, of Mamba-1 or Mamba-2; `state` is updated in place. Without a gradient.

    Mamba-2's tensors have a head axis, Mamba-1's have none. Where step sizes, their bias and decay rates are expanded
    over P and N (stride 0), as Mamba-2's callers pass them, this is one
    :func:`~ssm_zoo.kernels.ssd_step.ssd_step`, otherwise one
    :func:`~ssm_zoo.kernels.selective_scan.selective_scan_step`.

    Args:
        state: (B, [H,] P, N) states, of any floating dtype: computed in float32 (float64 kept); more rows than B with
            `state_batch_indices`.
        x: (B, [H,] P) inputs.
        dt: (B, [H,] P) step sizes.
        A: ([H,] P, N) decay rates, negative.
        B: (B, [G,] N) input maps.
        C: (B, [G,] N) output maps.
        D: ([H,] P) skip.
        z: (B, [H,] P) gate.
        dt_bias: ([H,] P) added to `dt`.
        dt_softplus: apply softplus to the step sizes.
        state_batch_indices: (B) row of `state` that belongs to each row of the batch, negative for padding.

    Returns:
        (B, [H,] P) outputs in the dtype of `x`, zero for padding.

    Raises:
        ValueError: if a shape, dtype, device or group count does not fit.
    """

    def with_heads(name: str, tensor: Tensor, shape: tuple[int | None, ...], symbols: str) -> Tensor:
        """The tensor, checked and given the head or group axis, of size 1, that it may lack."""
        axis = int(symbols.startswith("(B"))
        lacks = tensor.dim() == len(shape) - 1 and shape[axis] in (None, 1)
        check_tensor(name, tensor, shape[:axis] + shape[axis + 1 :] if lacks else shape, symbols)
        return tensor.unsqueeze(axis) if lacks else tensor

    check_devices(
        x=x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state_batch_indices=state_batch_indices
    )
    states = with_heads("state", state, (None, None, None, None), "(B, [H,] P, N)")
    batch, H, P, N = states.shape
    inputs = with_heads("x", x, (batch if state_batch_indices is None else None, H, P), "(B, [H,] P)")
    batch = inputs.shape[0]
    steps = with_heads("dt", dt, (batch, H, P), "(B, [H,] P)")
    rates = with_heads("A", A, (H, P, N), "([H,] P, N)")
    B = with_heads("B", B, (batch, None, N), "(B, [G,] N)")
    check_groups("B", B.shape[1], H)
    C = with_heads("C", C, tuple(B.shape), "(B, [G,] N)")
    skip = None if D is None else with_heads("D", D, (H, P), "([H,] P)")
    gate = None if z is None else with_heads("z", z, (batch, H, P), "(B, [H,] P)")
    bias = None if dt_bias is None else with_heads("dt_bias", dt_bias, (H, P), "([H,] P)")
    held = states
    if state_batch_indices is not None:
        check_integers("state_batch_indices", state_batch_indices, (batch,), "(B)")
        held = states[state_batch_indices.long().clamp(min=0)]
    if state.dtype != torch.float64:
        held = held.float()
    if not any((steps.stride(2), *rates.stride()[1:], 0 if bias is None else bias.stride(1))):
        y = ssd_step(
            held,
            inputs,
            steps[..., 0],
            rates[:, 0, 0],
            B,
            C,
            D=skip,
            z=gate,
            dt_bias=None if bias is None else bias[:, 0],
            dt_softplus=dt_softplus,
            dt_limit=(-math.inf, math.inf),
        )
    else:
        held = held.contiguous()  # heads and their width become one axis of channels
        y = selective_scan_step(
            held.flatten(1, 2),
            inputs.flatten(1),
            steps.flatten(1),
            rates.flatten(0, 1),
            B,
            C,
            D=None if skip is None else skip.flatten(),
            z=None if gate is None else gate.flatten(1),
            dt_bias=None if bias is None else bias.flatten(),
            dt_softplus=dt_softplus,
        ).unflatten(1, (H, P))
    if state_batch_indices is not None:
        _write_rows(states, state_batch_indices, held.to(states.dtype))
        y = y.masked_fill((state_batch_indices < 0)[:, None, None], 0)
    elif held is not states:
        states.copy_(held)
    return y if state.dim() == 4 or x.dim() == 3 else y[:, 0]


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
    """:func:`~ssm_zoo.kernels.causal_conv1d.causal_conv1d` under causal-conv1d's name and channel-first layout.

    Args:
        x: (B, D, L) inputs, of any strides.
        weight: (D, K) taps.
        bias: (D) bias.
        seq_idx: (B, L) document index of each token; may stand beside initial and final states.
        initial_states: (B, D, K-1) inputs before the first token.
        return_final_states: also return the (B, D, K-1) last inputs.
        final_states_out: (B, D, K-1) tensor that the final states are written to.
        activation: None, "silu" or "swish", which is the same.

    Returns:
        (B, D, L) outputs, and the final states if asked for.

    Raises:
        ValueError: if an argument does not fit.
    """
    check_tensor("x", x, (None, None, None), "(B, D, L)")
    check_tensor("weight", weight, (x.shape[1], None), "(D, K)")
    for name, states in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if states is not None:
            check_tensor(name, states, (x.shape[0], *weight[:, 1:].shape), "(B, D, K-1)")
    check_devices(x=x, initial_states=initial_states, final_states_out=final_states_out)
    result = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=_activation(activation),
        initial_state=initial_states,
        seq_idx=seq_idx,
        return_final_state=True,
    )
    y, final = result
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return y, final


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """A few tokens of the short convolution; `conv_state` is updated in place.

    Args:
        x: (B, D) or (B, D, L) inputs.
        conv_state: (B, D, S) last inputs, S >= K - 1, newest last; a ring with `cache_seqlens`; more rows than B with
            `conv_state_indices`.
        weight: (D, K) taps.
        bias: (D) bias.
        activation: None, "silu" or "swish", which is the same.
        cache_seqlens: (B) tokens seen before, the place in the ring being their number modulo S.
        conv_state_indices: (B) row of `conv_state` that belongs to each row of the batch, negative for padding.

    Returns:
        (B, D) or (B, D, L) outputs, zero for padding.

    Raises:
        ValueError: if a shape does not fit.
    """
    check_tensor("x", x, (None,) * (2 if x.dim() == 2 else 3), "(B, D) or (B, D, L)")
    batch, channels = x.shape[:2]
    check_tensor("weight", weight, (channels, None), "(D, K)")
    rows = batch if conv_state_indices is None else None
    check_tensor("conv_state", conv_state, (rows, channels, None), "(B, D, S)")
    for name, indices in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if indices is not None:
            check_integers(name, indices, (batch,), "(B)")
    check_devices(
        x=x,
        conv_state=conv_state,
        weight=weight,
        bias=bias,
        cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )
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
        last = (seen + torch.arange(1 - K, 0, device=x.device)) % S  # (B, K-1) places of the last inputs
        before = rows.gather(2, last[:, None].expand(-1, rows.shape[1], -1))
        places = (seen + torch.arange(tokens.shape[-1], device=x.device)) % S
        new = tokens.to(rows.dtype)[..., -S:]  # of more tokens than places the newest stay
        kept = rows.scatter(2, places[:, None, -S:].expand(-1, rows.shape[1], -1), new)
    y = causal_conv1d(
        tokens.transpose(1, 2), weight, bias, activation=_activation(activation), initial_state=before.to(x.dtype)
    )
    assert isinstance(y, Tensor)
    if conv_state_indices is None:
        conv_state.copy_(kept)
    else:
        _write_rows(conv_state, conv_state_indices, kept)
        y = y.masked_fill((conv_state_indices < 0)[:, None, None], 0)
    y = y.transpose(1, 2)
    return y[..., 0] if x.dim() == 2 else y


def _write_rows(states: Tensor, indices: Tensor, rows: Tensor) -> None:
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


def _activation(activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return None if activation is None else "silu"
