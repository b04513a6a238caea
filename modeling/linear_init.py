"""Initialisations of linear layers other than transformers' normal distribution of one width."""

import math

from torch import nn
from transformers import initialization as init


def init_linear(layer: nn.Linear) -> None:
    """PyTorch's own initialisation of a linear layer: U(+-1 / sqrt(fan in)), bias too."""
    bound = layer.in_features**-0.5
    init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        init.uniform_(layer.bias, -bound, bound)


def init_linear_normal(layer: nn.Linear) -> None:
    """Kaiming's normal initialisation of a linear layer, as of the authors' Toeplitz and recurrent mixers; bias 0."""
    init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
    if layer.bias is not None:
        init.zeros_(layer.bias)
