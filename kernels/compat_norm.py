"""mamba_ssm 2.3's norms of a residual sum (`ops.triton.layer_norm`), built on :mod:`rms_norm`.

Symbols: D normalised width, O outputs; "..." stands for any axes.

Sum, statistics and bias are float32 (float64 for float64 inputs). Half precision is rounded as in :mod:`rms_norm`: the
sum is rounded to the dtype of the residual before it is normalised.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import accumulator, check_devices, check_optional, check_projection, check_tensor
from .rms_norm import add_rms_norm, check_rows, rms_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Normalise `dropout(rowscale x) + dropout(x1) + residual`, once or with two sets of weights.

    Args:
        x: (..., D) inputs.
        weight: (D) scale.
        bias: (D) bias.
        residual: (..., D) residual stream; may have a wider dtype.
        x1: (..., D) second inputs; cannot be combined with `rowscale`.
        weight1: (D) scale of a second norm of the same sum.
        bias1: (D) bias of the second norm.
        eps: added to the variance or mean square.
        dropout_p: probability of dropping an element of `x` and of `x1`, in [0, 1).
        rowscale: (...) factors of the rows of `x`.
        prenorm: also return the sum.
        residual_in_fp32: without a `residual`, make the sum float32; with one, it has the residual's dtype.
        is_rms_norm: divide by the root mean square, without subtracting the mean.
        return_dropout_mask: also return the dropout masks.

    Returns:
        The (..., D) norm in the dtype of `x`; then, with `weight1`, the second norm; with `prenorm`, the sum in the
        dtype of the residual; with `return_dropout_mask`, two (..., D) masks for `x` and `x1`, true for kept elements,
        None without dropout.

    Raises:
        ValueError: if an argument is invalid.
    """
    _check(x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale)
    sums = accumulator(x)
    dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    mask = mask1 = None
    plain = bias is None and is_rms_norm and dropout_p == 0 and rowscale is None and x1 is None
    # `add_rms_norm` rounds to the dtype of a weight that is narrower than the residual.
    if plain and residual is not None and (weight.dtype == x.dtype or weight.dtype.itemsize >= residual.dtype.itemsize):
        normed, total = add_rms_norm(x, residual, weight, eps)
        normed = normed.to(x.dtype)
    else:
        total = x
        if rowscale is not None:
            total = total.to(sums) * rowscale.to(sums)[..., None]
        if dropout_p > 0:
            total, mask = _dropout(total.to(sums), dropout_p)
        if x1 is not None:
            second = x1.to(sums)
            if dropout_p > 0:
                second, mask1 = _dropout(second, dropout_p)
            total = total.to(sums) + second
        if residual is not None:
            total = total.to(sums) + residual.to(sums)
        total = total.to(dtype)
        normed = _normalise(total, weight, bias, eps, is_rms_norm).to(x.dtype)
    results = [normed]
    if weight1 is not None:
        results.append(_normalise(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        return (*results, mask, mask1)
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Run :func:`layer_norm_fn` with `is_rms_norm`; the other arguments, results and errors are the same."""
    inputs = x, weight, bias, residual, x1, weight1, bias1
    options = eps, dropout_p, rowscale, prenorm, residual_in_fp32
    return layer_norm_fn(*inputs, *options, is_rms_norm=True, return_dropout_mask=return_dropout_mask)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`layer_norm_fn` and project its output.

    Args:
        x: (..., D) inputs.
        norm_weight: (D) scale.
        norm_bias: (D) bias of the norm.
        linear_weight: (O, D) projection.
        linear_bias: (O) bias of the projection.
        residual: (..., D) residual stream; may have a wider dtype.
        eps: added to the variance or mean square.
        prenorm: also return the sum.
        residual_in_fp32: without a `residual`, make the sum float32.
        is_rms_norm: divide by the root mean square, without subtracting the mean.

    Returns:
        (..., O) outputs, and with `prenorm` the (..., D) sum in the dtype of the residual.

    Raises:
        ValueError: if an argument is invalid.
    """
    check_rows(x)
    check_tensor("norm_weight", norm_weight, (x.shape[-1],), "(D)")
    check_optional("norm_bias", norm_bias, (x.shape[-1],), "(D)")
    check_projection("linear_weight", linear_weight, (None, x.shape[-1]), "(O, D)", x=x)
    check_optional("linear_bias", linear_bias, (linear_weight.shape[0],), "(O)")
    check_devices(
        x=x, norm_weight=norm_weight, norm_bias=norm_bias, linear_weight=linear_weight, linear_bias=linear_bias
    )
    options = {"eps": eps, "residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    normed, total = layer_norm_fn(x, norm_weight, norm_bias, residual, prenorm=True, **options)
    y = F.linear(normed, linear_weight, None if linear_bias is None else linear_bias.to(linear_weight.dtype))
    return (y, total) if prenorm else y


class RMSNorm(nn.Module):
    """Module of :func:`rms_norm_fn` with its own weight and without a bias.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        dropout_p: probability of dropping an element of the input in training.
        device: device of the weight.
        dtype: dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """Normalise (..., D) inputs, or their sum with the residual; returns the results of :func:`rms_norm_fn`."""
        dropout = self.drop.p if self.drop is not None and self.training else 0.0
        options = {"eps": self.eps, "dropout_p": dropout, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
        return rms_norm_fn(x, self.weight, None, residual, **options)


def _normalise(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    """Normalise the (..., D) sum; returns the dtype of the sum or of the statistics."""
    sums = accumulator(total)
    if not is_rms_norm:
        offset = None if bias is None else bias.to(sums)
        return F.layer_norm(total.to(sums), total.shape[-1:], weight.to(sums), offset, eps)
    if bias is None:
        return rms_norm(total, weight, eps)
    return rms_norm(total.to(sums), weight.to(sums), eps) + bias.to(sums)


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the inputs after dropout, and the mask of kept elements."""
    kept = torch.rand_like(x) >= p
    return x.masked_fill(~kept, 0) / (1 - p), kept


def _check(*arguments: Any) -> None:
    """Check the tensors and `dropout_p` of :func:`layer_norm_fn`."""
    x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale = arguments
    check_rows(x)
    for name, tensor in (("residual", residual), ("x1", x1)):
        check_optional(name, tensor, tuple(x.shape), "(..., D)")
    for name, tensor in (("weight", weight), ("bias", bias), ("weight1", weight1), ("bias1", bias1)):
        check_optional(name, tensor, (x.shape[-1],), "(D)")
    if bias1 is not None and weight1 is None:
        raise ValueError("bias1 must be None if weight1 is None, got a tensor")
    if rowscale is not None:
        check_tensor("rowscale", rowscale, tuple(x.shape[:-1]), "(...)")
        if x1 is not None:
            raise ValueError("rowscale must be None if x1 is given, got a tensor")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    check_devices(
        x=x, weight=weight, bias=bias, residual=residual, x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale
    )
