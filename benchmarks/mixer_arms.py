"""The models that the claims about masked mixers compare (arXiv 2409.01482): the mixer, its hybrid, and their peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedModel

from ssm_zoo.modeling import (
    MaskedMixerConfig,
    MaskedMixerForCausalLM,
    ZooHybridConfig,
    ZooHybridForCausalLM,
    ZooMamba2Config,
    ZooSSDForCausalLM,
)

HYBRID, LLAMA, MIXER, GPT, MAMBA2 = "hybrid", "llama", "mixer", "gpt", "mamba2"
# Words of each arm.
ARMS = {
    HYBRID: "Transformer-mixer hybrid, in series",
    LLAMA: "Llama-style Transformer",
    MIXER: "masked mixer, dense",
    GPT: "GPT-1-style Transformer",
    MAMBA2: "Mamba-2",
}
# Standard deviations of the embedding at initialisation, and of the projections of the two Transformers, that are
# multiplied by `scale`: the mixers' own; for the others what suits a short training of a small model
# (`from_scratch.py`).
RANGES = {HYBRID: 1.0, LLAMA: 0.05, MIXER: 1.0, GPT: 0.05, MAMBA2: 0.05}
HEADS = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of an arm.

    Attributes:
        width: D, a multiple of 4. Attention has four heads of it, Mamba-2 eight of its inner width.
        layers: blocks.
        mlp: width of the gated MLP of Llama and hybrid; the other MLPs are four times as wide as the model.
        state: N of Mamba-2.
    """

    width: int
    layers: int
    mlp: int = 0
    state: int = 64


def equal_sizes(arm: str, width: int) -> Sizes:
    """Sizes of mixer, Llama-style Transformer and Mamba-2 of a width, a multiple of 8, with about as many parameters
    besides the embedding: 32 of its squares."""
    return {
        MIXER: Sizes(width, 4),
        LLAMA: Sizes(width, 4, mlp=round(4 * width / 3)),
        MAMBA2: Sizes(width, 5, state=width // 4),
    }[arm]


def make(
    arm: str, sizes: Sizes, vocabulary: int, length: int, seed: int, *, scale: float = 1.0, tied: bool = True
) -> PreTrainedModel:
    """A freshly initialised arm, without dropout.

    Args:
        arm: a key of `ARMS`.
        sizes: its sizes.
        vocabulary: V.
        length: longest text.
        seed: of the initial weights.
        scale: multiplies the arm's entry of `RANGES`.
        tied: head and embedding are the same where the family has it so, in GPT-1 and Mamba-2; False: nowhere.
    """
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "initializer_range": RANGES[arm] * scale,
    }
    if arm == MIXER:
        return MaskedMixerForCausalLM(MaskedMixerConfig(**common, max_position_embeddings=length))
    if arm == HYBRID:
        more: dict[str, Any] = {"attention": "series", "num_attention_heads": HEADS, "intermediate_size": sizes.mlp}
        return MaskedMixerForCausalLM(MaskedMixerConfig(**common, **more, max_position_embeddings=length))
    if arm == LLAMA:
        more: dict[str, Any] = {"num_attention_heads": HEADS, "intermediate_size": sizes.mlp}
        return ZooHybridForCausalLM(ZooHybridConfig(**common, **more))
    if arm == MAMBA2:
        more: dict[str, Any] = {"state_size": sizes.state, "head_dim": sizes.width // 4}
        return ZooSSDForCausalLM(ZooMamba2Config(**common, **more, tie_word_embeddings=tied))
    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=sizes.width,
            n_layer=sizes.layers,
            n_head=HEADS,
            initializer_range=RANGES[arm] * scale,
            tie_word_embeddings=tied,
            **dropout,
        )
    )
