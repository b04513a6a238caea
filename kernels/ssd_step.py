"""One token of SSD (:mod:`ssd`): decoding. Symbols as there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import choose_implementation
from .recurrence import skip_and_gate, step_sizes, update_state
from .ssd import check_inputs
from .ssd_step_triton import ssd_step_triton


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    implementation: str = "auto",
) -> Tensor:
    """One token of :func:`ssd`; `state` is updated in place.

    Nothing waits for the device and the state stays where it is, so that a CUDA graph can hold the step; with Triton it
    is one launch, and views of one projection are read where they are.

    Args:
        state: (B, H, P, N) state, float32 (or float64), of any strides.
        x: (B, H, P) input.
        dt: (B, H) step sizes.
        A: (H) decay rates, negative.
        B: (B, G, N) input map; G divides H.
        C: (B, G, N) output map.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate.
        dt_bias: (H) added to `dt` first.
        dt_softplus: apply softplus to `dt + dt_bias`.
        dt_limit: range that the step sizes are clamped to, after softplus.
        implementation: "auto" (Triton for CUDA tensors, torch otherwise and where Triton does not serve: a float64
            state, or a gradient to be recorded), "triton" or "torch".

    Returns:
        (B, H, P) output in the dtype of `x`. Sums are kept in the dtype of `state`.

    Raises:
        ValueError: if a shape, dtype, device, group count or `implementation` does not fit.
    """
    chosen = _choose(implementation, "ssd_step", state, x, "dt", dt, A, B, C, D, z, dt_bias)
    if chosen == "triton":
        return ssd_step_triton(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
    dt = step_sizes(dt.to(state.dtype), dt_bias, dt_softplus, dt_limit)
    decay = (dt * A.to(state.dtype)).exp()[..., None, None]
    y = update_state(state, decay, x.to(state.dtype) * dt[..., None], B, C)
    return skip_and_gate(y, x, D, z)


def ssd_log_decay_step(
    state: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """One token of :func:`ssd_log_decay`; `state` is updated in place.

    Args:
        log_decay: (B, H) logarithm of the decay, in [-inf, 0]. The others are those of :func:`ssd_step`, and so are
            the result and the errors.
    """
    chosen = _choose(implementation, "ssd_log_decay_step", state, x, "log_decay", log_decay, None, B, C, D, z, None)
    if chosen == "triton":
        return ssd_step_triton(state, x, log_decay, None, B, C, D, z)
    decay = log_decay.to(state.dtype).exp()[..., None, None]
    y = update_state(state, decay, x.to(state.dtype), B, C)
    return skip_and_gate(y, x, D, z)


def _choose(
    implementation: str,
    name: str,
    state: Tensor,
    x: Tensor,
    decay_name: str,
    decay: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> str:
    """Check the arguments of a step, and say which implementation takes them."""
    check_inputs(x, decay_name, decay, A, B, C, D, z, dt_bias, state, None, one_token=True)
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state must be float32 or float64, got {state.dtype}")
    arguments = (state, x, decay, A, B, C, D, z, dt_bias)
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments)
    return choose_implementation(implementation, name, state, not recorded)  # the kernel has no backward
