"""Tiny Llama teachers for the distillation tests: random ones, one that has learnt a small language, a tokenizer.

The sizes are those of a grown-up in small: grouped keys and values, several heads, and every parameter of its own, so
that nothing that mixes up heads, layers or projections goes unseen.
"""

import functools
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ssm_zoo.conversion.formats import TEACHERS

VOCAB = 320
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def make_teacher(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in evaluation mode whose activations and logits are of order 1.

    Args:
        seed: of the weights.
        **changes: entries of the configuration.
    """
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    _fill(model, seed)
    return model.eval().requires_grad_(False)


TINY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "pad_token_id": None,
    },
    "olmo2": {"pad_token_id": None},
    "smollm3": {"pad_token_id": None, "no_rope_layer_interval": 2},
    "gpt2": {"n_inner": 64},
    "gpt_neox": {},
    "phi": {},
    "gemma2": {
        "pad_token_id": None,
        "sliding_window": 32,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "pad_token_id": None,
        "sliding_window": 32,
        "query_pre_attn_scalar": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
    },
}
"""What a tiny configuration of a family needs besides SIZES."""

LONG = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 2.1], "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "mistral": {"window": {"sliding_window": 5}},
    "phi3": {
        "window": {"sliding_window": 5},
        "longrope": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                **LONG,
            },
            "original_max_position_embeddings": 16,
        },
        "whole": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
    },
    "qwen3": {"biases": {"attention_bias": True}},
    "olmo2": {"biases": {"attention_bias": True}, "one head per key": {"num_key_value_heads": 6}},
    "smollm3": {"biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}},
    "gpt2": {
        "unscaled": {"scale_attn_weights": False},
        "open width": {"n_inner": None, "tie_word_embeddings": False},
    },
    "gpt_neox": {
        "sequential": {"use_parallel_residual": False},
        "no biases": {"attention_bias": False, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    },
    "gemma2": {
        "window": {"sliding_window": 5},
        "without caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    },
    "gemma3_text": {
        "window": {"sliding_window": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
        "full": {"layer_types": ["full_attention"] * 4},
    },
    "phi": {
        "norms": {"qk_layernorm": True},
        "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    },
}
"""Further tiny configurations of a family, by a name for tests."""


def make_any_teacher(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random teacher of a family of the registry TEACHERS, of the same sizes."""
    model_class: Any = TEACHERS[family].model_class
    config = model_class.config_class(**{**SIZES, **TINY.get(family, {}), **changes})
    model = model_class(config)
    _fill(model, seed)
    return model.eval().requires_grad_(False)


def make_qwen2(*, seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random Qwen2 of the same sizes."""
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes}))
    _fill(model, seed)
    return model.eval().requires_grad_(False)


def _fill(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.2 * noise)  # to 1, or 0 where a norm adds 1 to its weight
            elif parameter.dim() == 1 or "embed" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)


def draw_ids(*shape: int, seed: int = 0) -> Tensor:
    """Seeded token ids."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def small_text(sentences: int, seed: int = 0) -> str:
    """English-like lines. The second sentence of a line repeats what the first one introduced: attention is needed."""
    draw = random.Random(seed)
    names = ["Ada", "Ben", "Cleo", "Dora", "Emil", "Fritz", "Gina", "Hugo"]
    colours = ["red", "old", "tiny", "blue", "kind", "loud"]
    animals = ["fox", "owl", "hen", "cat", "goat", "crab", "newt", "mole"]
    verbs = ["sees", "feeds", "finds", "calls", "hears"]
    lines = []
    for _ in range(sentences // 2):
        name, colour, animal = draw.choice(names), draw.choice(colours), draw.choice(animals)
        first, second = draw.sample(verbs, 2)
        lines.append(
            f"{name} {first} the {colour} {animal}. Then {name} {second} it, since the {animal} is {colour}.\n"
        )
    return "".join(lines)


@functools.cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for `small_text`; any other text has tokens too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([small_text(400)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def text_windows(sentences: int, length: int, seed: int = 0) -> Tensor:
    """(N, length) token windows of a `small_text`."""
    ids = torch.tensor(small_tokenizer()(small_text(sentences, seed), verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


@functools.cache
def _learnt_weights() -> dict[str, Tensor]:
    """Weights after a few seconds of training: far better than chance, and by attention."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    windows = text_windows(2000, 48, seed=1)
    steps = 120
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min((step + 1) / 10, 1.0, (steps - step) / (steps / 2))
        ids = windows[torch.arange(8 * step, 8 * step + 8) % len(windows)]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained_teacher() -> LlamaForCausalLM:
    """A Llama that has learnt `small_text` (seed 1), in evaluation mode; trained once in a process."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.load_state_dict(_learnt_weights())
    return model.eval().requires_grad_(False)


def save_teacher(folder: Path, model: LlamaForCausalLM | None = None) -> Path:
    """Write a teacher (a random one if none is given) and its tokenizer into a folder, and return the folder."""
    (model or make_teacher()).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
