"""Where drafts, prefixes and other settings of a model meet: equal results, or one sentence."""

import io
from typing import Any

import pytest
import torch
from families import make_encoder_decoder, make_model
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedTokenizerFast, StoppingCriteria

from ssm_zoo.modeling import ZooEncDecConfig, ZooHybridConfig, ZooHybridForCausalLM
from ssm_zoo.modeling.cache import CACHE_FIELD
from ssm_zoo.modeling.rollback import restore, snapshot

PROMPT = torch.tensor([[7, 19, 4, 31]]).repeat(1, 4)


def hybrid(*mixers: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": len(mixers)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "mamba2": {"head_dim": 8}}
    heads = heads if "mamba2" in mixers else {key: value for key, value in heads.items() if key != "mamba2"}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return ZooHybridForCausalLM(ZooHybridConfig(**sizes, **heads, **tokens, mixer_types=list(mixers), **changes)).eval()


def read(model: Any, ids: torch.Tensor, cache: Any, **arguments: Any) -> Any:
    return model(ids, use_cache=True, **{CACHE_FIELD: cache}, **arguments)


def test_drafts_of_the_prompt_end_where_the_positions_end() -> None:
    model = hybrid("full_attention", "full_attention", learned_positions=True, max_position_embeddings=24)
    greedy = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=5), greedy)


class StopAt(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return input_ids[:, -1] == self.token


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for every id."""
    # transformers tries the tokenizer of a stop string with the first word.
    words = {word: token for token, word in enumerate(["abcdef", *(f"<{token}>" for token in range(1, size))])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="abcdef")))


@pytest.mark.parametrize("kind", ["criterion", "string", "end"])
@pytest.mark.parametrize("family", ["hybrid", "encoder-decoder"])
def test_a_text_ends_where_it_would_without_drafts(family: str, kind: str) -> None:
    """The draft model is the model, so all drafts are right, and most texts end within one."""
    if family == "hybrid":
        model, prompt, first = hybrid("full_attention", "mamba2"), {"input_ids": PROMPT}, PROMPT.shape[1]
    else:
        model, prompt, first = make_encoder_decoder("mamba"), {"input_ids": PROMPT}, 1
    options: dict[str, Any] = {**prompt, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = model.generate(**options)[0, first:].tolist()
    lengths = set()
    for token in sorted(set(whole)):
        if kind == "criterion":
            options["stopping_criteria"] = [StopAt(token)]
        elif kind == "string":
            tokenizer = tokenizer_of(model.config.vocab_size)
            options |= {"tokenizer": tokenizer, "stop_strings": [tokenizer.convert_ids_to_tokens(token)]}
        else:
            options["eos_token_id"] = token
        length = whole.index(token) + 1
        for drafts in ({}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
            assert model.generate(**options, **drafts)[0, first:].tolist() == whole[:length]
        lengths.add(length)
    assert len(lengths) > 3


def test_a_text_that_is_read_again_takes_no_drafts_beyond_that_length() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    rope["original_max_position_embeddings"] = 24
    model = hybrid("full_attention", "full_attention", rope_parameters=rope, recompute_length=24)
    greedy = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4), greedy)
    with pytest.raises(ValueError, match="at most recompute_length = 24 in assisted decoding, got 25"):
        model.generate(PROMPT, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=4)


def test_a_window_over_the_text_takes_no_drafts_beyond_it() -> None:
    model = make_model("mixer", context_overflow="window")
    ids = torch.arange(model.config.max_position_embeddings - 4)[None] % 20 + 3
    with pytest.raises(
        ValueError, match=r"max_length must be at most max_position_embeddings = \d+ in assisted decoding"
    ):
        model.generate(ids, max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=3)


def test_an_early_exit_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = hybrid("full_attention", "mamba2")
    greedy = model.generate(PROMPT, max_new_tokens=3, do_sample=False)
    with pytest.raises(
        ValueError, match="assistant_early_exit must be None, got 1: the cache has a state for each layer"
    ):
        model.generate(PROMPT, assistant_early_exit=1, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=3, do_sample=False), greedy)


def test_a_cache_that_a_refused_crop_cut_in_part_is_refused() -> None:
    model = hybrid("full_attention", "mamba2")
    cache = DynamicCache(config=model.config)
    read(model, PROMPT[:, :9], cache)
    saved = snapshot(cache)
    with pytest.raises(ValueError, match="crop takes minus the number of columns to remove, from 0 to 0, got -4"):
        cache.crop(-4)
    with pytest.raises(ValueError, match=r"all layers must have read equally many tokens, got \[5, 9\]"):
        read(model, PROMPT[:, :1], cache)
    restore(cache, saved)
    read(model, PROMPT[:, :1], cache)


def test_a_recording_cache_is_pickled_without_what_it_recorded() -> None:
    model = hybrid("full_attention", "mamba2")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, PROMPT[:, :9], cache)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded: Any = torch.load(file, weights_only=False)
    assert loaded.layers[1].record_past and not loaded.layers[1].recording.steps
    token = PROMPT[:, :1]
    assert torch.equal(read(model, token, loaded).logits, read(model, token, cache).logits)


def test_generate_of_an_encoder_decoder_ends_the_recording() -> None:
    model = make_encoder_decoder("mamba")
    options = {"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True, "do_sample": False}
    cache = model.generate(PROMPT, max_new_tokens=12, **options)[CACHE_FIELD]
    assert [layer.record_past for layer in cache.self_attention_cache.layers] == [False, False]


def test_a_snapshot_of_an_encoder_decoder_goes_into_a_fresh_cache() -> None:
    model = make_encoder_decoder("mamba")
    cache = model(input_ids=PROMPT, decoder_input_ids=PROMPT[:, :4], use_cache=True)[CACHE_FIELD]
    saved = snapshot(cache)
    fresh = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    restore(fresh, saved)
    token = PROMPT[:, 4:5]
    expected = read(model, PROMPT, cache, decoder_input_ids=token).logits
    assert torch.equal(read(model, PROMPT, fresh, decoder_input_ids=token).logits, expected)
    with pytest.raises(ValueError, match="snapshot must be that of an EncoderDecoderCache of 2 layers, got 1 layers"):
        restore(fresh, snapshot(fresh.self_attention_cache))


def test_a_chunk_of_padding_alone_changes_nothing() -> None:
    model = make_model("bounded-attention")
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, :9] = 0
    whole = model.generate(PROMPT[:, :12], attention_mask=mask, max_new_tokens=3, do_sample=False)
    options = {"attention_mask": mask, "prefill_chunk_size": 4, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(PROMPT[:, :12], **options), whole)


def test_an_encoder_decoder_has_no_prefix() -> None:
    causal = {"bidirectional": False}
    with pytest.raises(StrictDataclassError, match="prefix_bidirectional must be left out, got True"):
        ZooEncDecConfig(prefix_bidirectional=True, encoder=causal)
    with pytest.raises(StrictDataclassError, match=r"encoder\['prefix_bidirectional'\] must be left out, got True"):
        ZooEncDecConfig(encoder=causal | {"prefix_bidirectional": True})


def test_tokens_behind_a_prefix_can_be_removed_and_those_of_the_prefix_cannot() -> None:
    model = hybrid("mamba2", "full_attention", prefix_bidirectional=True)
    ids, mask = PROMPT[:, :12], torch.arange(12)[None] < 8
    whole = model(torch.cat([ids[:, :10], PROMPT[:, :1]], 1), prefix_mask=torch.arange(11)[None] < 8).logits[:, -1]
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, ids, cache, prefix_mask=mask)
    cache.crop(-2)
    torch.testing.assert_close(read(model, PROMPT[:, :1], cache).logits[:, -1], whole, atol=1e-5, rtol=1e-5)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, ids, cache, prefix_mask=mask)
    with pytest.raises(ValueError, match="crop cannot remove tokens of a prefix that was read in both directions"):
        cache.crop(-6)


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 3}, {}])
def test_a_prefix_is_that_of_the_prompt_and_takes_no_drafts(asked: dict[str, int]) -> None:
    model = hybrid("mamba2", "full_attention", prefix_bidirectional=True)
    if asked:
        with pytest.raises(ValueError, match="prefix_mask must be left out in assisted decoding"):
            model.generate(PROMPT, prefix_mask=torch.ones_like(PROMPT), max_new_tokens=2, **asked)
        return
    with pytest.raises(ValueError, match="got a mask of 18 columns, 0 tokens in the cache and 16 new ones"):
        model.generate(PROMPT, prefix_mask=torch.ones(1, 18, dtype=torch.long), max_new_tokens=2)
    labels = torch.full_like(PROMPT, -100)
    with pytest.raises(ValueError, match="shift_labels must be left out with prefix_mask"):
        model(PROMPT, labels=labels, shift_labels=PROMPT, prefix_mask=torch.ones_like(PROMPT))
