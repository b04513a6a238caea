"""Tiny models with selective attention, and one block of them, for the tests of Taipan."""

from typing import Any

import families
import torch
from torch import Tensor

from ssm_zoo.modeling.modeling_taipan import SelectiveAttentionBlock
from ssm_zoo.modeling.selective_attention import SelectiveAttention
from ssm_zoo.modeling.token_layout import make_sequence

WINDOW = 5


def make_model(name: str, **changes: Any) -> Any:
    """A tiny model as users get it, whose threshold is no zero."""
    selects = name != "mamba2"
    model = families.make_model(name, **(({"sal_selection": "capacity"} if selects else {}) | changes))
    if selects and changes.get("sal_selection") != "gumbel":
        for module in model.modules():
            if isinstance(module, SelectiveAttention):
                module.threshold.fill_(0.05)
    return model


def block_of(**changes: Any) -> SelectiveAttentionBlock:
    """A block of selective attention in float64 with weights of which none is trivial."""
    model = make_model("taipan", residual_in_fp32=False, **changes).double()
    block = model.backbone.layers[2]
    assert isinstance(block, SelectiveAttentionBlock)
    return block.train()


def sequence_of(length: int, batch: int = 2) -> Any:
    return make_sequence(batch, length, torch.device("cpu"))


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
