"""mamba_ssm 2.3's functions for Mamba-2 (`ops.triton.ssd_combined`), built on :mod:`ssd`.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, K convolution width, M width of the gated MLP
parallel to the scan, S sequences, O outputs.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .checks import (
    accumulator,
    check_cu_seqlens,
    check_devices,
    check_optional,
    check_projection,
    check_seq_idx,
    check_tensor,
    without_autocast,
)
from .compat_conv import convolution_activation
from .recurrence import blank_padding, step_sizes
from .rms_norm import rms_norm
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
) -> Tensor | tuple[Tensor, ...]:
    """Run :func:`~ssm_zoo.kernels.ssd.ssd` under mamba_ssm's name.

    Args:
        x: (B, L, H, P) inputs.
        dt: (B, L, H) step sizes.
        A: (H) decay rates, negative.
        B: (B, L, G, N) input maps.
        C: (B, L, G, N) output maps.
        chunk_size: tokens per chunk; affects rounding and speed only.
        D: (H) or (H, P) skip.
        z: (B, L, H, P) gate.
        dt_bias: (H) added to `dt`.
        initial_states: (B, H, P, N) states before the first token. They belong to the document of the first real token,
            which must have index 0 in mamba_ssm.
        seq_idx: (B, L) document index of each token, which must not decrease along a row; negative for padding, which
            is skipped.
        cu_seqlens: (S + 1) integer bounds of the sequences of a single row, starting at 0; tokens after the last bound
            belong to no sequence. Only `seq_idx` separates the sequences: it must agree with the bounds and is required
            if there are several sequences.
        dt_softplus: apply softplus to the step sizes.
        dt_limit: range to which the step sizes are clamped.
        return_final_states: also return the (B, H, P, N) final states.
        return_varlen_states: also return the (S, H, P, N) final states of the sequences of `cu_seqlens`. Unlike in
            mamba_ssm, gradients flow from them.
        state_dtype: dtype of the states between chunks: None or float32, in which states are carried.

    Returns:
        (B, L, H, P) outputs; then, if requested, the final states and the states of the sequences.

    Raises:
        ValueError: if an argument is invalid or unsupported.
    """
    _check_state_dtype(state_dtype)
    check_tensor("x", x, (None, None, None, None), "(B, L, H, P)")
    check_tensor("B", B, (None, None, None, None), "(B, L, G, N)")
    if initial_states is not None:  # checked here because the op calls it `initial_state`
        check_tensor("initial_states", initial_states, (x.shape[0], *x.shape[2:], B.shape[3]), "(B, H, P, N)")
        check_devices(x=x, initial_states=initial_states)
    bounds = None
    if cu_seqlens is not None:
        check_devices(x=x, cu_seqlens=cu_seqlens, seq_idx=seq_idx)
        bounds = _sequences(cu_seqlens, seq_idx, x.shape[0], x.shape[1])
    elif return_varlen_states:
        raise ValueError("cu_seqlens must be given with return_varlen_states=True, got None")
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk_size": chunk_size}
    options |= {"initial_state": initial_states, "seq_idx": seq_idx, "return_final_state": return_final_states}
    result = ssd(x, dt, A, B, C, D=D, z=z, **options)
    if bounds is None or not return_varlen_states:
        return result
    steps = step_sizes(dt[0].to(accumulator(x)), dt_bias, dt_softplus, dt_limit)  # (L, H)
    states = _sequence_states(x[0], steps, A, B[0], initial_states, bounds)
    return (result, states) if isinstance(result, Tensor) else (*result, states)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a Mamba-2 layer after its input projection: convolution, scan, gated norm, output projection.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H) projected inputs: MLP gate and MLP input, gate, convolved channels (scan
            inputs, input maps, output maps), step sizes. M, the width of the MLP, is the remainder and usually 0.
        conv1d_weight: (H P + 2 G N, K) taps.
        conv1d_bias: (H P + 2 G N) bias.
        dt_bias: (H) added to the step sizes before softplus.
        A: (H) decay rates, negative.
        D: (H) or (H, P) skip.
        chunk_size: tokens per chunk; affects rounding and speed only.
        initial_states: (B, H, P, N) states before the first token. The convolution always starts from zeros.
        seq_idx: (B, L) document index of each token, as in :func:`mamba_chunk_scan_combined`. The output at padding is
            zero, or the bias of the output projection.
        dt_limit: range to which the step sizes are clamped, after softplus.
        return_final_states: also return the (B, H, P, N) final states.
        activation: activation of the convolution: None, "silu" or "swish" (the same).
        rmsnorm_weight: (H P) scale of the gated norm over the channels of each group. Without it, outputs of the scan
            are gated but not normalised.
        rmsnorm_eps: added to the mean square.
        outproj_weight: (O, M + H P) output projection. Without it, its inputs are returned.
        outproj_bias: (O) bias of the output projection.
        headdim: P, required if `D` is (H).
        ngroups: G.
        norm_before_gate: apply the norm before the gate instead of after it.
        state_dtype: None or float32, as in :func:`mamba_chunk_scan_combined`.

    Returns:
        (B, L, O) outputs, or (B, L, M + H P) without the output projection; and the final states if requested.

    Raises:
        ValueError: if an argument is invalid or unsupported.
    """
    _check_state_dtype(state_dtype)
    check_tensor("zxbcdt", zxbcdt, (None, None, None), "(B, L, 2 M + 2 H P + 2 G N + H)")
    if zxbcdt.shape[1] == 0:
        raise ValueError(f"zxbcdt must hold at least one token, got shape {tuple(zxbcdt.shape)}")
    check_tensor("D", D, (None,) * (1 if D.dim() == 1 else 2), "(H) or (H, P)")
    heads = D.shape[0]
    if D.dim() == 1:
        if headdim is None or headdim < 1:
            raise ValueError(f"headdim must be given, and at least 1, if D is (H), got {headdim}")
    elif headdim not in (None, D.shape[1]):
        raise ValueError(f"headdim must be None or the width of D, {D.shape[1]}, got {headdim}")
    width = D.shape[1] if headdim is None else headdim
    inner = heads * width
    if ngroups < 1 or heads % ngroups:
        raise ValueError(f"ngroups must be a positive divisor of the {heads} heads of D, got {ngroups}")
    check_tensor("conv1d_weight", conv1d_weight, (None, None), "(H P + 2 G N, K)")
    channels = conv1d_weight.shape[0]
    size = (channels - inner) // (2 * ngroups)
    if size < 1 or channels != inner + 2 * ngroups * size:
        raise ValueError(
            f"conv1d_weight must be (H P + 2 G N, K) with H P = {inner}, G = {ngroups} and N >= 1, got shape "
            f"{tuple(conv1d_weight.shape)}"
        )
    beside = (zxbcdt.shape[2] - inner - channels - heads) // 2
    if beside < 0 or zxbcdt.shape[2] != 2 * beside + inner + channels + heads:
        raise ValueError(
            f"zxbcdt must be (B, L, 2 M + 2 H P + 2 G N + H) with 2 H P + 2 G N + H = {inner + channels + heads} and "
            f"M >= 0, got shape {tuple(zxbcdt.shape)}"
        )
    check_optional("conv1d_bias", conv1d_bias, (channels,), "(H P + 2 G N)")
    check_optional("rmsnorm_weight", rmsnorm_weight, (inner,), "(H P)")
    check_optional("initial_states", initial_states, (len(zxbcdt), heads, width, size), "(B, H, P, N)")
    if outproj_weight is not None:
        check_projection("outproj_weight", outproj_weight, (None, beside + inner), "(O, M + H P)", zxbcdt=zxbcdt)
    if outproj_bias is not None:
        if outproj_weight is None:
            raise ValueError("outproj_bias must be None if outproj_weight is None, got a tensor")
        check_tensor("outproj_bias", outproj_bias, (outproj_weight.shape[0],), "(O)")
    check_devices(zxbcdt=zxbcdt, conv1d_weight=conv1d_weight, conv1d_bias=conv1d_bias, dt_bias=dt_bias, A=A, D=D)
    check_devices(zxbcdt=zxbcdt, initial_states=initial_states, seq_idx=seq_idx, rmsnorm_weight=rmsnorm_weight)
    check_devices(zxbcdt=zxbcdt, outproj_weight=outproj_weight, outproj_bias=outproj_bias)
    check_seq_idx(seq_idx, *zxbcdt.shape[:2])
    (zxbcdt,) = blank_padding(seq_idx, zxbcdt)
    mlp_gate, mlp, z, convolved, dt = zxbcdt.split([beside, beside, inner, channels, heads], dim=-1)
    convolved = causal_conv1d(
        convolved, conv1d_weight, conv1d_bias, activation=convolution_activation(activation), seq_idx=seq_idx
    )
    assert isinstance(convolved, Tensor)
    x, B, C = convolved.split([inner, ngroups * size, ngroups * size], dim=-1)
    x, gate = (each.unflatten(-1, (heads, width)) for each in (x, z))
    B, C = (each.unflatten(-1, (ngroups, size)) for each in (B, C))
    options = {"dt_bias": dt_bias, "dt_softplus": True, "dt_limit": dt_limit, "chunk_size": chunk_size}
    options |= {"initial_state": initial_states, "seq_idx": seq_idx, "return_final_state": True}
    y, final = ssd(x, dt, A, B, C, D=D, z=gate if rmsnorm_weight is None else None, **options)
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        group_size = inner // ngroups
        y = rms_norm(y, rmsnorm_weight, rmsnorm_eps, z=z, group_size=group_size, norm_before_gate=norm_before_gate)
    if beside:
        sums = accumulator(mlp)
        y = torch.cat([(F.silu(mlp_gate.to(sums)) * mlp.to(sums)).to(y.dtype), y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, None if outproj_bias is None else outproj_bias.to(outproj_weight.dtype))
    return (y, final) if return_final_states else y


def _check_state_dtype(state_dtype: torch.dtype | None) -> None:
    if state_dtype not in (None, torch.float32):
        raise ValueError(f"state_dtype must be None or torch.float32, got {state_dtype}")


def _sequences(cu_seqlens: Tensor, seq_idx: Tensor | None, batch: int, length: int) -> list[int]:
    """Check that `seq_idx` separates exactly the sequences of `cu_seqlens`, and return their bounds."""
    if batch != 1:
        raise ValueError(f"x must be a single row, (1, L, H, P), with cu_seqlens, got {batch} rows")
    bounds = check_cu_seqlens(cu_seqlens, length)
    spans = [(start, end) for start, end in pairwise(bounds) if start < end]
    if seq_idx is None:
        if len(spans) > 1:
            raise ValueError(f"seq_idx must be given with the {len(spans)} sequences of cu_seqlens, got None")
        return bounds
    check_seq_idx(seq_idx, batch, length)
    indices = seq_idx[0].tolist()
    spans.append((bounds[-1], length))
    parts = [set(indices[start:end]) for start, end in spans]
    single = all(len(part) == 1 and min(part) >= 0 for part in parts[:-1])
    if not single or any(part & after for part, after in pairwise(parts)):
        raise ValueError(f"seq_idx must hold one index for each sequence of cu_seqlens, {bounds}, got {indices}")
    return bounds


def _sequence_states(
    x: Tensor, steps: Tensor, A: Tensor, B: Tensor, initial_states: Tensor | None, bounds: list[int]
) -> Tensor:
    """Return the (S, H, P, N) final states of sequences: sum_t exp(sum_{k > t} dt_k A) dt_t x_t (x) B_t.

    x is (L, H, P), the step sizes are (L, H) and B is (L, G, N).
    """
    sums, groups = steps.dtype, B.shape[1]
    states = []
    with without_autocast(x):
        for start, end in pairwise(bounds):
            log_decay = steps[start:end] * A.to(sums)
            to_end = F.pad(log_decay[1:], (0, 0, 0, int(end > start))).flip(0).cumsum(0).flip(0)
            u = x[start:end].to(sums) * (to_end.exp() * steps[start:end])[..., None]
            grouped = u.unflatten(1, (groups, -1))  # (l, G, H / G, P)
            state = torch.einsum("lgrp,lgn->grpn", grouped, B[start:end].to(sums)).flatten(0, 1)
            if initial_states is not None and start == 0 < end:
                state = state + log_decay.sum(0).exp()[:, None, None] * initial_states[0].to(sums)
            states.append(state)
    return torch.stack(states) if states else steps.new_zeros(0, *x.shape[1:], B.shape[2])
