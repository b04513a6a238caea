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
import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan
from .ssd import ssd


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
    maps = []
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() not in (3, 4):
            raise ValueError(f"{name} must be (B, N, L) or (B, G, N, L), got shape {tuple(tensor.shape)}")
        grouped = tensor if tensor.dim() == 4 else tensor[:, None]
        maps.append(grouped.permute(0, 3, 1, 2))  # (B, L, G, N)
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
    """One token of a selective scan, of Mamba-1 or Mamba-2; `state` is updated in place.

    Mamba-2's tensors have a head axis, Mamba-1's have none.

    Args:
        state: (B, [H,] P, N) states; more rows than B with `state_batch_indices`.
        x: (B, [H,] P) inputs.
        dt: (B, [H,] P) step sizes.
        A: ([H,] P, N) decay rates, negative.
        B: (B, [G,] N) input maps.
        C: (B, [G,] N) output maps.
        D: ([H,] P) skip.
        z: (B, [H,] P) gate.
        dt_bias: ([H,] P) added to `dt`.
        dt_softplus: apply softplus to the step sizes.
        state_batch_indices: (B) row of `state` that belongs to each row of the batch.

    Returns:
        (B, [H,] P) outputs in the dtype of `x`.

    Raises:
        ValueError: if a shape does not fit.
    """
    heads = state.dim() == 4
    if state.dim() not in (3, 4):
        raise ValueError(f"state must be (B, P, N) or (B, H, P, N), got shape {tuple(state.shape)}")

    def with_heads(tensor: Tensor, dims: int, axis: int) -> Tensor:
        return tensor.unsqueeze(axis) if tensor.dim() == dims - 1 else tensor

    states = with_heads(state, 4, 1)
    rows = states if state_batch_indices is None else states[state_batch_indices.long()]
    batch, H, P, N = rows.shape
    inputs, steps, rates = with_heads(x, 3, 1), with_heads(dt, 3, 1), with_heads(A, 3, 0)
    B, C = with_heads(B, 3, 1), with_heads(C, 3, 1)
    for name, tensor, shape in (("x", inputs, (batch, H, P)), ("dt", steps, (batch, H, P)), ("A", rates, (H, P, N))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} with a head axis, got shape {tuple(tensor.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() != 3 or tensor.shape[::2] != (batch, N) or H % tensor.shape[1]:
            raise ValueError(
                f"{name} must be (B, G, N) = ({batch}, G, {N}) with G dividing {H}, got {tuple(tensor.shape)}"
            )
    steps = steps.float()
    if dt_bias is not None:
        steps = steps + with_heads(dt_bias, 2, 0).float()
    if dt_softplus:
        steps = F.softplus(steps)
    B = B.float().repeat_interleave(H // B.shape[1], dim=1)
    C = C.float().repeat_interleave(H // C.shape[1], dim=1)
    inputs = inputs.float()
    new = rows.float() * (steps[..., None] * rates.float()).exp() + (steps * inputs)[..., None] * B[:, :, None]
    if state_batch_indices is None:
        states.copy_(new)
    else:
        states[state_batch_indices.long()] = new.to(states.dtype)
    y = (new * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + with_heads(D, 2, 0).float() * inputs
    if z is not None:
        y = y * F.silu(with_heads(z, 3, 1).float())
    y = y.to(x.dtype)
    return y if heads or x.dim() == 3 else y[:, 0]


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
        conv_state_indices: (B) row of `conv_state` that belongs to each row of the batch.

    Returns:
        (B, D) or (B, D, L) outputs.

    Raises:
        ValueError: if a shape does not fit.
    """
    tokens = x[..., None] if x.dim() == 2 else x
    K, S = weight.shape[1], conv_state.shape[-1]
    if S < K - 1:
        raise ValueError(f"conv_state must hold at least K - 1 = {K - 1} inputs, got shape {tuple(conv_state.shape)}")
    rows = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
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
        conv_state[conv_state_indices.long()] = kept
    y = y.transpose(1, 2)
    return y[..., 0] if x.dim() == 2 else y


def _activation(activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return None if activation is None else "silu"
