"""Root-mean-square normalisation over the last dimension, grouped and gated or of a residual sum.

Symbols: D normalised width, S group size.

    rms_norm(x) = weight * x / sqrt(mean(x^2) + eps)          (Zhang and Sennrich 2019, eq. 4, with eps)

If the mean square of a row or group overflows, its outputs are NaN. Division by infinity would give zeros and hide the
overflow.

The gate `z` is that of Mamba-2: norm(x * silu(z)) * weight, or norm(x) * weight * silu(z) with `norm_before_gate`. The
argument names are those of mamba_ssm's `RMSNormGated`.

Inputs in half precision are rounded like in the norms of transformers (LlamaRMSNorm, Mamba2RMSNorm, MambaRMSNormGated;
Qwen3NextRMSNormGated with `norm_before_gate`): gate, statistics and division are computed in float32 and rounded once
to the dtype of `x` before the multiplication by the weight.

`add_rms_norm` combines the addition to a residual stream with the norm that follows it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import accumulator, check_devices, check_optional, check_tensor, choose_implementation, recorded
from .rms_norm_triton import WIDEST_GROUP, add_rms_norm_triton, rms_norm_triton
from .tracing import tracing


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Divide by the root mean square and scale, optionally with a gate and per group of channels.

    Args:
        x: (..., D) inputs.
        weight: (D) scale.
        eps: added to the mean square.
        z: (..., D) gate, applied as a factor silu(z).
        group_size: S channels that share one root mean square, a divisor of D; D if None.
        norm_before_gate: apply the gate after the norm and the weight; by default it is applied to `x`.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support S > 16384.

    Returns:
        (..., D) outputs in the dtype of `x`, computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: if a shape, dtype, device, `group_size` or `implementation` is invalid.
    """
    group_size = check_norm(x, weight, z, group_size)
    if choose_implementation(implementation, "rms_norm", x, group_size <= WIDEST_GROUP) == "triton":
        return rms_norm_triton(x, weight, eps, z, group_size, norm_before_gate)
    return _in_torch(x, weight, eps, z, group_size, norm_before_gate)


def _in_torch(
    x: Tensor, weight: Tensor, eps: float, z: Tensor | None, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Run the torch path of `rms_norm`, whose arguments are checked."""
    if tracing():  # a compiler fuses the reference, and its gradient is as fast as the one below
        return rms_norm_reference(x, weight, eps, z=z, group_size=group_size, norm_before_gate=norm_before_gate)
    arguments = x, weight, None if norm_before_gate else z, eps, group_size
    if recorded(x, weight, z):
        y: Any = _RmsNorm.apply(*arguments)
    else:
        y, _ = _normalise(*arguments)
    if z is not None and norm_before_gate:
        dtype = accumulator(x)
        y = (y.to(dtype) * F.silu(z.to(dtype))).to(x.dtype)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add to a residual stream and normalise the sum: `total = residual + x`, `normed = rms_norm(total, weight, eps)`.

    In bfloat16, separate addition and norm read and write 10 D bytes per token in the forward and 12 D in the backward;
    the Triton kernels 8 D and 8 D, because they do not read the sum again, nor write and read the norm's gradient to
    add that of `total`. The effect on the time of a model on a GPU has not been measured. The torch path runs two
    separate operations.

    Args:
        x: (..., D) addend.
        residual: (..., D) residual stream; may have a wider dtype than `x`.
        weight: (D) scale.
        eps: added to the mean square.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support D > 16384.

    Returns:
        normed: (..., D) `rms_norm` of the rounded `total`, rounded to the dtype of `weight` if that is narrower.
        total: (..., D) sum in the dtype of `residual`.

    Raises:
        ValueError: if a shape, dtype, device or `implementation` is invalid.
    """
    dtype = _check_add(x, residual, weight)
    if choose_implementation(implementation, "add_rms_norm", residual, x.shape[-1] <= WIDEST_GROUP) == "triton":
        return add_rms_norm_triton(x, residual, weight, eps, dtype)
    total = (residual + x).to(residual.dtype)
    return _in_torch(total, weight, eps, None, x.shape[-1], False).to(dtype), total


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` by its definition, differentiated by autograd, with the same arguments."""
    dtype = _check_add(x, residual, weight)
    total = (residual + x).to(residual.dtype)
    return rms_norm_reference(total, weight, eps).to(dtype), total


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Compute `rms_norm` by its definition, differentiated by autograd, with the same arguments."""
    group_size = check_norm(x, weight, z, group_size)
    dtype = accumulator(x)
    u = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        u = u * gate
    groups = u.unflatten(-1, (-1, group_size))
    mean_square = groups.pow(2).mean(-1, keepdim=True)
    r = torch.rsqrt(mean_square + eps).masked_fill(mean_square == math.inf, math.nan)
    n = (groups * r).flatten(-2)
    y = (weight * n.to(x.dtype)).to(x.dtype)
    if gate is not None and norm_before_gate:
        y = (y.to(dtype) * gate).to(x.dtype)
    return y


class _RmsNorm(torch.autograd.Function):
    """y = weight * n with n = r u, r = (mean(u^2) + eps)^(-1/2) and u = x silu(z) or x; means are over a group.

    Backward, with dn = weight dy:  dweight = sum over rows of dy n,  du = r (dn - n mean(dn n)),
    dx = du silu(z),  dz = du x silu'(z).

    The backward is written out because autograd's takes more than ten passes over memory. Measured on 1 CPU core,
    fp32, torch 2.13, (1, 1024, 1792), ms forward / forward + backward, fastest of 40:
        no gate:  the reference 1.0 / 5.7    F.rms_norm 1.1 / 13    this 1.1 / 2.8
        gated:    the reference 2.0 / 12     F.rms_norm 1.8 / 11    this 1.7 / 6.9
    It saves only x, z and r. `F.rms_norm` also rounds half precision differently (after the weight).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int) -> Tensor:
        y, r = _normalise(x, weight, z, eps, group_size)
        ctx.save_for_backward(x, weight, z, r)
        ctx.group_size = group_size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, z, r = ctx.saved_tensors
        needs_x, needs_weight, needs_z = ctx.needs_input_grad[:3]
        scale = weight.to(r.dtype).view(-1, ctx.group_size)
        r = r.view(*x.shape[:-1], scale.shape[0], 1)
        dy = dy.to(r.dtype).unflatten(-1, scale.shape)
        gate = None if z is None else z.to(r.dtype)
        smooth = None if gate is None else F.silu(gate)
        u = x.to(r.dtype) if smooth is None else smooth * x
        groups = u.unflatten(-1, scale.shape)
        n = groups * r if u is x else groups.mul_(r)
        products = dy * n
        dx = dweight = dz = None
        if needs_weight:
            dweight = products.reshape(-1, *scale.shape).sum(0).view_as(weight).to(weight.dtype)
        if needs_x or needs_z:
            mean = products.mul_(scale).mean(-1, keepdim=True)
            du = torch.mul(dy, scale, out=products).addcmul_(n, mean, value=-1).mul_(r).flatten(-2)
            if z is not None and gate is not None and smooth is not None:
                if needs_z:
                    dgate = torch.mul(du, x, out=n.flatten(-2))
                    dz = torch.ops.aten.silu_backward(dgate, gate).to(z.dtype)
                du.mul_(smooth)
            dx = du.to(x.dtype) if needs_x else None
        return dx, dweight, dz, None, None


def _normalise(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int) -> tuple[Tensor, Tensor]:
    """Return y and r of :class:`_RmsNorm`: (..., D), and (..., D/S, 1), or (..., 1) for a single group."""
    u = x.to(accumulator(x))
    if z is not None:
        u = F.silu(z.to(u.dtype)).mul_(u)
    groups = u if group_size == x.shape[-1] else u.unflatten(-1, (-1, group_size))
    r = groups.pow(2).mean(-1, keepdim=True).add_(eps)
    r = r.nan_to_num_(nan=math.nan, posinf=math.nan).rsqrt_()
    n = groups * r if u is x else groups.mul_(r)
    # In-place multiplication computes in the wider dtype and rounds once, to the dtype of x.
    if groups is u:
        return n.to(x.dtype).mul_(weight), r
    return n.to(x.dtype).mul_(weight.view(-1, group_size)).flatten(-2), r


def check_rows(x: Tensor) -> int:
    """Check the (..., D) inputs of a norm and return D."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D >= 1, got shape {tuple(x.shape)}")
    check_tensor("x", x, tuple(x.shape), "(..., D)")
    return x.shape[-1]


def check_norm(x: Tensor, weight: Tensor, z: Tensor | None, group_size: int | None) -> int:
    """Check the arguments of a norm and return the group size."""
    # The usual call, of which a step of decoding has hundreds.
    if (
        z is None
        and group_size is None
        and weight.dim() == 1
        and weight.numel()
        and weight.shape == x.shape[-1:]
        and x.is_floating_point()
        and weight.is_floating_point()
        and x.device == weight.device
    ):
        return x.shape[-1]
    D = check_rows(x)
    check_tensor("weight", weight, (D,), "(D)")
    check_optional("z", z, tuple(x.shape), "(..., D)")
    check_devices(x=x, weight=weight, z=z)
    if group_size is None:
        return D
    if group_size < 1 or D % group_size:
        raise ValueError(f"group_size must be a positive divisor of D = {D}, got {group_size}")
    return group_size


def _check_add(x: Tensor, residual: Tensor, weight: Tensor) -> torch.dtype:
    """Check the arguments of `add_rms_norm` and return the dtype of its first result."""
    check_norm(x, weight, None, None)
    if residual.shape != x.shape or not residual.is_floating_point() or residual.device != x.device:
        check_tensor("residual", residual, tuple(x.shape), "(..., D)")
        check_devices(x=x, residual=residual)
    return weight.dtype if weight.dtype.itemsize < residual.dtype.itemsize else residual.dtype
