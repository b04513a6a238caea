"""zoo_mamba against transformers' Mamba and FalconMamba with the same random weights, which load under the same names.

transformers' whole forward of a row is right in every release. What it gets wrong with a cache, with padding on the
right, with packed rows and with adapters on `dt_proj` is compared with that.
"""

from typing import Any

import pytest
import torch
from families import draw_ids, perturb
from parity import check_gradients, check_left_padded_batch, check_logits, close
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from ssm_zoo.modeling import ZooMambaConfig, ZooMambaForCausalLM

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "state_size": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
OPTIONS = {
    "use_bias": True,
    "use_conv_bias": False,
    "conv_kernel": 3,
    "expand": 3,
    "state_size": 5,
    "time_step_rank": 7,
    "tie_word_embeddings": False,
    "residual_in_fp32": False,
    "layer_norm_epsilon": 1e-3,
}
FALCON = (FalconMambaForCausalLM, FalconMambaConfig)
VARIANTS = [
    pytest.param((MambaForCausalLM, MambaConfig, {}), id="mamba"),
    pytest.param((MambaForCausalLM, MambaConfig, OPTIONS), id="mamba-every-option"),
    pytest.param((*FALCON, {"mixer_rms_eps": 1e-6}), id="falcon"),
    pytest.param((*FALCON, OPTIONS | {"mixer_rms_eps": 0.3}), id="falcon-every-option"),
]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """transformers' model and ours."""
    kind, config, options = request.param
    torch.manual_seed(0)
    theirs = kind(config(**(SIZES | options))).eval()
    perturb(theirs)
    ours = ZooMambaForCausalLM(ZooMambaConfig(**(SIZES | options))).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("length", [1, 3, 37])
def test_logits(pair: tuple[Any, Any], length: int) -> None:
    check_logits(pair, length)


def test_logits_of_a_left_padded_batch(pair: tuple[Any, Any]) -> None:
    check_left_padded_batch(pair)


def test_greedy_tokens(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ids, mask = draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    if not theirs.config.use_bias:
        mask[0, :4] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    expected = theirs.generate(ids, **settings)
    assert torch.equal(ours.generate(ids, **settings), expected)
    assert len(expected[:, 9:].unique()) > 2


def test_gradients_of_the_loss(pair: tuple[Any, Any]) -> None:
    for name, gradient in check_gradients(pair).items():
        assert gradient.any(), name


def test_several_tokens_at_once_go_on_from_a_cache(pair: tuple[Any, Any]) -> None:
    """transformers forgets the recurrent state."""
    theirs, ours = pair
    ids, cache = draw_ids(2, 15), DynamicCache(config=ours.config)
    with torch.no_grad():
        parts = [ours(part, past_key_values=cache, use_cache=True).logits for part in ids.split([6, 4, 5], dim=1)]
        close(torch.cat(parts, dim=1), theirs(ids).logits)


def test_decoding_after_a_right_padded_prompt(pair: tuple[Any, Any]) -> None:
    """transformers keeps the padding in the convolution's window and lets it into the state."""
    theirs, ours = pair
    ids, cache = draw_ids(2, 14), DynamicCache(config=ours.config)
    mask = torch.ones_like(ids)
    mask[0, 4:9] = 0
    with torch.no_grad():
        logits = [ours(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache, use_cache=True).logits]
        for t in range(9, 14):
            step = {"attention_mask": mask[:, : t + 1], "past_key_values": cache, "use_cache": True}
            logits.append(ours(ids[:, t : t + 1], **step).logits)
        for i, row in enumerate(ids):
            real = mask[i] == 1
            close(torch.cat(logits, dim=1)[i, real], theirs(row[None, real]).logits[0])


def test_packed_documents(pair: tuple[Any, Any]) -> None:
    """transformers ignores `seq_idx`: documents leak into each other."""
    theirs, ours = pair
    lengths = [5, 1, 9, 2]
    ids = draw_ids(1, sum(lengths))
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    with torch.no_grad():
        expected = [theirs(document).logits for document in ids.split(lengths, dim=1)]
        close(ours(ids, seq_idx=seq_idx).logits, torch.cat(expected, dim=1))


def test_an_adapter_on_dt_proj_acts_and_is_trained(pair: tuple[Any, Any]) -> None:
    """transformers multiplies by the weight, past the adapter: it does nothing and gets no gradient."""
    theirs, ours = pair
    ids = draw_ids(2, 11)
    copy = ZooMambaForCausalLM(ours.config).eval()
    copy.load_state_dict(ours.state_dict())
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["dt_proj"], "init_lora_weights": False}
    adapted = get_peft_model(copy, LoraConfig(**settings))
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6
    for name, gradient in trained.items():
        assert gradient.any(), name
    changed = type(theirs)(theirs.config).eval()
    with torch.no_grad():
        actual = adapted(input_ids=ids).logits
        changed.load_state_dict(adapted.merge_and_unload().state_dict())
        expected = changed(ids).logits
        assert (expected - theirs(ids).logits).abs().max() > 0.01
        close(actual, expected)
