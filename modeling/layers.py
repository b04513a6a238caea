"""Layers and what concerns any layer: norms that do not hide an overflow, the dtype that a layer takes."""

import torch
from torch import Tensor, nn

from ..kernels.rms_norm import rms_norm

_COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_weight(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """The states in the dtype of a layer's weight, where the layer computes in that.

    A quantised layer does not: its weight holds integers or 8-bit floats, or `weight` is a method, and it takes the
    model's own dtype. Neither does one without a weight.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype != hidden_states.dtype and weight.dtype in _COMPUTED_IN:
        return hidden_states.to(weight.dtype)
    return hidden_states


class LayerNorm(nn.LayerNorm):
    """torch's, with NaN where the variance of a token overflows: divided by infinity its states would be zeros, and
    what is computed from zeros looks healthy."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) normed."""
        y, _, reciprocal = torch.native_layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        # 0 * (r / r) is 0, and NaN where r is 0: one operation, as every step of decoding does this several times.
        reciprocal = reciprocal.detach()
        return y.addcdiv_(reciprocal, reciprocal, value=0)


class PlainRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, without a weight."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) normed."""
        return rms_norm(hidden_states, hidden_states.new_ones(hidden_states.shape[-1]), self.eps)
