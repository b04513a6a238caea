"""One token of a Mamba-2 mixer: convolution, recurrence, skip and gate, which Triton runs in a single launch.

Symbols: B batch, H heads, P head width, N state size, G groups, K convolution width. A channel is one of the
H P + 2 G N that are convolved, in the order x, B, C.

The step is the composition of `causal_conv1d_step` and `ssd_step`, and the torch path is that. Decoding a token of a
small batch costs launches rather than arithmetic, and a launch costs more the more arguments it has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .causal_conv1d import causal_conv1d_step
from .causal_conv1d_triton import WIDTHS
from .checks import (
    accumulator,
    check_devices,
    check_integers,
    check_optional,
    check_tensor,
    choose_implementation,
    recorded,
)
from .mamba2_step_triton import mamba2_step_triton
from .ssd import ssd_step


def mamba2_step(
    xBC: Tensor,
    conv_state: Tensor,
    state: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    arrivals: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Run one token of Mamba-2, `ssd_step(state, *split(silu(convolve(xBC))), ...)`, and update both states in place.

    The step does not wait for the device, so that a CUDA graph can capture it.

    Args:
        xBC: (B, H P + 2 G N) inputs of the convolution, in the order x, B, C; G divides H.
        conv_state: (B, H P + 2 G N, K-1) inputs before the token, oldest first.
        state: (B, H, P, N) state of the recurrence, float32 (or float64).
        dt: (B, H) step sizes.
        weight: (H P + 2 G N, K) taps, oldest first.
        bias: (H P + 2 G N) bias of the convolution, or None.
        A_log: (H) logarithm of the negative decay rates, `A = -exp(A_log)`.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate: the output, skip included, is multiplied by `silu(z)`.
        dt_bias: (H) added to `dt` first.
        dt_softplus: apply softplus to `dt + dt_bias`.
        dt_limit: range to which the step sizes are clamped, after softplus.
        arrivals: (B, G) int32 zeros for the Triton kernel, which counts in them and leaves them zero. Calls that may
            run at the same time need counts of their own. If None, a second launch makes them.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton needs contiguous states and parameters
            and K <= 4, and does not support calls that autograd records. Otherwise "auto" runs the two steps.

    Returns:
        (B, H, P) output in the dtype of `xBC`.

    Raises:
        ValueError: if a shape, dtype, device, group count or `implementation` is invalid.
    """
    inputs = (xBC, conv_state, state, dt, weight, bias, A_log, D, z, dt_bias)
    groups = _check(*inputs, arrivals)
    readable = _plain(xBC, dt, z, state, conv_state, weight, bias, A_log, D, dt_bias)
    served = weight.shape[1] in WIDTHS and readable and not recorded(*inputs)
    if choose_implementation(implementation, "mamba2_step", xBC, served, traceable=True) == "triton":
        return mamba2_step_triton(*inputs, dt_softplus, dt_limit, arrivals)
    heads, width, size = state.shape[1:]
    xBC = causal_conv1d_step(xBC, conv_state, weight, bias, activation="silu", implementation=implementation)
    x, B, C = xBC.split([heads * width, groups * size, groups * size], dim=1)
    return ssd_step(
        state,
        x.unflatten(1, (heads, width)),
        dt,
        -A_log.to(accumulator(A_log)).exp(),
        B.unflatten(1, (groups, size)),
        C.unflatten(1, (groups, size)),
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        implementation=implementation,
    )


def _check(
    xBC: Tensor,
    conv_state: Tensor,
    state: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    arrivals: Tensor | None,
) -> int:
    """Raise ValueError unless the arguments are valid; returns the number of groups."""
    check_tensor("xBC", xBC, (None, None), "(B, H P + 2 G N)")
    batch, channels = xBC.shape
    check_tensor("state", state, (batch, None, None, None), "(B, H, P, N)")
    heads, width, size = state.shape[1:]
    check_tensor("weight", weight, (channels, None), "(H P + 2 G N, K)")
    taps = weight.shape[1]
    if taps < 2:
        raise ValueError(f"weight must have at least 2 columns, got {taps}")
    check_tensor("conv_state", conv_state, (batch, channels, taps - 1), "(B, H P + 2 G N, K-1)")
    check_tensor("dt", dt, (batch, heads), "(B, H)")
    check_tensor("A_log", A_log, (heads,), "(H)")
    check_optional("bias", bias, (channels,), "(H P + 2 G N)")
    check_optional("dt_bias", dt_bias, (heads,), "(H)")
    check_optional("z", z, (batch, heads, width), "(B, H, P)")
    if D is not None:
        check_tensor("D", D, (heads,) if D.dim() == 1 else (heads, width), "(H) or (H, P)")
    groups, rest = divmod(channels - heads * width, 2 * size) if size else (0, 0)
    if rest or groups < 1 or heads % groups:
        raise ValueError(
            f"xBC must have H P + 2 G N channels, where H = {heads}, P = {width}, N = {size} and G divides H, "
            f"got {channels}"
        )
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state must be float32 or float64, got {state.dtype}")
    if arrivals is not None:
        check_integers("arrivals", arrivals, (batch, groups), "(B, G)")
        if arrivals.dtype != torch.int32:
            raise ValueError(f"arrivals must be torch.int32, got {arrivals.dtype}")
    check_devices(
        xBC=xBC,
        conv_state=conv_state,
        state=state,
        dt=dt,
        weight=weight,
        bias=bias,
        A_log=A_log,
        D=D,
        z=z,
        dt_bias=dt_bias,
        arrivals=arrivals,
    )
    return groups


def _plain(xBC: Tensor, dt: Tensor, z: Tensor | None, state: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernel can read the tensors: rows of projections contiguous, the others whole."""
    rows = xBC.stride(1) == dt.stride(1) == 1 and (z is None or z.stride()[1:] == (z.shape[2], 1))
    # Of float64 `choose_implementation` says more.
    single = state.dtype == torch.float32 or xBC.dtype == torch.float64
    return rows and single and all(each is None or each.is_contiguous() for each in (state, *others))
