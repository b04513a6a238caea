"""mamba_ssm 2.3's gated norms (`ops.triton.layernorm_gated`), built on :mod:`rms_norm`.

Symbols: D width, S group size; "..." stands for any axes.

Gate, statistics, weight and bias are applied in float32 (float64 for float64 inputs). In half precision, an RMS norm
without bias is rounded as in :mod:`rms_norm`; other norms are rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import accumulator, check_devices, check_optional
from .rms_norm import check_norm, rms_norm


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Normalise groups of channels, with an optional gate before or after the norm.

    Args:
        x: (..., D) inputs.
        weight: (D) scale.
        bias: (D) bias.
        z: (..., D) gate.
        eps: added to the variance or mean square.
        group_size: S channels that are normalised together, a divisor of D; D if None.
        norm_before_gate: return `norm(x) silu(z)`, otherwise `norm(x silu(z))`; no effect without `z`.
        is_rms_norm: divide by the root mean square, without subtracting the mean.

    Returns:
        (..., D) outputs in the dtype of `x`.

    Raises:
        ValueError: if an argument is invalid.
    """
    size = check_norm(x, weight, z, group_size)
    check_optional("bias", bias, (x.shape[-1],), "(D)")
    check_devices(x=x, bias=bias)
    if is_rms_norm and bias is None:
        return rms_norm(x, weight, eps, z=z, group_size=group_size, norm_before_gate=norm_before_gate)
    sums = accumulator(x)
    u, scale, gate = x.to(sums), weight.to(sums), None if z is None else z.to(sums)
    if is_rms_norm:
        y = rms_norm(u, scale, eps, z=None if norm_before_gate else gate, group_size=group_size)
    else:
        if gate is not None and not norm_before_gate:
            u = u * F.silu(gate)
        y = F.layer_norm(u.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * scale
    if bias is not None:
        y = y + bias.to(sums)
    if gate is not None and norm_before_gate:
        y = y * F.silu(gate)
    return y.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Run :func:`layernorm_fn` with `is_rms_norm`; the other arguments, result and errors are the same."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNorm(nn.Module):
    """Module of :func:`layernorm_fn` with its own weight and bias.

    Args:
        hidden_size: D.
        eps: added to the variance.
        group_size: S channels that are normalised together; D if None.
        norm_before_gate: apply the gate after the norm.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    is_rms_norm = False
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise (..., D) inputs with the gate `z`."""
        options = self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm
        return layernorm_fn(x, self.weight, self.bias, z, *options)


class RMSNorm(LayerNorm):
    """Module of :func:`rmsnorm_fn` with its own weight and without a bias; arguments of :class:`LayerNorm`."""

    is_rms_norm = True
