"""The rotary embedding as it is applied: Llama's, turning the first channels of a head or all of them."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R of P channels, halves against each other (arXiv 2104.09864; Llama's order of channels).

    Args:
        x: (..., P) queries or keys.
        cos: (..., R) cosines of the positions, broadcastable over the other axes of `x`.
        sin: (..., R) sines.

    Returns:
        (..., P) in the dtype of `x`, which the tables may be wider than (under autocast, or where FSDP casts the
        inputs of a block).
    """
    turned = cos.shape[-1]
    part = x[..., :turned]
    part = (part * cos + rotate_half(part) * sin).to(x.dtype)
    return part if turned == x.shape[-1] else torch.cat([part, x[..., turned:]], dim=-1)
