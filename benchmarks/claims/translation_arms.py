"""The models of `translation.py`: the layouts of arXiv 2407.05489 at a small size, with as many parameters as Mamba.

Layers keep the proportions of the paper's models: per 24 layers of Mamba 36 of Mamba-2, 12 of the Transformer and of
RetNet, 6 of a decoder with cross-attention, 8 of a Mamba and 6 of a Transformer encoder. Where an arm has an MLP, its
width makes the number of parameters equal; the width of the model does in the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

MAMBA = "mamba"
ARMS = {
    MAMBA: "Mamba",
    "mamba2": "Mamba-2",
    "mamba-mha": "Mamba, attention in the middle and at the end",
    "mamba-local": "Mamba, windows of 64 there",
    "retnet": "RetNet",
    "transformer": "Transformer++",
    "encdec-mamba": "Mamba encoder, Mamba decoder",
    "encdec-transformer": "Transformer encoder, Transformer decoder",
}
DEFAULT = (MAMBA, "mamba-mha", "retnet", "transformer")
EQUAL = 0.05
"""Largest difference of the numbers of parameters, in parts of Mamba's."""
HEADS = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of the arms.

    Attributes:
        width: width of Mamba, and of the arms with MLPs.
        layers: layers of Mamba, a multiple of 4.
        positions: longest text of the Transformer encoder-decoder, whose positions are learnt.
    """

    width: int
    layers: int
    positions: int = 1024


def configuration(arm: str, sizes: Sizes, vocabulary: int) -> dict[str, Any]:
    """Return `model_type` and the configuration keys of an arm.

    Args:
        arm: a key of `ARMS`.
        sizes: sizes of the arms.
        vocabulary: V, for the numbers of parameters.

    Raises:
        ValueError: if the arm cannot be made equal in parameters at these sizes.
    """
    return build(arm, sizes, fitting(arm, sizes, vocabulary))


@cache
def fitting(arm: str, sizes: Sizes, vocabulary: int) -> int:
    """Return the width of the arm's MLP, or of the whole arm if it has none, that makes it equal in parameters."""
    if sizes.layers % 4 or sizes.width % (2 * HEADS):
        raise ValueError(f"layers must be a multiple of 4 and width one of {2 * HEADS}, got {sizes}")
    wanted = parameters(build(MAMBA, sizes, sizes.width), vocabulary)
    if arm == MAMBA:
        return sizes.width
    step = 1 if _has_mlp(arm) else 2 * HEADS
    low, high = step, 16 * sizes.width
    # The number of parameters rises with what is fitted.
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if _count(arm, sizes, middle, vocabulary) <= wanted else (low, middle)
    fit = min((low, high), key=lambda fit: abs(_count(arm, sizes, fit, vocabulary) - wanted))
    found = _count(arm, sizes, fit, vocabulary)
    if abs(found - wanted) > EQUAL * wanted:
        raise ValueError(
            f"sizes must let {arm} have the parameters of {MAMBA} ({wanted:,}) within {EQUAL:.0%}, got {found:,} with "
            f"{sizes}"
        )
    return fit


def _count(arm: str, sizes: Sizes, fit: int, vocabulary: int) -> int:
    return parameters(build(arm, sizes, fit), vocabulary)


def parameters(values: dict[str, Any], vocabulary: int) -> int:
    """Return the number of parameters of a configuration; a tied embedding counts once."""
    keys = {key: value for key, value in values.items() if key != "model_type"}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    config = CONFIG_MAPPING[values["model_type"]](**keys, vocab_size=vocabulary, **ids)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _has_mlp(arm: str) -> bool:
    return arm in ("retnet", "transformer") or arm.startswith("encdec")


def build(arm: str, sizes: Sizes, fit: int) -> dict[str, Any]:
    """Return the arm's configuration with `fit` as the width that `fitting` chooses."""
    width, layers = sizes.width, sizes.layers
    # The standard deviation of torch's linear layers, with which Mamba's projections begin. The default, 0.02, suits
    # widths near 800; at the width of these arms a Transformer learns far more slowly with it.
    deviation = {"initializer_range": (3 * width) ** -0.5}
    hybrid = {"model_type": "zoo_hybrid", "num_attention_heads": HEADS, "tie_word_embeddings": True, **deviation}
    if arm == MAMBA:
        return {"model_type": "zoo_mamba", "hidden_size": fit, "num_hidden_layers": layers}
    if arm == "mamba2":
        heads = {"num_heads": HEADS, "head_dim": 2 * fit // HEADS}
        return {"model_type": "zoo_mamba2", "hidden_size": fit, "num_hidden_layers": 3 * layers // 2, **heads}
    if arm in ("mamba-mha", "mamba-local"):
        kind = "full_attention" if arm == "mamba-mha" else "sliding_attention"
        chosen = (layers // 2 - 1, layers - 1)
        window = {} if arm == "mamba-mha" else {"sliding_attention": {"sliding_window": 64}}
        return {
            **hybrid,
            "hidden_size": fit,
            "intermediate_size": 0,
            "num_hidden_layers": layers,
            "mixer_types": [kind if layer in chosen else "mamba" for layer in range(layers)],
            "mlp_types": ["none"] * layers,
            "position_types": ["none"] * layers,
            "mamba": {"state_size": 16},
            **window,
        }
    if arm == "retnet":
        return {
            "model_type": "zoo_retnet",
            "hidden_size": width,
            "v_head_dim": 2 * width // HEADS,
            "intermediate_size": fit,
            "num_hidden_layers": layers // 2,
            "num_attention_heads": HEADS,
            "embedding_multiplier": width**0.5,
            "tie_word_embeddings": True,
            **deviation,
        }
    if arm == "transformer":
        return {**hybrid, "hidden_size": width, "intermediate_size": fit, "num_hidden_layers": layers // 2}
    blocks = layers // 4
    both = {**hybrid, "model_type": "zoo_encdec", "hidden_size": width, "intermediate_size": fit}
    both["num_hidden_layers"] = blocks
    if arm == "encdec-mamba":
        encoder = round(layers / 3)
        return both | {
            "mixer_types": ["mamba"] * blocks,
            "mamba": {"state_size": 16},
            "encoder": {
                "num_hidden_layers": encoder,
                "mixer_types": ["mamba"] * encoder,
                "mlp_types": ["none"] * encoder,
                "bidirectional": False,
            },
        }
    assert arm == "encdec-transformer"
    return both | {
        "mlp_types": ["plain"] * blocks,
        "position_types": ["none"] * blocks,
        "learned_positions": True,
        "max_position_embeddings": sizes.positions,
        "norm_type": "layer_norm",
        "hidden_act": "gelu",
        "encoder": {"mlp_types": ["plain"] * blocks, "position_types": ["none"] * blocks},
    }
