"""The rotary embedding as it is applied: Llama's, turning the first channels of a head or all of them."""

from typing import Any

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


def llama_rope_parameters(config: Any) -> dict[str, Any]:
    """The `rope_parameters` of a Llama configuration, as transformers' Llama reads them, for one of ours.

    Without a scaling it turns whole heads, whatever `partial_rotary_factor` says. The two scalings whose factor may be
    left open take it from `max_position_embeddings`, which may be another number in ours.
    """
    given = dict(config.rope_parameters)
    if given["rope_type"] == "default":
        given.pop("partial_rotary_factor", None)
    if given["rope_type"] in ("longrope", "yarn") and given.get("factor") is None:
        given["factor"] = config.max_position_embeddings / given["original_max_position_embeddings"]
    return given
