"""mamba_ssm 2.3's functions for Mamba-1 (`ops.selective_scan_interface`), built on :mod:`selective_scan`, and its step
for Mamba-1 and Mamba-2 (`ops.triton.selective_state_update`).

Symbols: B batch, L length, D channels, N state size, G groups, H heads, P head width, K convolution width, R rank of
the step sizes, O outputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .checks import check_devices, check_groups, check_integers, check_optional, check_projection, check_tensor
from .recurrence import write_rows
from .rms_norm import rms_norm
from .selective_scan import selective_scan, selective_scan_step
from .ssd import ssd_step


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
    """Run :func:`~ssm_zoo.kernels.selective_scan.selective_scan` under mamba_ssm's name and channel-first layout.

    Unlike in mamba_ssm, gradients also flow from the last state.

    Args:
        u: (B, D, L) inputs.
        delta: (B, D, L) step sizes.
        A: (D, N) decay rates, real and negative.
        B: (B, N, L) or (B, G, N, L) input maps, or (D, N) for constant maps. Constant maps take as much memory as G = D
            groups: B L D N numbers for the gradient.
        C: output maps in any of these forms. `B` and `C` must have equal numbers of groups, unless one of them has one
            map per channel.
        D: (D) skip.
        z: (B, D, L) gate.
        delta_bias: (D) added to `delta`.
        delta_softplus: apply softplus to the step sizes.
        return_last_state: also return the (B, D, N) last state.

    Returns:
        (B, D, L) outputs, and the last state if asked for.

    Raises:
        ValueError: if an argument is invalid or unsupported.
    """
    check_tensor("u", u, (None, None, None), "(B, D, L)")
    batch, channels, length = u.shape
    if length == 0:
        raise ValueError(f"u must hold at least one token, got shape {tuple(u.shape)}")
    _check_rates(A, channels)
    check_tensor("delta", delta, tuple(u.shape), "(B, D, L)")
    check_optional("z", z, tuple(u.shape), "(B, D, L)")
    check_optional("delta_bias", delta_bias, (channels,), "(D)")
    maps_in, maps_out = _matching_maps(
        _map_by_token("B", B, batch, length, A), _map_by_token("C", C, batch, length, A), channels
    )
    check_devices(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    result = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        maps_in,
        maps_out,
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        return_final_state=return_last_state,
    )
    if isinstance(result, Tensor):
        return result.transpose(1, 2)
    y, state = result
    return y.transpose(1, 2), state


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Run a Mamba layer after its input projection: convolution, projections, scan, output projection.

    Unlike in mamba_ssm, gradients also flow to the weights of the three norms.

    Args:
        xz: (B, 2 D, L) projected inputs, followed by their gates.
        conv1d_weight: (D, 1, K) taps of the convolution, whose activation is SiLU.
        conv1d_bias: (D) bias of the convolution.
        x_proj_weight: (R + 2 N, D) projection to low-rank step sizes, input maps and output maps; N rows less for each
            of `B` and `C` that is given.
        delta_proj_weight: (D, R) projection of the step sizes.
        out_proj_weight: (O, D) output projection.
        out_proj_bias: (O) bias of the output projection.
        A: (D, N) decay rates, real and negative.
        B: input maps in a form of :func:`selective_scan_fn`; None to compute them from the input.
        C: output maps, likewise.
        D: (D) skip.
        delta_bias: (D) added to the step sizes.
        B_proj_bias: (N) added to the projected input maps; None if `B` is given.
        C_proj_bias: (N) added to the projected output maps; None if `C` is given.
        delta_softplus: apply softplus to the step sizes.
        checkpoint_lvl: 0 or 1. In mamba_ssm it selects what the backward recomputes; it has no effect here.
        b_rms_weight: (N) scale of a norm applied to the projected input maps after their bias; None if `B` is given.
        c_rms_weight: (N) scale of a norm applied to the projected output maps after their bias; None if `C` is given.
        dt_rms_weight: (D) scale of a norm applied to the projected step sizes.
        b_c_dt_rms_eps: added to the mean squares of these norms.

    Returns:
        (B, L, O) outputs.

    Raises:
        ValueError: if an argument is invalid or unsupported.
    """
    check_tensor("xz", xz, (None, None, None), "(B, 2 D, L)")
    batch, doubled, length = xz.shape
    if doubled % 2:
        raise ValueError(f"xz must be (B, 2 D, L), got shape {tuple(xz.shape)}")
    if length == 0:
        raise ValueError(f"xz must hold at least one token, got shape {tuple(xz.shape)}")
    channels = doubled // 2
    _check_rates(A, channels)
    size = A.shape[1]
    check_tensor("conv1d_weight", conv1d_weight, (channels, 1, None), "(D, 1, K)")
    check_projection("delta_proj_weight", delta_proj_weight, (channels, None), "(D, R)", xz=xz)
    rank = delta_proj_weight.shape[1]
    projected = [size if given is None else 0 for given in (B, C)]
    symbols = "(R + 2 N, D)" if all(projected) else "(R + N, D)" if any(projected) else "(R, D)"
    check_projection("x_proj_weight", x_proj_weight, (rank + sum(projected), channels), symbols, xz=xz)
    check_projection("out_proj_weight", out_proj_weight, (None, channels), "(O, D)", xz=xz)
    vectors = {
        "conv1d_bias": (conv1d_bias, channels, "(D)"),
        "out_proj_bias": (out_proj_bias, out_proj_weight.shape[0], "(O)"),
        "D": (D, channels, "(D)"),
        "delta_bias": (delta_bias, channels, "(D)"),
        "B_proj_bias": (B_proj_bias, size, "(N)"),
        "C_proj_bias": (C_proj_bias, size, "(N)"),
        "b_rms_weight": (b_rms_weight, size, "(N)"),
        "c_rms_weight": (c_rms_weight, size, "(N)"),
        "dt_rms_weight": (dt_rms_weight, channels, "(D)"),
    }
    for name, (vector, width, letters) in vectors.items():
        check_optional(name, vector, (width,), letters)
    for letter, given in (("B", B), ("C", C)):
        for name in (f"{letter}_proj_bias", f"{letter.lower()}_rms_weight"):
            if given is not None and vectors[name][0] is not None:
                raise ValueError(f"{name} must be None if {letter} is given, got a tensor")
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    given_maps = [
        None if given is None else _map_by_token(name, given, batch, length, A) for name, given in (("B", B), ("C", C))
    ]
    check_devices(xz=xz, conv1d_weight=conv1d_weight, x_proj_weight=x_proj_weight, delta_proj_weight=delta_proj_weight)
    check_devices(xz=xz, out_proj_weight=out_proj_weight, A=A, B=B, C=C, **{name: v[0] for name, v in vectors.items()})

    x, z = xz.transpose(1, 2).split(channels, dim=-1)
    x = causal_conv1d(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    assert isinstance(x, Tensor)
    low_rank, *projections = F.linear(x, x_proj_weight).split([rank, *projected], dim=-1)
    dt = F.linear(low_rank, delta_proj_weight)
    if dt_rms_weight is not None:
        dt = rms_norm(dt, dt_rms_weight, b_c_dt_rms_eps)
    maps = []
    for given, projection, bias, scale in zip(
        given_maps, projections, (B_proj_bias, C_proj_bias), (b_rms_weight, c_rms_weight), strict=True
    ):
        if given is not None:
            maps.append(given)
            continue
        if bias is not None:
            projection = projection + bias.to(projection.dtype)
        if scale is not None:
            projection = rms_norm(projection, scale, b_c_dt_rms_eps)
        maps.append(projection[:, :, None])
    maps_in, maps_out = _matching_maps(maps[0], maps[1], channels)
    y = selective_scan(x, dt, A, maps_in, maps_out, D=D, z=z, dt_bias=delta_bias, dt_softplus=delta_softplus)
    assert isinstance(y, Tensor)
    return F.linear(y, out_proj_weight, None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype))


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
    """Run one token of Mamba-1's or Mamba-2's scan and update `state` in place, without a gradient.

    Mamba-2's tensors have a head axis, Mamba-1's do not. If step sizes, their bias and decay rates are expanded over P
    and N (stride 0), as callers of Mamba-2 pass them, this runs :func:`~ssm_zoo.kernels.ssd.ssd_step`, otherwise
    :func:`~ssm_zoo.kernels.selective_scan.selective_scan_step`.

    Args:
        state: (B, [H,] P, N) states of any floating-point dtype, updated in float32 (float64 for float64 states); may
            have more rows than B with `state_batch_indices`.
        x: (B, [H,] P) inputs.
        dt: (B, [H,] P) step sizes.
        A: ([H,] P, N) decay rates, negative.
        B: (B, [G,] N) input maps.
        C: (B, [G,] N) output maps.
        D: ([H,] P) skip.
        z: (B, [H,] P) gate.
        dt_bias: ([H,] P) added to `dt`.
        dt_softplus: apply softplus to the step sizes.
        state_batch_indices: (B) row of `state` for each row of the batch, negative for padding.

    Returns:
        (B, [H,] P) outputs in the dtype of `x`, zero for padding.

    Raises:
        ValueError: if a shape, dtype, device or group count is invalid.
    """

    def with_heads(name: str, tensor: Tensor, shape: tuple[int | None, ...], symbols: str) -> Tensor:
        """Check the tensor, and add a head or group axis of size 1 if it lacks one."""
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
        arguments = held, inputs, steps[..., 0], rates[:, 0, 0], B, C
        bias, limits = None if bias is None else bias[:, 0], (-math.inf, math.inf)
        y = ssd_step(*arguments, D=skip, z=gate, dt_bias=bias, dt_softplus=dt_softplus, dt_limit=limits)
    else:
        held = held.contiguous()  # heads and their width become one axis of channels
        arguments = held.flatten(1, 2), inputs.flatten(1), steps.flatten(1), rates.flatten(0, 1), B, C
        skip, bias = (None if vector is None else vector.flatten() for vector in (skip, bias))
        gate = None if gate is None else gate.flatten(1)
        y = selective_scan_step(*arguments, D=skip, z=gate, dt_bias=bias, dt_softplus=dt_softplus).unflatten(1, (H, P))
    if state_batch_indices is not None:
        write_rows(states, state_batch_indices, held.to(states.dtype))
        y = y.masked_fill((state_batch_indices < 0)[:, None, None], 0)
    elif held is not states:
        states.copy_(held)
    return y if state.dim() == 4 else y[:, 0]


def _check_rates(A: Tensor, channels: int) -> None:
    if A.is_complex():
        raise ValueError("A must be real, got a complex tensor. Complex state spaces are not supported.")
    check_tensor("A", A, (channels, None), "(D, N)")


def _map_by_token(name: str, tensor: Tensor, batch: int, length: int, A: Tensor) -> Tensor:
    """Return maps of any accepted form as (B, L, G, N); constant maps become views with G = D."""
    symbols = "(D, N), (B, N, L) or (B, G, N, L)"
    if tensor.dim() == 2:
        check_tensor(name, tensor, tuple(A.shape), symbols)
        return tensor.expand(batch, length, *A.shape)
    check_tensor(name, tensor, (batch, *[None] * (tensor.dim() == 4), A.shape[1], length), symbols)
    grouped = tensor if tensor.dim() == 4 else tensor[:, None]
    check_groups(name, grouped.shape[1], A.shape[0], "channels")
    return grouped.permute(0, 3, 1, 2)


def _matching_maps(B: Tensor, C: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return (B, L, G, N) maps with equal numbers of groups; those of one may be repeated to a map per channel."""
    if B.shape[2] == C.shape[2]:
        return B, C
    if channels not in (B.shape[2], C.shape[2]):
        raise ValueError(f"C must have the {B.shape[2]} groups of B, got {C.shape[2]}")
    if B.shape[2] == channels:
        return B, C.repeat_interleave(channels // C.shape[2], dim=2)
    return B.repeat_interleave(channels // B.shape[2], dim=2), C
