"""The models that the claims about masked mixers compare (arXiv 2409.01482): the mixer, its hybrid, and their peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssm_zoo.modeling import (
    MaskedMixerConfig,
    MaskedMixerForCausalLM,
    ZooHybridConfig,
    ZooHybridForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
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
    """Return the sizes of an arm of a width, a multiple of 8, so that all arms have about as many parameters besides
    the embedding: 32 times the square of the width."""
    return {
        MIXER: Sizes(width, 4),
        LLAMA: Sizes(width, 4, mlp=round(4 * width / 3)),
        MAMBA2: Sizes(width, 5, state=width // 4),
    }[arm]


def make(arm: str, sizes: Sizes, vocabulary: int, length: int, seed: int, *, embedding: float = 1.0) -> PreTrainedModel:
    """Return a freshly initialised arm, without dropout and with an untied head.

    All start as the paper's mixers do: embeddings, those of positions too, N(0, `embedding`), linear layers as torch
    initialises them, U(+-1 / sqrt(fan in)); Mamba-2 keeps its own initialisation of the rest. With what is usual for
    them the two Transformers learn far more slowly in a short training: held-out loss of TinyStories in nats after some
    80 steps of `stories.py`, embedding and projections of N(0, 0.05) against these with 1, Llama-style 5.04 and 4.49,
    and GPT-1-style with its own N(0, 0.02) and tied head 6.08 and 4.80; Mamba-2, tied 0.05 against 1, 4.57 and 4.52.

    Args:
        arm: a key of `ARMS`.
        sizes: its sizes.
        vocabulary: V.
        length: longest text.
        seed: of the initial weights.
        embedding: standard deviation of the embeddings.
    """
    torch.manual_seed(seed)
    model = untrained(arm, sizes, vocabulary, length)
    # Mamba-2 has more than linear layers whose sizes belong together: of it the head alone.
    linear = [model.get_output_embeddings()] if arm == MAMBA2 else model.modules()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=embedding)
        for module in linear:
            if isinstance(module, nn.Linear | Conv1D):
                # transformers' Conv1D is a linear layer with a transposed weight.
                fan_in = module.weight.shape[isinstance(module, nn.Linear)]
                for parameter in module.parameters():
                    parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5)
    return model


def untrained(arm: str, sizes: Sizes, vocabulary: int, length: int) -> PreTrainedModel:
    """Return an arm as its family initialises it, with an untied head."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "tie_word_embeddings": False,
    }
    if arm == MIXER:
        return MaskedMixerForCausalLM(MaskedMixerConfig(**common, max_position_embeddings=length))
    if arm == MAMBA2:
        more: dict[str, Any] = {"state_size": sizes.state, "head_dim": sizes.width // 4}
        return ZooMamba2ForCausalLM(ZooMamba2Config(**common, **more))
    if arm == GPT:
        dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(
                vocab_size=vocabulary,
                n_positions=length,
                n_embd=sizes.width,
                n_layer=sizes.layers,
                n_head=HEADS,
                tie_word_embeddings=False,
                **dropout,
            )
        )
    common |= {"num_attention_heads": HEADS, "intermediate_size": sizes.mlp}
    if arm == LLAMA:
        return ZooHybridForCausalLM(ZooHybridConfig(**common))
    return MaskedMixerForCausalLM(MaskedMixerConfig(**common, attention="series", max_position_embeddings=length))
