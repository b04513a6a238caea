"""One token of SSD (:mod:`ssd`): decoding. Symbols as there."""

from __future__ import annotations

import math

from torch import Tensor

from .arguments import check_tensor, choose_implementation
from .ssd import step_sizes
from .ssd_chunked import skip_and_gate


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

    Args:
        state: (B, H, P, N) state, float32 (or float64).
        x: (B, H, P) input.
        dt: (B, H) step sizes.
        A: (H) decay rates, negative.
        B: (B, G, N) input map.
        C: (B, G, N) output map.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate.
        dt_bias: (H) added to `dt` first.
        dt_softplus: apply softplus to `dt + dt_bias`.
        dt_limit: range that the step sizes are clamped to.
        implementation: "auto" or "torch".

    Returns:
        (B, H, P) output in the dtype of `x`.

    Raises:
        ValueError: if a shape or `implementation` does not fit.
    """
    choose_implementation(implementation, "ssd_step", x, supports_triton=False)
    check_tensor("dt", dt, state.shape[:2], "(B, H)")
    check_tensor("A", A, state.shape[1:2], "(H)")
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, state.shape[1:2], "(H)")
    dt = step_sizes(dt.to(state.dtype), dt_bias, dt_softplus, dt_limit)
    y = _update(state, x.to(state.dtype) * dt[..., None], dt * A.to(state.dtype), B, C)
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
    choose_implementation(implementation, "ssd_log_decay_step", x, supports_triton=False)
    y = _update(state, x.to(state.dtype), log_decay.to(state.dtype), B, C)
    return skip_and_gate(y, x, D, z)


def _update(state: Tensor, u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One step in place: returns (B, H, P) in the state's dtype."""
    heads = state.shape[1]
    check_tensor("x", u, tuple(state.shape[:3]), "(B, H, P)")
    check_tensor("log_decay", log_decay, tuple(state.shape[:2]), "(B, H)")
    for name, tensor in (("B", B), ("C", C)):
        check_tensor(name, tensor, (state.shape[0], None, state.shape[3]), "(B, G, N)")
        if heads % tensor.shape[1]:
            raise ValueError(f"{name}: the number of groups must divide the {heads} heads, got {tensor.shape[1]}")
    B = B.to(state.dtype).repeat_interleave(heads // B.shape[1], dim=1)
    C = C.to(state.dtype).repeat_interleave(heads // C.shape[1], dim=1)
    state.mul_(log_decay.exp()[..., None, None]).add_(u[..., None] * B[:, :, None, :])
    return (state @ C[..., None])[..., 0]
