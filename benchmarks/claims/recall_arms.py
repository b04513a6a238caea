"""The models of `recall.py`: two layers each, and as many parameters.

Mamba-2 sets the number of parameters. Where an arm has an MLP, its width makes up the difference; a Mamba-2 with a
larger state is narrower instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from ssm_zoo.modeling import (
    TaipanConfig,
    TaipanForCausalLM,
    ZooHybridConfig,
    ZooHybridForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
)

TAIPAN, MAMBA2, LARGE, TRANSFORMER = "taipan", "mamba2", "mamba2-large", "transformer"
# Words of each arm.
ARMS = {
    TAIPAN: "Taipan: Mamba-2, selective attention",
    MAMBA2: "Mamba-2",
    LARGE: "Mamba-2, larger state",
    TRANSFORMER: "Transformer, RoPE",
}
# The largest difference of the numbers of parameters, in parts of Mamba-2's.
EQUAL = 0.02


@dataclass(frozen=True)
class Sizes:
    """Sizes of the arms.

    Args:
        vocabulary: V.
        width: D. Attention has one head of it, Mamba-2 two.
        state: N of Mamba-2, in Taipan too.
        large_state: N of the arm with a larger one.
        capacity: share of the tokens that Taipan is to select.
    """

    vocabulary: int
    width: int
    state: int
    large_state: int
    capacity: float


def parameters(model: nn.Module) -> int:
    """Return number of parameters; a tied embedding counts once."""
    return sum(p.numel() for p in model.parameters())


def make(arm: str, sizes: Sizes, initializer_range: float, seed: int) -> nn.Module:
    """Return a freshly initialised model.

    Raises:
        ValueError: if the arm cannot be made equal in parameters at these sizes.
    """
    fit = fitting(arm, sizes)
    torch.manual_seed(seed)
    return build(arm, sizes, fit, initializer_range)


@cache
def fitting(arm: str, sizes: Sizes) -> int:
    """Return the width of the arm's MLP, or of the whole arm where it has none, that makes it equal in parameters."""

    def count(arm: str, fit: int) -> int:
        with torch.device("meta"):
            return parameters(build(arm, sizes, fit, 0.02))

    wanted = count(MAMBA2, sizes.width)
    if arm in (MAMBA2, LARGE):
        fit = min(range(sizes.width // 2, sizes.width + 1), key=lambda fit: abs(count(arm, fit) - wanted))
    else:
        fit = max(1 + round((wanted - count(arm, 1)) / (count(arm, 2) - count(arm, 1))), 1)
    if abs(count(arm, fit) - wanted) > EQUAL * wanted:
        raise ValueError(
            f"sizes must let {arm} have the parameters of {MAMBA2} ({wanted}) within {EQUAL:.0%}, got "
            f"{count(arm, fit)} with {sizes}"
        )
    return fit


def build(arm: str, sizes: Sizes, fit: int, initializer_range: float) -> nn.Module:
    """Return the arm with `fit` as the width that `fitting` chooses."""
    common: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": 2,
        "initializer_range": initializer_range,
        "tie_word_embeddings": True,
    }
    if arm in (MAMBA2, LARGE):
        state = sizes.state if arm == MAMBA2 else sizes.large_state
        return ZooMamba2ForCausalLM(
            ZooMamba2Config(**common | {"hidden_size": fit, "head_dim": fit, "state_size": state})
        )
    common |= {"intermediate_size": fit, "num_attention_heads": 1}
    if arm == TRANSFORMER:
        return ZooHybridForCausalLM(ZooHybridConfig(**common))
    own: dict[str, Any] = {"sal_every": 1, "state_size": sizes.state, "mamba_head_dim": sizes.width}
    own["sal_selection"] = "gumbel"  # the paper's; `gate_training.py` compares others
    return TaipanForCausalLM(TaipanConfig(**common, **own, attention_capacity=sizes.capacity))
