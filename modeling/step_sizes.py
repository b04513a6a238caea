"""The bias of a state-space mixer's step sizes, which are softplus(... + bias), as it is at the start."""

import math

import torch
from torch import Tensor
from transformers import initialization as init


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x, for x > 0, exact for small x too."""
    return x + torch.log(-torch.expm1(-x))


def init_step_bias(bias: Tensor, smallest: float, largest: float, floor: float) -> None:
    """Set `bias` so that it alone gives step sizes log-uniform in [smallest, largest], and at least `floor`."""
    span = math.log(largest) - math.log(smallest)
    steps = (torch.rand_like(bias) * span + math.log(smallest)).exp()
    init.copy_(bias, inverse_softplus(steps.clamp(min=floor)))
