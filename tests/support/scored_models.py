"""Small random Llamas for the tests of evaluation, windows of tokens for them, and their full logits in float64."""

from typing import Any

import torch
from families import VOCAB
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int, *, head_scale: float = 3.0, model_class: Any = LlamaForCausalLM, **changes: Any) -> Any:
    """A small random Llama; the scale of the head sets how sure it is."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.5}
    torch.manual_seed(seed)
    model = model_class(LlamaConfig(**{"vocab_size": VOCAB, **sizes, **ids, **changes})).eval()
    if hasattr(model, "lm_head"):
        with torch.no_grad():
            model.lm_head.weight.normal_(std=head_scale / 4)
    return model


def related_models() -> tuple[Any, Any]:
    """A student and a teacher that agree in part."""
    model, teacher = tiny_llama(0), tiny_llama(0)
    with torch.no_grad():
        teacher.lm_head.weight += torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(2)) * 0.3
    return model, teacher


def token_windows(count: int = 5, length: int = 9, vocabulary: int = VOCAB) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def full_logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits[:, :-1].double()
