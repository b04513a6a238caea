"""Layer normalisation that does not hide an overflow."""

import math

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """torch's, with NaN where the variance of a token overflows: divided by infinity its states would be zeros, and
    what is computed from zeros looks healthy."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) normed."""
        y, _, reciprocal = torch.native_layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return y.masked_fill(reciprocal == 0, math.nan)
