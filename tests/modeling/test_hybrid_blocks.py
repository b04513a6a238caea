"""Blocks of zoo_hybrid with one half only, and rotary positions on part of a head."""

from typing import Any

import pytest
import torch
from families import draw_ids, make_model
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ssm_zoo.modeling import ZooHybridConfig, ZooHybridForCausalLM
from ssm_zoo.modeling.layers import rotate

HALVES = {"mixer_types": ["none", "mamba2", "full_attention", "none"], "mlp_types": ["gated", "none", "gated", "gated"]}


@pytest.fixture(scope="module")
def halves() -> Any:
    """With a block without a token mixer first, where the cache is asked how long it is."""
    return make_model("mamba2-full", num_hidden_layers=4, **HALVES)


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_block_is_the_halves_it_has(halves: Any) -> None:
    block = halves.backbone.layers
    assert [(b.mixer is None, b.mlp is None) for b in block] == [
        (True, False),
        (False, True),
        (False, False),
        (True, False),
    ]
    assert [b.input_layernorm is None for b in block] == [b.mixer is None for b in block]
    assert [b.post_attention_layernorm is None for b in block] == [b.mlp is None for b in block]
    ids = draw_ids(2, 13)
    hidden = halves.backbone.embeddings(ids)
    sequence = halves.backbone.sequence_of(hidden)
    with torch.no_grad():
        for each in block:
            if each.mixer is not None:
                hidden = hidden + each.mixer(each.input_layernorm(hidden), sequence)[0]
            if each.mlp is not None:
                hidden = hidden + each.mlp(each.post_attention_layernorm(hidden))
        expected = halves.lm_head(halves.backbone.norm_f(hidden))
    close(logits(halves, ids, use_cache=False), expected)


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 5], [8, 1]], ids=str)
def test_the_cache_goes_on(halves: Any, lengths: list[int]) -> None:
    ids, cache, parts = draw_ids(2, 9), None, []
    with torch.no_grad():
        for piece in ids.split(lengths, dim=1):
            output = halves(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert cache is not None and cache.get_seq_length() == 9
    close(torch.cat(parts, dim=1), logits(halves, ids, use_cache=False))


def test_a_padded_prompt_goes_on(halves: Any) -> None:
    ids, mask = draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    together = halves.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(together[:1, 9:], halves.generate(ids[:1, 4:], **settings)[:, 5:])
    assert torch.equal(together[1:, 9:], halves.generate(ids[1:], **settings)[:, 9:])


def test_a_block_without_a_mixer_has_no_matrix(halves: Any) -> None:
    attentions = halves(draw_ids(1, 5), output_attentions=True).attentions
    assert [matrix is None for matrix in attentions] == [True, False, False, True]


def test_every_parameter_gets_a_gradient(halves: Any) -> None:
    ids = draw_ids(2, 13)
    halves(ids, labels=ids).loss.backward()
    for name, parameter in halves.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    halves.zero_grad()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_types": ["gated"]}, "mlp_types must have one entry for each of the 2 blocks, got 1"),
        ({"mlp_types": ["gated", "moe"]}, r"mlp_types\[1\] must be one of gated, plain, none, got 'moe'"),
        (
            {"mixer_types": ["none"] * 2, "mlp_types": ["gated", "none"]},
            r"mlp_types\[1\] must be 'gated' or 'plain' where mixer_t",
        ),
        ({"intermediate_size": 0, "mlp_types": ["gated", "none"]}, "intermediate_size must be at least 1, got 0"),
        ({"intermediate_size": -1, "mlp_types": ["none"] * 2}, "intermediate_size must be at least 1, got -1"),
        ({"rope_parameters": 1.5}, "partial_rotary_factor'. must be between 0 and 1 .* got 1.5"),
        ({"rope_parameters": 0.25}, "an even number of the 4 channels of a head, got 0.25"),
        ({"mixer_types": ["mamba2"] * 2, "time_step_limit": (1.0, 0.5)}, r"time_step_limit must be \(low, high\)"),
    ],
)
def test_malformed_raises(change: dict[str, Any], message: str) -> None:
    if "rope_parameters" in change:
        part = change["rope_parameters"]
        change = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}}
    with pytest.raises(Exception, match=message):
        ZooHybridConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, mamba_head_dim=8, **change)


def test_a_model_without_mlps_needs_no_width_for_them() -> None:
    config = make_model("mamba2-full", mlp_types=["none"] * 2, intermediate_size=0).config
    assert ZooHybridForCausalLM(config).num_parameters() > 0


@pytest.mark.parametrize("turned", [0, 2, 6, 10])
def test_the_first_channels_are_turned(turned: int) -> None:
    """As those of a smaller head; the others stay."""
    rotary = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": turned / 10 + 1e-9}
    rotary["partial_rotary_factor"] = min(rotary["partial_rotary_factor"], 1.0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 5}
    model = ZooHybridForCausalLM(ZooHybridConfig(**sizes, head_dim=10, rope_parameters=rotary))
    q, k = torch.randn(2, 3, 2, 7, 10, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7)[None]
    tables = [table[:, None] for table in model.backbone.rotary_emb(q, positions)]
    actual = rotate(q, *tables), rotate(k, *tables)
    for x, y in zip((q, k), actual, strict=True):
        assert torch.equal(y[..., turned:], x[..., turned:])
    if turned:
        plain: Any = ZooHybridConfig(
            **sizes, head_dim=turned, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
        )
        small = apply_rotary_pos_emb(q[..., :turned], k[..., :turned], *LlamaRotaryEmbedding(plain)(q, positions))
        for x, y in zip(small, actual, strict=True):
            torch.testing.assert_close(y[..., :turned], x)
            assert not torch.allclose(y[:, :, 1:, :turned], q[:, :, 1:, :turned])
