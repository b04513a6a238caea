"""The dtype that a layer takes its inputs in."""

import torch
from torch import Tensor, nn

_COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_weight(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """The states in the dtype of a layer's weight, where the layer computes in that.

    A quantised layer does not: its weight holds integers or 8-bit floats, or `weight` is a method, and it takes the
    model's own dtype. Neither does one without a weight.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in _COMPUTED_IN:
        return hidden_states.to(weight.dtype)
    return hidden_states
