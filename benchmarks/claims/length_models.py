"""Small language models of equal size that differ in how they mix tokens: what `length.py` and `decode.py` compare.

Width 128, 1.2 million parameters, tied embeddings; the counts differ by less than 2 %.

* "taipan": six Mamba-2 blocks and one of selective attention, the paper's ratio (arXiv 2410.18572, section 3).
* "mamba2": Mamba-2 blocks alone.
* "hybrid": Taipan's blocks with full attention and rotary positions in place of the selective one, the paper's Jamba.
* "transformer": blocks of full attention with rotary positions and a gated MLP.

Attention has 4 heads in all of them, Mamba-2 4 heads of 64 channels and states of 64.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ssm_zoo.modeling import (
    TaipanConfig,
    TaipanForCausalLM,
    ZooHybridConfig,
    ZooHybridForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
)

TAIPAN, MAMBA2, HYBRID, TRANSFORMER = "taipan", "mamba2", "hybrid", "transformer"
# Words and line colour of each.
ARMS = {
    TAIPAN: ("Taipan", "C0"),
    MAMBA2: ("Mamba-2", "C2"),
    HYBRID: ("Mamba-2 and full attention", "C1"),
    TRANSFORMER: ("Transformer (RoPE)", "C3"),
}
WIDTH, HEADS, STATE = 128, 4, 64
# Mamba-2 blocks before the attention of Taipan and of the hybrid, and width of the MLP after it.
GROUP, INNER = 6, 384
# What makes the other two as large: Mamba-2 blocks; blocks of the Transformer and the width of their MLPs.
ALONE, BLOCKS, BLOCK_INNER = 8, 4, 432
# Not tuned: near the best of `from_scratch.py`, and of attention and MLP about 1 / sqrt(WIDTH).
INITIALIZER_RANGE = 0.05


def make(arm: str, vocabulary: int, window: int, seed: int) -> PreTrainedModel:
    """Return a freshly initialised model; `window` is what a query of Taipan sees."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "state_size": STATE,
        "tie_word_embeddings": True,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    attention = {"num_attention_heads": HEADS}
    torch.manual_seed(seed)
    if arm == TAIPAN:
        sizes = {"num_hidden_layers": GROUP + 1, "sal_every": GROUP, "intermediate_size": INNER}
        own: dict[str, Any] = {"sliding_window": window, "sal_selection": "gumbel"}  # the paper's
        return TaipanForCausalLM(TaipanConfig(**common, **attention, **sizes, **own))
    if arm == MAMBA2:
        return ZooMamba2ForCausalLM(ZooMamba2Config(**common, num_hidden_layers=ALONE))
    sizes = {"num_hidden_layers": BLOCKS, "intermediate_size": BLOCK_INNER}
    if arm == HYBRID:
        sizes = {
            "num_hidden_layers": GROUP + 1,
            "intermediate_size": INNER,
            "mixer_types": ["mamba2"] * GROUP + ["full_attention"],
            "mlp_types": ["none"] * GROUP + ["gated"],
        }
    return ZooHybridForCausalLM(ZooHybridConfig(**common, **attention, **sizes))


def parameters(model: PreTrainedModel) -> int:
    """Return number of parameters, the tied head's once."""
    return sum(parameter.numel() for parameter in model.parameters())
