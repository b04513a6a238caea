"""zoo_hybrid with attention in every layer against transformers' Llama, and with a window against its Mistral."""

from typing import Any

import pytest
import torch
from families import draw_ids, perturb
from parity import check_gradients, check_logits, close
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ssm_zoo.modeling import ZooHybridConfig, ZooHybridForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = [
    pytest.param({"num_key_value_heads": 4}, id="multi-head"),
    pytest.param({"num_key_value_heads": 2, "tie_word_embeddings": True}, id="grouped-tied"),
    pytest.param({"num_key_value_heads": 1, "head_dim": 12}, id="multi-query-wide-heads"),
    pytest.param({"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}, id="biases"),
    pytest.param({"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 128}, id="llama3-rope"),
    pytest.param({"rms_norm_eps": 1e-3, "attn_implementation": "eager"}, id="eager"),
    pytest.param({"sliding_window": 5, "num_key_value_heads": 2}, id="window"),
]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """transformers' model and ours."""
    options = SIZES | {"tie_word_embeddings": False} | request.param
    torch.manual_seed(0)
    if "sliding_window" in options:
        theirs = MistralForCausalLM(MistralConfig(**options)).eval()
        options["mixer_types"] = ["sliding_attention"] * options["num_hidden_layers"]
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**options)).eval()
    perturb(theirs)
    ours = ZooHybridForCausalLM(ZooHybridConfig(**options)).eval()
    ours.load_state_dict({renamed(name): value for name, value in theirs.state_dict().items()})
    return theirs, ours


def renamed(name: str) -> str:
    for old, new in (("model.", "backbone."), ("embed_tokens", "embeddings"), ("self_attn", "mixer")):
        name = name.replace(old, new)
    return name.replace("backbone.norm.", "backbone.norm_f.")


@pytest.mark.parametrize("length", [1, 40])
def test_logits(pair: tuple[Any, Any], length: int) -> None:
    check_logits(pair, length)


def test_logits_of_a_left_padded_batch(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ids, mask = draw_ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[0, :9] = mask[1, :15] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)  # theirs own are not shifted, and rotary needs no absolute ones
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=position_ids).logits
        close(ours(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1])
        close(ours(ids, attention_mask=mask, position_ids=position_ids).logits[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens(pair: tuple[Any, Any], cache: str) -> None:
    theirs, ours = pair
    ids, mask = draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    expected = theirs.generate(ids, **settings)
    assert torch.equal(ours.generate(ids, cache_implementation=cache, **settings), expected)
    assert len(expected[:, 9:].unique()) > 2


def test_generate_does_not_compile_by_itself(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does on a GPU where every layer of the cache is static, unless told not to."""
    ids, compiled = draw_ids(1, 4), []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    for model in pair:
        everywhere = CompileConfig()
        everywhere._compile_all_devices = True  # or only on a GPU
        settings = {"cache_implementation": "static", "compile_config": everywhere, "pad_token_id": 0}
        model.generate(ids, do_sample=False, max_new_tokens=3, **settings)
    assert len(compiled) == 1  # theirs


def test_attention_matrices(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ids = draw_ids(2, 11)
    with torch.no_grad():
        implementation = theirs.config._attn_implementation
        theirs.set_attn_implementation("eager")
        expected = theirs(ids, output_attentions=True).attentions
        theirs.set_attn_implementation(implementation)
        for actual, matrix in zip(ours(ids, output_attentions=True).attentions, expected, strict=True):
            close(actual, matrix, "attention")


def test_gradients_of_the_loss(pair: tuple[Any, Any]) -> None:
    check_gradients(pair, renamed)
